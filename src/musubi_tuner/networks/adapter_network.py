"""What networks have in common, whatever their modules compute: attaching, strength, reports, files."""

from __future__ import annotations

import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from musubi_tuner.common.errors import UserError

from .attached import AttachedLinear, Switch
from .files.formats import Format
from .names import NATIVE_PREFIX, flat_name, in_transformer
from .network_args import NetworkArgs
from .targets import modality_of
from .verdict import Verdict

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """Canonical module names of a weights file and a network, compared."""

    matched: tuple[str, ...]
    missing: tuple[str, ...]  # in the network, not in the file
    unexpected: tuple[str, ...]  # in the file, not in the network

    def __str__(self) -> str:
        text = f"{len(self.matched)} modules loaded"
        for label, names in (("missing in the file", self.missing), ("not in the network", self.unexpected)):
            if names:
                text += f", {len(names)} {label} (such as {names[0]})"
        return text


@dataclass(frozen=True)
class ModalityCount:
    modules: int = 0
    params: int = 0


class AdapterNetwork(nn.Module, ABC):
    """Changes of Linear layers of a transformer, held outside of it.

    Children are named as in a native file (``lora_unet_<flat>``), so ``state_dict()`` is one. All on CPU in
    float32 at first; move it with ``to``.

    Attributes:
        modules_by_name: dotted path in the transformer -> what adapts that layer.
        args: the parsed ``--network_args`` it was made with.
        module_name: what makes such a network, as ``--network_module`` and files name it.
    """

    module_name: ClassVar[str]

    def __init__(self, modules: Mapping[str, AttachedLinear], switch: Switch, args: NetworkArgs | None = None) -> None:
        super().__init__()
        self.modules_by_name: dict[str, Any] = dict(modules)
        self.args = args or NetworkArgs()
        self._switch = switch
        self._multiplier = 1.0
        if self.args.conv_dim is not None or self.args.conv_alpha is not None:
            logger.warning("--network_args conv_dim, conv_alpha: LTX-2's blocks hold no convolutions; ignored")
        for name, module in modules.items():
            self.add_module(NATIVE_PREFIX + flat_name(name), module)

    # --- attaching ---

    def apply_to(self, transformer: nn.Module) -> None:
        """Patch the forward of every target Linear of ``transformer`` and freeze the transformer."""
        transformer.requires_grad_(False)
        for name, module in self.modules_by_name.items():
            module.attach(transformer.get_submodule(name))

    def detach(self) -> None:
        """Undo :meth:`apply_to`."""
        for module in self.modules_by_name.values():
            module.detach()

    @property
    def draws_random(self) -> bool:
        """Whether its modules drop something in training."""
        return any(m.dropout or m.rank_dropout or m.module_dropout for m in self.modules_by_name.values())

    # --- strength ---

    @property
    def multiplier(self) -> float:
        """Factor on all deltas; 0 skips them, which leaves the base bit for bit."""
        return self._multiplier

    @multiplier.setter
    def multiplier(self, value: float) -> None:
        self._multiplier = value
        self._switch.on, self._switch.as_trained = value != 0, value == 1
        for module in self.modules_by_name.values():
            if (value != 0 or module.start_down is not None) and module.multiplier != value:
                module.set_multiplier(value)

    @contextmanager
    def gain(self, value: float) -> Iterator[AdapterNetwork]:
        """Run a block with another multiplier; ``gain(0.0)`` is the base model.

        A backward pass that recomputes activations (gradient checkpointing) has to run inside the block too.
        """
        previous = self.multiplier
        self.multiplier = value
        try:
            yield self
        finally:
            self.multiplier = previous

    @abstractmethod
    def apply_max_norm_regularization(self, max_norm: float, device: torch.device) -> tuple[int, float, float]:
        """Scale deltas of a larger Frobenius norm down to ``max_norm``.

        Returns:
            How many were scaled, the mean and the largest norm afterwards.
        """

    # --- files ---

    @abstractmethod
    def load_weights(self, file: str | os.PathLike[str]) -> LoadReport:
        """Fill the parameters from a file."""

    @abstractmethod
    def verdict(self) -> Verdict:
        """What the weights, which have to be finite, change."""

    @abstractmethod
    def save_checked(
        self,
        path: str | os.PathLike[str],
        verdict: Verdict,
        dtype: torch.dtype,
        metadata: Mapping[str, str],
        *,
        fmt: Format = "native",
    ) -> Path:
        """Write a file, which is read back and compared before it gets its name."""

    def metadata(self) -> dict[str, str]:
        """``ss_network_*`` entries that describe this network."""
        modules = self.modules_by_name.values()
        ranks, alphas = (set(column) for column in zip(*(m.stored_size for m in modules), strict=True))
        return {
            "ss_network_module": self.module_name,
            "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
            "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
            "ss_network_dropout": f"{max(m.dropout for m in modules):g}",
            "ss_network_args": json.dumps(self.described_args()),
        }

    def described_args(self) -> dict[str, Any]:
        """What ``--network_args`` would have to say to make such a network: whatever is not a default."""
        return self.args.described()

    # --- reporting ---

    def summary(self) -> dict[str, ModalityCount]:
        """Adapted modules and their parameters per stream: video, audio, cross (cross-modal attention)."""
        counts = {"video": ModalityCount(), "audio": ModalityCount(), "cross": ModalityCount()}
        for name, module in self.modules_by_name.items():
            key, params = modality_of(name), sum(p.numel() for p in module.parameters())
            counts[key] = ModalityCount(counts[key].modules + 1, counts[key].params + params)
        return counts

    def describe_counts(self) -> str:
        """Modules and parameters, of all and by stream."""
        parts = [f"{k} {c.modules} ({c.params / 1e6:.2f}M)" for k, c in self.summary().items() if c.modules]
        params = sum(p.numel() for p in self.parameters())
        return f"{len(self.modules_by_name)} modules, {params / 1e6:.2f}M parameters: {', '.join(parts)}"

    @abstractmethod
    def describe(self) -> str:
        """One line for the log."""


def compare_modules(own: Collection[str], given: Iterable[str], source: str) -> LoadReport:
    """Which modules of a file a network has; warns where one has more than the other.

    Raises:
        UserError: they do not correspond; modules of the audio branch may be missing on either side.
    """
    given = dict.fromkeys(given)
    report = LoadReport(
        matched=tuple(n for n in own if n in given),
        missing=tuple(n for n in own if n not in given),
        unexpected=tuple(n for n in given if n not in own),
    )
    wrong = [n for n in (*report.missing, *report.unexpected) if "audio_" not in n and in_transformer(n)]
    if wrong or not report.matched:
        raise UserError(
            f"{source}: does not fit the network: {report}; use the target preset and patterns it was trained with"
        )
    if report.missing or report.unexpected:
        logger.warning("%s: %s", source, report)
    return report


def adapted_layers(names: Collection[str], transformer: nn.Module, source: str) -> dict[str, nn.Linear]:
    """The layers of ``transformer`` that a file's modules adapt; those that it lacks are left out with a warning.

    Raises:
        UserError: see :func:`absent_modules`.
    """
    available = {name: m for name, m in transformer.named_modules() if isinstance(m, nn.Linear)}
    absent = absent_modules(names, available, source)
    if absent:
        logger.warning(
            "%s: %d of %d modules are left out, since the mode builds no such part of the transformer (such as %s)",
            *(source, len(absent), len(names), absent[0]),
        )
    return {name: available[name] for name in names if name in available}


def absent_modules(names: Collection[str], available: Container[str], source: str) -> list[str]:
    """Those of a LoRA's modules that a transformer lacks, where that is no mistake: audio and connectors.

    Raises:
        UserError: others are missing, or all.
    """
    absent = [n for n in names if n not in available]
    wrong = [n for n in absent if "audio_" not in n and in_transformer(n)]
    if wrong or len(absent) == len(names):
        reason = "it belongs to another model or version" if wrong else "the mode builds no part that it adapts"
        raise UserError(
            f"{source}: {len(wrong or absent)} of its {len(names)} modules are not in the transformer, "
            f"such as {(wrong or absent)[0]}; {reason}"
        )
    return absent
