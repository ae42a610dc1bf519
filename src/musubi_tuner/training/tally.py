"""What the micro-batches of an optimizer step add up to, over all processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from musubi_tuner.diffusion.losses import LossTerm

from .distributed import sum_over_processes
from .levels import LEVEL_RANGES, level_range

_RANGES = tuple(f"sigma_{name}" for name in LEVEL_RANGES)
_TOKENS = "tokens"


@dataclass(frozen=True)
class StepTotals:
    """Sums and counts by name, the same on every process."""

    sums: Mapping[str, float]
    counts: Mapping[str, float]

    def means(self, names: Sequence[str]) -> dict[str, float]:
        """Means of those of ``names`` that occurred."""
        return {name: self.sums[name] / self.counts[name] for name in names if self.counts[name]}

    @property
    def loss_by_range(self) -> dict[str, float]:
        """Mean loss of the samples in each range of noise levels that had any."""
        return self.means(_RANGES)

    @property
    def num_tokens(self) -> int:
        return round(self.sums[_TOKENS])


@dataclass(frozen=True)
class _Term:
    """What the host knows of a term of a micro-batch."""

    name: str
    weight: float
    size: int  # of its values, and of the mask over them
    masked: bool


@dataclass(frozen=True)
class _Batch:
    size: int
    terms: tuple[_Term, ...]


class StepTally:
    """Collects numbers on the device, so that a step waits for it once; what is made of them is made on the host.

    Args:
        names: of all values that may be added, in an order that all processes share.
        device: of the values.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._device = device
        self._collected: list[Tensor] = []
        self._contents: list[str | _Batch] = []  # whose the collected numbers are
        self._sums = dict.fromkeys((*names, *_RANGES, _TOKENS), 0.0)
        self._counts = dict.fromkeys(self._sums, 0.0)

    def add(self, name: str, value: Tensor) -> None:
        """One number."""
        self._collect(name, [value])

    def add_batch(self, loss: Tensor, terms: Mapping[str, LossTerm], sigma: Tensor, num_tokens: int) -> None:
        """The losses of a micro-batch, as ``loss``, by term and by noise level.

        A term that a mask left nothing to learn from is no loss of 0: it does not count.

        Args:
            loss: what the terms come to.
            sigma: [B] noise levels.
        """
        parts = [part for term in terms.values() for part in (term.value, term.valid) if part is not None]
        known = (_Term(name, t.weight, t.value.numel(), t.valid is not None) for name, t in terms.items())
        self._collect(_Batch(len(sigma), tuple(known)), [loss, sigma, *parts])
        self._count(_TOKENS, num_tokens)

    def over_processes(self) -> StepTotals:
        """Add up over all processes, in one transfer.

        Every process sends and sees the same numbers, also where its own batches lack a modality, and so takes the
        same branch afterwards.
        """
        numbers = iter(torch.cat(self._collected).tolist() if self._collected else ())
        for content in self._contents:
            if isinstance(content, _Batch):
                self._count_batch(content, numbers)
            else:
                self._count(content, next(numbers))
        table = torch.tensor([[*self._sums.values()], [*self._counts.values()]], dtype=torch.float64)
        rows = sum_over_processes(table, self._device).tolist()
        return StepTotals(*(dict(zip(self._sums, row, strict=True)) for row in rows))

    def _collect(self, content: str | _Batch, values: Sequence[Tensor]) -> None:
        self._collected += [value.detach().reshape(-1).to(self._device, torch.float32) for value in values]
        self._contents.append(content)

    def _count(self, name: str, value: float) -> None:
        self._sums[name] += value
        self._counts[name] += 1

    def _count_batch(self, batch: _Batch, numbers: Iterator[float]) -> None:
        def take(count: int) -> list[float]:
            return list(itertools.islice(numbers, count))

        self._count("loss", *take(1))
        sigma = take(batch.size)
        losses, learning = [0.0] * batch.size, [False] * batch.size
        for term in batch.terms:
            values = take(term.size)
            valid = take(term.size) if term.masked else [1.0] * term.size
            if any(valid):
                self._count(term.name, sum(v * w for v, w in zip(values, valid, strict=True)) / sum(valid))
            each = batch.size // term.size  # a term of one number is every sample's
            losses = [a + term.weight * v * w for a, v, w in zip(losses, values * each, valid * each, strict=True)]
            learning = [a or bool(w) for a, w in zip(learning, valid * each, strict=True)]
        for level, loss, learns in zip(sigma, losses, learning, strict=True):
            if learns:
                self._count(_RANGES[level_range(level)], loss)
