"""How the batches with sound are spread over an epoch.

Where most batches have no sound, a plain shuffle lets the model forget what it learned of sound in between. Each
function here orders the batches of one epoch, all of them, once: it takes the pool of batches with sound and that of
the others, both already shuffled, and a generator that belongs to the epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class AudioQuota:
    """Every window of ``window`` batches holds at least ``batches`` with sound, while they last.

    A window is what one optimizer step trains on: the processes are dealt an epoch's batches in turn, so that is
    ``gradient_accumulation_steps`` batches of each of them, consecutive in the plan. The promise is for the step, whose
    gradients are averaged, and not for each process: so N processes train what one process with N times the
    accumulation trains. Windows start with the epoch; its last one may be smaller, and then holds as many of them as
    go in.
    """

    batches: int
    window: int

    def order(self, audio: Sequence[T], others: Sequence[T], random: torch.Generator) -> list[T]:
        """The batches of an epoch.

        Only the quota is set aside; batches with sound above it are drawn like any others. To hold them back until
        the others are used up would make the quota the most that a step gets, and end each epoch on sound alone.
        """
        count = len(audio) + len(others)
        sizes = [min(self.window, count - first) for first in range(0, count, self.window)]
        reserved, left = [], len(audio)
        for size in sizes:
            reserved.append(min(self.batches, size, left))
            left -= reserved[-1]
        quota = iter(audio)
        windows = [list(islice(quota, number)) for number in reserved]
        rest = iter(shuffled([*quota, *others], random))
        for window, size in zip(windows, sizes, strict=True):
            window.extend(islice(rest, size - len(window)))
        return [batch for window in windows for batch in shuffled(window, random)]


@dataclass(frozen=True)
class AudioProbability:
    """Each batch is one with sound with this probability, as long as there are some of both kinds."""

    probability: float

    def order(self, audio: Sequence[T], others: Sequence[T], random: torch.Generator) -> list[T]:
        """The batches of an epoch."""
        # One of the pools is used up after this many draws at the latest.
        draws = torch.rand(len(audio) + len(others), generator=random, dtype=torch.float64) < self.probability
        pools = {True: list(reversed(audio)), False: list(reversed(others))}
        ordered = []
        for has_sound in draws.tolist():
            if not all(pools.values()):
                break
            ordered.append(pools[has_sound].pop())
        return ordered + pools[True][::-1] + pools[False][::-1]


AudioMixing = AudioQuota | AudioProbability


def shuffled(values: Sequence[T], random: torch.Generator) -> list[T]:
    """``values`` in an order drawn from ``random``."""
    return [values[i] for i in torch.randperm(len(values), generator=random).tolist()]
