"""What made a step non-finite: a damaged cache file, or a weight of the base model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor, nn

from musubi_tuner.dataset.batch import SampleKey
from musubi_tuner.dataset.collate import damaged_files
from musubi_tuner.dataset.items import TrainingSet

logger = logging.getLogger(__name__)

_CHUNK = 1 << 22  # values that are looked at together, so that no copy of a weight takes memory
_NAMED = 3


class Culprits:
    """Names each culprit once; nothing is read before a step has failed."""

    def __init__(self, transformer: nn.Module) -> None:
        self._transformer = transformer
        self._damaged: set[Path] = set()
        self._weights_are_known = False

    def name(self, training_set: TrainingSet, keys: Sequence[SampleKey], *, loss_is_finite: bool) -> None:
        """Log what can be found.

        Args:
            training_set, keys: the step's samples; every process looks at its own.
            loss_is_finite: only a gradient is not, for which half precision does without any help from the weights.
        """
        found = damaged_files(training_set, keys)
        for path in found:
            if path not in self._damaged:
                self._damaged.add(path)
                logger.error("%s: holds NaN or infinity, or cannot be read; delete it and cache it again", path)
        if not (found or loss_is_finite or self._weights_are_known):
            self._weights_are_known = True
            self._name_weights()

    def _name_weights(self) -> None:
        wrong = list(non_finite_tensors(self._transformer))
        if wrong:
            names = ", ".join(wrong[:_NAMED]) + (", ..." if len(wrong) > _NAMED else "")
            logger.error(
                "%d tensors of the base model hold NaN or infinity (%s): check the files of --ltx2_checkpoint and "
                "--base_weights, or train with --mixed_precision bf16 where their values are too large for fp16",
                len(wrong),
                names,
            )


def non_finite_tensors(model: nn.Module) -> Iterator[str]:
    """Names of the parameters and buffers with NaN or infinity; of a quantised weight its scale tells."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not _is_finite(tensor.detach()):
            yield name


def _is_finite(tensor: Tensor) -> bool:
    wide = (part.float() if part.element_size() == 1 else part for part in tensor.reshape(-1).split(_CHUNK))
    return all(bool(part.isfinite().all()) for part in wide)
