"""Noise levels that are spread evenly over an epoch (``--num_timestep_buckets``)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from musubi_tuner.common.av import AV
from musubi_tuner.common.seeding import generator
from musubi_tuner.dataset.batch import SampleKey


class LevelPool:
    """Deals each sample of an epoch a share in [0, 1) of the distribution of levels.

    [0, 1) is cut into ``num_buckets`` equal parts, and over an epoch every part gets as many samples, up to rounding.
    The sound has shares of its own, which matter where it has its own level.

    The deal depends on the seed, the epoch and the samples alone, so it is the same on every process and after
    resuming, whatever batch a sample is in.
    """

    def __init__(self, seed: int, num_buckets: int, samples: Sequence[SampleKey]) -> None:
        self._places = {sample: place for place, sample in enumerate(samples)}
        self._shares = lru_cache(maxsize=2)(  # both modalities of an epoch
            lambda purpose, epoch: even_shares(len(samples), num_buckets, generator(seed, purpose, epoch))
        )

    def deal(self, epoch: int, keys: Sequence[SampleKey]) -> AV[Tensor]:
        """Shares [B], float64, for the levels of the video and the sound."""
        places = [self._places[key] for key in keys]
        return AV(
            video=self._shares("timestep buckets", epoch)[places],
            audio=self._shares("audio timestep buckets", epoch)[places],
        )


def even_shares(count: int, num_buckets: int, random: torch.Generator) -> Tensor:
    """``count`` numbers in [0, 1), float64, in random order.

    As many from each of ``num_buckets`` equal parts, rounded up; then shuffled, and what is too much left out.
    """
    each = -(-count // num_buckets)
    lows = torch.arange(num_buckets, dtype=torch.float64).repeat_interleave(each)
    within = torch.rand(len(lows), generator=random, dtype=torch.float64)
    order = torch.randperm(len(lows), generator=random)
    return ((lows + within) / num_buckets)[order][:count]
