"""What the micro-batches of an optimizer step add up to, over all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from musubi_tuner.common.devices import upload
from musubi_tuner.diffusion.losses import LossTerm, total

from .distributed import sum_over_processes
from .levels import LEVEL_RANGES, losses_by_range

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


class StepTally:
    """Collects scalars on the device, so that a step waits for it once.

    Args:
        names: of all values that may be added, in an order that all processes share.
        device: of the values.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        # Values and how much each counts: 1, or 0 for the mean over nothing.
        self._values: dict[str, list[Tensor]] = {name: [] for name in names}
        self._counts: dict[str, list[Tensor]] = {name: [] for name in names}
        self._ranges = [torch.zeros(2, len(_RANGES), device=device)]
        self._num_tokens = 0
        self._zero, self._one = torch.zeros((), device=device), torch.ones((), device=device)

    def add(self, name: str, value: Tensor, counts: Tensor | None = None) -> None:
        self._values[name].append(value.detach().to(self._zero))
        self._counts[name].append(self._one if counts is None else counts.to(self._zero))

    def add_batch(self, terms: Mapping[str, LossTerm], sigma: Tensor, num_tokens: int) -> None:
        """The losses of a micro-batch, as ``loss``, by term and by noise level.

        A term that a mask left nothing to learn from is no loss of 0: it does not count.
        """
        self.add("loss", total(terms))
        for name, term in terms.items():
            self.add(name, term.mean(), None if term.valid is None else term.valid.any())
        self._ranges.append(losses_by_range(terms, sigma))
        self._num_tokens += num_tokens

    def over_processes(self) -> StepTotals:
        """Add up over all processes, in one transfer.

        Every process sends and sees the same numbers, also where its own batches lack a modality, and so takes the
        same branch afterwards.
        """
        both = (self._values, self._counts)
        sums, counts = (torch.stack([self._sum(parts) for parts in of_names.values()]) for of_names in both)
        tokens = torch.tensor([[float(self._num_tokens)], [1.0]])
        ranges = torch.stack(self._ranges).sum(dim=0)
        parts = [torch.stack([sums, counts]), ranges, upload(tokens, sums.device)]
        rows = sum_over_processes(torch.cat(parts, dim=1)).tolist()
        names = [*self._values, *_RANGES, _TOKENS]
        return StepTotals(*(dict(zip(names, row, strict=True)) for row in rows))

    def _sum(self, parts: list[Tensor]) -> Tensor:
        return torch.stack([self._zero, *parts]).sum()
