"""Every choice of timestep sampling against its textbook form with SciPy's normal distribution."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import expit, logit

from musubi_tuner.common.seeding import generator
from musubi_tuner.config.timesteps import TimestepSampling
from musubi_tuner.diffusion.timesteps import SAMPLINGS, NoiseLevelSampler

GRID = (5, 20, 36)  # latent frames, rows, columns: 180 patches of 2 x 2, 720 cells
SCALE, SHIFT, MEAN, STD = 1.3, 3.0, 0.4, 1.7
SAMPLER = NoiseLevelSampler(flow_shift=SHIFT, sigmoid_scale=SCALE, mean=MEAN, std=STD)
SHARES = np.linspace(0.01, 0.99, 37)


def line(count: float, low: tuple[float, float], high: tuple[float, float]) -> float:
    return float(np.polyval(np.polyfit(*zip(low, high, strict=True), 1), count))


FLUX = math.exp(line(10 * 18, (256, 0.5), (4096, 1.15)))
FLUX2 = math.exp(line(20 * 36, (256, 0.5), (4096, 1.15)))
QWEN = math.exp(line(10 * 18, (256, 0.5), (8192, 0.9)))


def shifted(u, a: float):
    """t = sigmoid(k z), then t a / (1 + (a - 1) t)."""
    t = expit(SCALE * stats.norm.ppf(u))
    return t * a / (1 + (a - 1) * t)


def shifted_cdf(x, a: float):
    return stats.norm.cdf(logit(x / (a - (a - 1) * x)) / SCALE)


def logsnr(u, mean: float, std: float):
    """sigmoid(-l / 2) with l from N(mean, std), rising with u."""
    return expit(-stats.norm.isf(u, mean, std) / 2)


def logsnr_cdf(x, mean: float, std: float):
    return stats.norm.sf(-2 * logit(x), mean, std)


QUANTILES = {
    "uniform": lambda u: u,
    "sigmoid": lambda u: shifted(u, 1.0),
    "shift": lambda u: shifted(u, SHIFT),
    "flux_shift": lambda u: shifted(u, FLUX),
    "flux2_shift": lambda u: shifted(u, FLUX2),
    "qwen_shift": lambda u: shifted(u, QWEN),
    "logsnr": lambda u: logsnr(u, MEAN, STD),
    "shifted_logit_normal": lambda u: expit(
        line(np.prod(GRID), (1024, 0.95), (4096, 2.05)) + MEAN + STD * stats.norm.ppf(u)
    ),
}


def mixture_cdf(a: float):
    return lambda x: 0.8 * shifted_cdf(x, a) + 0.075 * logsnr_cdf(x, MEAN, STD) + 0.125 * logsnr_cdf(x, 5.36, 1.0)


CDFS = {
    "uniform": lambda x: x,
    "sigmoid": lambda x: shifted_cdf(x, 1.0),
    "shift": lambda x: shifted_cdf(x, SHIFT),
    "flux_shift": lambda x: shifted_cdf(x, FLUX),
    "qwen_shift": lambda x: shifted_cdf(x, QWEN),
    "logsnr": lambda x: logsnr_cdf(x, MEAN, STD),
    "qinglong_flux": mixture_cdf(FLUX),
    "qinglong_qwen": mixture_cdf(QWEN),
}


def grids(count: int = 1) -> torch.Tensor:
    return torch.tensor([GRID] * count)


def draw(sampler: NoiseLevelSampler, count: int, shares=None) -> np.ndarray:
    sigma = sampler.draw(grids(), [generator("draws")] * count, shares=shares)
    return sigma.double().numpy()


def test_the_flag_offers_what_there_is():
    assert set(get_args(TimestepSampling)) == set(SAMPLINGS.names())
    assert set(QUANTILES) | set(CDFS) | {"sigma"} == set(SAMPLINGS.names())


@pytest.mark.parametrize("name", QUANTILES)
def test_a_given_share_takes_the_place_of_the_random_number(name: str):
    sampler = replace(SAMPLER, sampling=name)
    np.testing.assert_allclose(draw(sampler, len(SHARES), torch.tensor(SHARES)), QUANTILES[name](SHARES), rtol=1e-5)
    np.testing.assert_allclose(sampler.quantile(SHARES.tolist(), grids()).numpy(), QUANTILES[name](SHARES), rtol=1e-5)


@pytest.mark.parametrize("name", CDFS)
def test_draws_have_the_distribution(name: str):
    assert stats.kstest(draw(replace(SAMPLER, sampling=name), 4000), CDFS[name]).pvalue > 1e-3


@pytest.mark.parametrize("name", [n for n in CDFS if n.startswith("qinglong")])
def test_quantiles_of_a_mixture_invert_its_distribution(name: str):
    quantiles = replace(SAMPLER, sampling=name).quantile(SHARES.tolist(), grids())
    np.testing.assert_allclose(CDFS[name](quantiles.double().numpy()), SHARES, atol=1e-5)


def test_shares_leave_the_parts_of_a_mixture_to_chance():
    """Each part is spread by the shares, so the whole is as well."""
    count = 4000
    shares = (torch.arange(count) + 0.5) / count
    levels = draw(replace(SAMPLER, sampling="qinglong_flux"), count, shares)
    assert stats.kstest(levels, CDFS["qinglong_flux"]).pvalue > 1e-3
    stretched = replace(SAMPLER, shifted_logit_mode="stretched", uniform_prob=1.0, eps=0.1)
    np.testing.assert_allclose(draw(stretched, count, shares), 0.1 + 0.9 * shares.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("flux_shift", ((32, 32), 0.5), ((128, 128), 1.15)),
        ("flux2_shift", ((16, 16), 0.5), ((64, 64), 1.15)),
        ("qwen_shift", ((32, 32), 0.5), ((128, 256), 0.9)),
    ],
)
def test_shifts_by_the_size_of_a_frame(name: str, low, high):
    """The median of a flow shift e^m of a median of 1/2 is sigmoid(m); the number of frames has no part in it."""
    sampler = NoiseLevelSampler(sampling=name)
    for (height, width), m in (low, high):
        medians = sampler.quantile([0.5], torch.tensor([[1, height, width], [9, height, width]]))
        np.testing.assert_allclose(medians.numpy(), expit([m, m]), rtol=1e-6)
    huge = torch.tensor([[1, 512, 512]])
    assert sampler.quantile([0.5], huge) > replace(sampler, clamp_shift=True).quantile([0.5], huge)


@pytest.mark.parametrize("mode", ["legacy", "stretched"])
@pytest.mark.parametrize("name", ["shifted_logit_normal", "uniform", "shift", "qinglong_flux"])
def test_preserved_shape_is_the_distribution_cut_to_the_range(name: str, mode: str):
    low, high = 0.55, 0.8
    whole = replace(SAMPLER, sampling=name, shifted_logit_mode=mode)
    cut = replace(whole, min_sigma=low, max_sigma=high, preserve_shape=True)
    levels = draw(cut, 1000)
    assert low <= levels.min() < low + 0.02
    assert high - 0.02 < levels.max() <= high
    inside = draw(whole, 5000)
    inside = inside[(inside >= low) & (inside <= high)]
    assert stats.ks_2samp(levels, inside).pvalue > 1e-3
    quantiles = cut.quantile(SHARES.tolist(), grids()).double().numpy()
    np.testing.assert_allclose([(levels <= q).mean() for q in quantiles], SHARES, atol=0.06)


def test_drawing_again_leaves_the_noise_that_follows_alone():
    cut = NoiseLevelSampler(min_sigma=0.1, max_sigma=0.2, preserve_shape=True)
    one, other = generator("a"), generator("a")
    cut.draw(1024, [one])
    NoiseLevelSampler().draw(1024, [other])
    assert torch.equal(torch.randn(4, generator=one), torch.randn(4, generator=other))


def test_a_range_that_no_draw_reaches_is_squeezed_into(caplog: pytest.LogCaptureFixture):
    options = {"shift": 12.0, "std": 0.1, "min_sigma": 0.1, "max_sigma": 0.2}
    with caplog.at_level(logging.WARNING):
        levels = NoiseLevelSampler(preserve_shape=True, **options).draw(1024, [generator("a")])
    assert torch.equal(levels, NoiseLevelSampler(**options).draw(1024, [generator("a")]))
    assert "--preserve_distribution_shape" in caplog.text


@pytest.mark.parametrize("name", SAMPLINGS.names())
def test_every_sampling_stays_in_range_and_keeps_to_its_generator(name: str):
    sampler = NoiseLevelSampler(sampling=name, min_sigma=0.1, max_sigma=0.9)
    together = sampler.draw(grids(3), [generator(i) for i in range(3)])
    assert torch.equal(together, torch.cat([sampler.draw(grids(), [generator(i)]) for i in range(3)]))
    assert bool(((together >= 0.1) & (together <= 0.9)).all())
