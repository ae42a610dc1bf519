"""Distributions of noise levels against published means, closed forms and identities."""

import pytest
import torch
from scipy import stats

from musubi_tuner.common.errors import UserError
from musubi_tuner.common.seeding import generator
from musubi_tuner.diffusion.timesteps import NoiseLevelSampler, default_shifted_logit_mode, token_shift

DRAWS = 20_000
TOKENS = (1024, 2048, 4096, 8192, 16384)
MEANS = {"legacy": (0.688, 0.750, 0.850, 0.956, 0.997), "stretched": (0.626, 0.672, 0.743, 0.815, 0.842)}


def draw(sampler: NoiseLevelSampler, num_tokens: int, count: int = DRAWS) -> torch.Tensor:
    return sampler.draw(num_tokens, [generator("draws")] * count)  # one generator, drawn from count times


@pytest.mark.parametrize("mode", ["legacy", "stretched"])
@pytest.mark.parametrize("index", range(len(TOKENS)))
def test_mean_level_by_sequence_length(mode, index):
    sampler = NoiseLevelSampler(shifted_logit_mode=mode)
    # The mean of a distribution is the integral of its quantiles: no sampling error to allow for.
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    assert float(sampler.quantile(u, TOKENS[index]).double().mean()) == pytest.approx(MEANS[mode][index], abs=6e-4)
    sigma = draw(sampler, TOKENS[index])
    error = float(sigma.std()) / DRAWS**0.5
    assert float(sigma.mean()) == pytest.approx(MEANS[mode][index], abs=4 * error + 6e-4)


@pytest.mark.parametrize("num_tokens", [64, 4096])
@pytest.mark.parametrize("std", [1.0, 0.6])
def test_legacy_is_the_logit_normal_distribution(num_tokens, std):
    sampler = NoiseLevelSampler(std=std, mean=0.3)
    sigma = draw(sampler, num_tokens, 5000).double()
    mu = 0.95 + (num_tokens - 1024) * 1.1 / 3072 + 0.3
    assert stats.kstest(torch.logit(sigma).numpy(), stats.norm(mu, std).cdf).pvalue > 1e-3


def test_stretched_matches_its_definition_on_normal_draws():
    """The formula applied to NumPy's normal draws, compared as samples."""
    import numpy as np

    rng = np.random.default_rng(0)
    mu, eps, uniform_prob, count = 2.05, 1e-3, 0.1, 20_000
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    low, high = sigmoid(mu - 2.5758), sigmoid(mu + 3.0902)
    q = (sigmoid(mu + rng.standard_normal(count)) - low) / (high - low)
    q = np.clip(np.where(q < eps, 2 * eps - q, q), 0, 1)
    q = np.where(rng.random(count) < uniform_prob, eps + (1 - eps) * rng.random(count), q)
    ours = draw(NoiseLevelSampler(shifted_logit_mode="stretched"), 4096)
    assert stats.ks_2samp(ours.numpy(), q).pvalue > 1e-3
    assert float(ours.min()) >= eps * 0.999
    assert float((ours == 1).double().mean()) == pytest.approx(1e-3 * (1 - uniform_prob), abs=8e-4)


def test_uniform_share_of_zero_and_one():
    never = NoiseLevelSampler(shifted_logit_mode="stretched", uniform_prob=0.0)
    always = NoiseLevelSampler(shifted_logit_mode="stretched", uniform_prob=1.0)
    assert stats.kstest(draw(always, 4096, 5000).numpy(), stats.uniform(1e-3, 0.999).cdf).pvalue > 1e-3
    assert stats.kstest(draw(never, 4096, 5000).numpy(), stats.uniform(1e-3, 0.999).cdf).pvalue < 1e-6


@pytest.mark.parametrize("mode", ["legacy", "stretched", "uniform"])
def test_quantiles_are_those_of_the_draws(mode):
    if mode == "uniform":
        sampler = NoiseLevelSampler(sampling="uniform", min_sigma=0.2, max_sigma=0.7)
    else:
        sampler = NoiseLevelSampler(shifted_logit_mode=mode)
    sigma = draw(sampler, 2048)
    for u in (0.05, 0.3, 0.5, 0.9):
        share = float((sigma <= sampler.quantile(u, 2048)).double().mean())
        assert share == pytest.approx(u, abs=0.015)


def test_uniform_stays_in_its_range():
    sigma = draw(NoiseLevelSampler(sampling="uniform", min_sigma=0.2, max_sigma=0.7), 1024, 5000)
    assert stats.kstest(sigma.numpy(), stats.uniform(0.2, 0.5).cdf).pvalue > 1e-3


def test_sigma_means_shifted_logit_normal():
    for mode in ("legacy", "stretched"):
        a = draw(NoiseLevelSampler(sampling="sigma", shifted_logit_mode=mode), 2048, 50)
        b = draw(NoiseLevelSampler(shifted_logit_mode=mode), 2048, 50)
        assert torch.equal(a, b)


def test_shift_is_linear_and_clamped_only_when_asked():
    tokens = torch.tensor([1, 1024, 2560, 4096, 7168])
    expected = torch.tensor([0.95 - 1023 * 1.1 / 3072, 0.95, 1.5, 2.05, 3.15], dtype=torch.float64)
    torch.testing.assert_close(token_shift(tokens), expected)
    torch.testing.assert_close(token_shift(tokens, clamp=True), expected.clamp(0.95, 2.05))


def test_given_shift_replaces_the_sequence_length():
    sampler = NoiseLevelSampler(shift=1.5)
    assert torch.equal(draw(sampler, 10, 20), draw(sampler, 100_000, 20))
    assert torch.equal(draw(sampler, 10, 20), draw(NoiseLevelSampler(), 2560, 20))


def test_a_draw_depends_on_its_own_generator_only():
    sampler = NoiseLevelSampler(shifted_logit_mode="stretched")
    together = sampler.draw([500, 1000, 2000], [generator(i) for i in range(3)])
    alone = [sampler.draw(n, [generator(i)]) for i, n in enumerate([500, 1000, 2000])]
    assert torch.equal(together, torch.cat(alone))
    assert together.dtype == torch.float32


def test_long_sequences_do_not_overflow():
    for mode in ("legacy", "stretched"):
        sigma = draw(NoiseLevelSampler(shifted_logit_mode=mode), 400_000, 200)
        assert bool(((sigma >= 0) & (sigma <= 1)).all())


def test_unknown_sampling_lists_the_known():
    with pytest.raises(UserError, match="uniform"):
        draw(NoiseLevelSampler(sampling="unifrom"), 1024, 1)


def test_default_variant_of_each_release():
    assert default_shifted_logit_mode("2.0") == "legacy"
    assert default_shifted_logit_mode("2.3") == "stretched"
