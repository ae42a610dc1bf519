"""Loss terms: formulas, masks and weights."""

import pytest
import torch

from musubi_tuner.common.av import AV
from musubi_tuner.common.errors import UserError
from musubi_tuner.diffusion.losses import LOSSES, LossTerm, task_losses, total
from musubi_tuner.diffusion.tokens import NoisedTokens

B, N, C = 3, 10, 4


def tokens(weight: torch.Tensor | None = None, seed: int = 0) -> NoisedTokens:
    g = torch.Generator().manual_seed(seed)
    return NoisedTokens(
        clean=torch.randn(B, N, C, generator=g),
        noise=torch.randn(B, N, C, generator=g),
        t=torch.full((B, 1), 0.5),
        sigma=torch.full((B,), 0.5),
        coords=torch.zeros(B, 1, N, 2),
        weight=torch.ones(B, N) if weight is None else weight,
        grid=(N, 1, 1),
        target=slice(0, N),
    )


def test_loss_functions_by_their_formulas():
    d = torch.tensor([-3.0, -0.1, 0.0, 0.2, 2.0])
    zero, delta = torch.zeros_like(d), 0.5
    huber = torch.where(d.abs() < delta, d**2 / (2 * delta), d.abs() - delta / 2)
    expected = {"mse": d**2, "mae": d.abs(), "l1": d.abs(), "huber": huber, "smooth_l1": huber}
    assert set(LOSSES.names()) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(LOSSES[name](d, zero, delta), value)
    with pytest.raises(UserError, match="did you mean 'huber'"):
        LOSSES["hubber"]


def test_masks_weigh_within_a_sample_not_between_samples():
    weight = torch.ones(B, N)
    weight[0, 2:] = 0  # 80 % of the tokens
    t = tokens(weight)
    term = task_losses(AV(video=t.velocity + 2.0), AV(video=t))["video"]
    torch.testing.assert_close(term.value, torch.full((B,), 4.0))


def test_no_gradient_reaches_masked_tokens():
    weight = torch.ones(B, N)
    weight[1, 4:] = 0
    t = tokens(weight)
    prediction = torch.randn(B, N, C, requires_grad=True)
    total(task_losses(AV(video=prediction), AV(video=t))).backward()
    assert bool((prediction.grad[1, 4:] == 0).all())
    assert bool((prediction.grad[1, :4] != 0).all())


def test_permuting_samples_permutes_the_losses():
    t = tokens()
    prediction = torch.randn(B, N, C)
    order = torch.tensor([2, 0, 1])
    shuffled = NoisedTokens(**{k: v[order] if isinstance(v, torch.Tensor) else v for k, v in vars(t).items()})
    a = task_losses(AV(video=prediction), AV(video=t))["video"].value
    b = task_losses(AV(video=prediction[order]), AV(video=shuffled))["video"].value
    assert torch.equal(a[order], b)


def test_sample_without_supervision_is_left_out_of_the_mean():
    weight = torch.ones(B, N)
    weight[2] = 0
    t = tokens(weight)
    offset = torch.tensor([1.0, 2.0, 100.0])[:, None, None]
    term = task_losses(AV(audio=t.velocity + offset), AV(audio=t))["audio"]
    assert term.valid.tolist() == [True, True, False]
    torch.testing.assert_close(term.mean(), torch.tensor(2.5))


def test_nothing_supervised_is_exactly_zero_and_in_the_graph():
    t = tokens(torch.zeros(B, N))
    prediction = torch.randn(B, N, C, requires_grad=True)
    loss = total(task_losses(AV(video=prediction), AV(video=t)))
    assert float(loss) == 0.0
    loss.backward()
    assert bool((prediction.grad == 0).all())


def test_total_is_the_weighted_sum_of_the_modalities():
    video, audio = tokens(seed=1), tokens(seed=2)
    terms = task_losses(
        AV(video=video.velocity + 1.0, audio=audio.velocity + 3.0),
        AV(video=video, audio=audio),
        weights=AV(video=0.5, audio=2.0),
    )
    torch.testing.assert_close(total(terms), torch.tensor(0.5 * 1 + 2 * 9.0))
    torch.testing.assert_close(terms["audio"].mean(), torch.tensor(9.0))


def test_scalar_terms_count_as_they_are():
    assert float(total({"a": LossTerm(torch.tensor(3.0), 0.5), "b": LossTerm(torch.tensor([1.0, 3.0]))})) == 3.5
    with pytest.raises(ValueError, match="no loss term"):
        total({})


def test_half_precision_predictions_are_compared_in_fp32():
    t = tokens()
    prediction = t.velocity.bfloat16()
    term = task_losses(AV(video=prediction), AV(video=t), loss_type="mae")["video"]
    assert term.value.dtype == torch.float32
    torch.testing.assert_close(term.value, (prediction.float() - t.velocity).abs().mean(dim=(1, 2)))
