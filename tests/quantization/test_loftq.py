"""LoftQ against NumPy's decomposition, and errors that fall with the rounds."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
import torch

from musubi_tuner.common.errors import UserError
from musubi_tuner.quantization.loftq import quantize_with_factors, truncated_svd
from musubi_tuner.quantization.packed import Nf4


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def nearest(matrix: np.ndarray, rank: int) -> np.ndarray:
    """The nearest matrix of a rank (Eckart and Young)."""
    u, s, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def nf4(matrix: np.ndarray) -> np.ndarray:
    """Quantised and dense again, without this package's code."""
    quantile = np.vectorize(NormalDist().inv_cdf)  # the levels are quantiles
    up, down = quantile(np.linspace(0.9677083, 0.5, 9))[:-1], -quantile(np.linspace(0.9677083, 0.5, 8))[:-1]
    levels = np.sort(np.concatenate([up, down, [0.0]])) / up[0]
    blocks = matrix.reshape(-1, 32)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    codes = np.abs((blocks / largest)[..., None] - levels).argmin(axis=-1)
    return (levels[codes] * largest).reshape(matrix.shape)


def error(weight: torch.Tensor, rank: int, iterations: int) -> float:
    packed, factors = quantize_with_factors(
        weight, Nf4().quantize, rank=rank, iterations=iterations, name="transformer_blocks.0.attn1.to_q.weight"
    )
    left = weight.float() - packed.dense(torch.float32) - factors.up @ factors.down
    return float(left.norm() / weight.float().norm())


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_alternates_as_the_definition_says(iterations):
    weight = normal(64, 96)
    dense = weight.numpy()
    quantised, correction = None, np.zeros_like(dense)
    for _ in range(iterations):
        quantised = nf4(dense - correction)
        correction = nearest(dense - quantised, 40)
    packed, factors = quantize_with_factors(weight, Nf4().quantize, rank=40, iterations=iterations, name="w")
    # A value at the border of two levels may fall to either side in another precision.
    different = np.abs(packed.dense(torch.float32).numpy() - quantised) > 1e-3
    assert different.mean() < 2e-3
    if not different.any():
        np.testing.assert_allclose((factors.up @ factors.down).numpy(), correction, atol=1e-4)
    assert factors.down.shape == (40, 96)
    assert factors.up.shape == (64, 40)
    np.testing.assert_allclose(np.linalg.norm(factors.up, axis=0), np.linalg.norm(factors.down, axis=1), rtol=1e-4)


def test_errors_on_normal_weights():
    weight = normal(768, 768)
    plain = float((weight - Nf4().quantize(weight).dense(torch.float32)).norm() / weight.norm())
    errors = [error(weight, 32, iterations) for iterations in (1, 2, 5)]
    assert plain == pytest.approx(0.0874, rel=0.01)
    assert errors == pytest.approx([0.0807, 0.0763, 0.0719], rel=0.01)


@pytest.mark.parametrize("shape", [(256, 192), (96, 300)])
def test_decomposition_is_nearly_the_best(shape):
    matrix = normal(*shape)
    left, values, right = truncated_svd(matrix, 16, torch.Generator().manual_seed(0))
    best = np.linalg.norm(nearest(matrix.numpy(), 16))
    assert np.linalg.norm(left * values @ right) > 0.98 * best, "of the captured norm"
    torch.testing.assert_close(left.T @ left, torch.eye(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(right @ right.T, torch.eye(16), atol=1e-4, rtol=0)


def test_one_round_leaves_the_plain_quantised_weight():
    weight = normal(64, 64, dtype=torch.bfloat16)
    before = weight.clone()
    packed, _ = quantize_with_factors(weight, Nf4().quantize, rank=8, iterations=1, name="w")
    plain = Nf4().quantize(weight)
    assert torch.equal(packed.weight, plain.weight)
    assert torch.equal(packed.scale, plain.scale)
    assert torch.equal(weight, before)


def test_the_weight_is_not_written_to():
    weight = normal(64, 64)
    before = weight.clone()
    quantize_with_factors(weight, Nf4().quantize, rank=8, iterations=3, name="w")
    assert torch.equal(weight, before)


def test_draws_are_those_of_the_weights_name_alone():
    weight = normal(128, 128)
    torch.manual_seed(1)
    one = quantize_with_factors(weight, Nf4().quantize, rank=4, iterations=2, name="w")[1]
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    other = quantize_with_factors(weight, Nf4().quantize, rank=4, iterations=2, name="w")[1]
    assert torch.equal(one.up, other.up)
    assert torch.equal(one.down, other.down)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_one_message(value):
    weight = normal(64, 96)
    weight[3, 5] = value
    with pytest.raises(UserError, match=r"attn1\.to_q\.weight holds NaN or infinity, so the checkpoint is broken"):
        error(weight, 4, 2)
