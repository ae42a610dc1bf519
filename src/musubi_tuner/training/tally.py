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
        self._values: dict[str, list[Tensor]] = {name: [] for name in names}
        self._ranges = [torch.zeros(2, len(_RANGES), device=device)]
        self._num_tokens = 0
        self._zero = torch.zeros((), device=device)

    def add(self, name: str, value: Tensor) -> None:
        self._values[name].append(value.detach().to(self._zero))

    def add_batch(self, terms: Mapping[str, LossTerm], sigma: Tensor, num_tokens: int) -> None:
        """The losses of a micro-batch, as ``loss``, by term and by noise level."""
        self.add("loss", total(terms))
        for name, term in terms.items():
            self.add(name, term.mean())
        self._ranges.append(losses_by_range(terms, sigma))
        self._num_tokens += num_tokens

    def over_processes(self) -> StepTotals:
        """Add up over all processes, in one transfer.

        Every process sends and sees the same numbers, also where its own batches lack a modality, and so takes the
        same branch afterwards.
        """
        sums = torch.stack([torch.stack([self._zero, *values]).sum() for values in self._values.values()])
        counts = torch.tensor([float(len(values)) for values in self._values.values()])
        tokens = torch.tensor([[float(self._num_tokens)], [1.0]])
        parts = [
            torch.stack([sums, upload(counts, sums.device)]),
            torch.stack(self._ranges).sum(dim=0),
            upload(tokens, sums.device),
        ]
        rows = sum_over_processes(torch.cat(parts, dim=1)).tolist()
        names = [*self._values, *_RANGES, _TOKENS]
        return StepTotals(*(dict(zip(names, row, strict=True)) for row in rows))
