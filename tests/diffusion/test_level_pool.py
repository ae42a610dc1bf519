"""Timestep buckets: spread evenly over an epoch, dealt without memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from musubi_tuner.common.seeding import generator
from musubi_tuner.dataset.batch import SampleKey
from musubi_tuner.diffusion.level_pool import LevelPool, even_shares
from musubi_tuner.diffusion.timesteps import NoiseLevelSampler

KEYS = [SampleKey(f"clip_{i}", i % 2, i % 3) for i in range(120)]


@pytest.mark.parametrize(("count", "buckets"), [(120, 10), (120, 120), (121, 10), (7, 10), (1, 2)])
def test_every_bucket_has_as_many_up_to_rounding(count: int, buckets: int):
    shares = even_shares(count, buckets, generator("a"))
    assert shares.shape == (count,)
    assert bool(((shares >= 0) & (shares < 1)).all())
    filled = np.bincount((shares * buckets).long().numpy(), minlength=buckets)
    each = -(-count // buckets)
    assert filled.max() <= each
    if count % buckets == 0:
        assert (filled == each).all()


def test_shares_are_uniform_within_their_buckets():
    shares = even_shares(5000, 10, generator("a"))
    assert stats.kstest((shares * 10 % 1).numpy(), "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(shares[:-1], shares[1:])[0, 1]) < 0.05, "in no order"


def test_a_deal_depends_on_seed_epoch_and_sample_alone():
    pool, again = LevelPool(3, 10, KEYS), LevelPool(3, 10, KEYS)
    later = pool.deal(1, KEYS)
    first = pool.deal(0, KEYS)
    assert torch.equal(again.deal(0, KEYS[40:44]).video, first.video[40:44]), "in any batch, after any other epoch"
    assert torch.equal(again.deal(1, KEYS[::-1]).audio, later.audio.flip(0))
    assert not torch.equal(first.video, later.video)
    assert not torch.equal(first.video, LevelPool(4, 10, KEYS).deal(0, KEYS).video)
    assert abs(np.corrcoef(first.video, first.audio)[0, 1]) < 0.3, "the sound's level is its own"


@pytest.mark.parametrize("mode", ["legacy", "stretched"])
def test_levels_of_an_epoch_are_evenly_spread_quantiles(mode: str):
    """As many levels between neighbouring deciles of the distribution, which random draws do not give."""
    sampler = NoiseLevelSampler(shifted_logit_mode=mode, uniform_prob=0.0, eps=0.0)
    deciles = sampler.quantile([i / 10 for i in range(1, 10)], 2048)
    shares = LevelPool(3, 10, KEYS).deal(0, KEYS).video
    generators = [generator("noise", key) for key in KEYS]
    if mode == "legacy":
        spread = torch.bucketize(sampler.draw(2048, generators, shares=shares), deciles)
        assert np.bincount(spread, minlength=10).tolist() == [12] * 10
    else:  # the lowest half percent is reflected, the highest tenth of a percent is exactly 1
        spread = torch.bucketize(sampler.draw(2048, generators, shares=shares), deciles)
        assert max(abs(n - 12) for n in np.bincount(spread, minlength=10)) <= 1
    free = torch.bucketize(sampler.draw(2048, generators), deciles)
    assert np.bincount(free, minlength=10).tolist() != [12] * 10
