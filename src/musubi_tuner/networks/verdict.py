"""What a LoRA changes, and whether a file of it holds that: the check before a file gets its name."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from musubi_tuner.common.errors import UserError

from .files.lora_file import LoraFile, LoraModule
from .files.lora_reader import LoraReader
from .targets import modality_of

VERDICT = "ss_verdict"  # its key in the metadata

_STREAMS = ("video", "audio", "cross")
# Rounding to bfloat16 moves an element by at most 0.4 %, and their common norm by far less.
_RELATIVE = 0.02


@dataclass(frozen=True)
class StreamChange:
    """The deltas of one stream."""

    modules: int
    unchanged: int  # those whose delta is exactly zero
    norm: float  # Frobenius norm of all of them together


@dataclass(frozen=True)
class Verdict:
    """What a LoRA of finite weights changes, by stream: video, audio, cross (attention between them)."""

    streams: Mapping[str, StreamChange]

    @property
    def modules(self) -> int:
        return sum(s.modules for s in self.streams.values())

    def untouched(self, wanted: Iterable[str]) -> list[str]:
        """Those of the ``wanted`` streams that the LoRA leaves as they were."""
        return [name for name in wanted if name not in self.streams or self.streams[name].norm == 0]

    @property
    def exploded(self) -> list[str]:
        """Streams whose deltas are too large for float32, although every weight is finite."""
        return [name for name, s in self.streams.items() if not s.norm <= torch.finfo(torch.float32).max]

    def to_json(self) -> str:
        """For the metadata."""
        streams = {
            name: {"modules": s.modules, "unchanged": s.unchanged, "norm": float(f"{s.norm:.6g}")}
            for name, s in self.streams.items()
        }
        return json.dumps({"modules": self.modules, "finite": True, "streams": streams})

    def __str__(self) -> str:
        parts = []
        for name, s in self.streams.items():
            still = f", {s.unchanged} unchanged" if s.unchanged else ""
            parts.append(f"{name} {s.norm:.4g} ({s.modules} modules{still})")
        return "change " + ", ".join(parts)


@torch.no_grad()
def measure(modules: Iterable[tuple[str, LoraModule]]) -> Verdict:
    """The verdict on (canonical name, factors); no delta is formed, and one module at a time is looked at.

    ``|up @ down|^2`` is the sum over the elementwise product of two [r, r] matrices.
    """
    names, scales, values = [], [], []
    for name, module in modules:
        up, down = module.up.float(), module.down.float()  # [N, r], [r, K]
        squared = ((up.T @ up).double() * (down @ down.T).double()).sum()
        changed = (up.any() & down.any()).double()
        names.append(name)
        scales.append(module.info.scale)
        values.append(torch.stack([squared, changed]))
    numbers = torch.stack(values).tolist()  # one transfer
    streams: dict[str, StreamChange] = {}
    for stream in _STREAMS:
        of_stream = [i for i, name in enumerate(names) if modality_of(name) == stream]
        if of_stream:
            squares = [scales[i] ** 2 * max(numbers[i][0], 0.0) for i in of_stream]
            unchanged = sum(numbers[i][1] == 0 for i in of_stream)
            streams[stream] = StreamChange(len(of_stream), unchanged, math.sqrt(sum(squares)))
    return Verdict(streams)


@torch.no_grad()
def first_non_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds NaN or infinity."""
    named = [(name, t) for name, t in tensors if t.is_floating_point()]
    if not named:
        return None
    finite = torch.stack([t.isfinite().all() for _, t in named]).tolist()  # one transfer
    return next((name for (name, _), ok in zip(named, finite, strict=True) if not ok), None)


def check_file(path: Path, lora: LoraFile, verdict: Verdict) -> None:
    """Read a written file, of any format, and compare it with the LoRA that it was made of.

    Raises:
        UserError: it cannot be read, a module is missing, foreign or of another size, a value is not finite, or its
            deltas have another norm.
    """
    reader = LoraReader(path)
    if reader.ignored:
        raise UserError(f"{path}: {reader.ignored[0]} belongs to no module of the network")
    expected = {name: _sizes(module) for name, module in lora.modules.items()}
    found = {name: (i.rank, i.in_features, i.out_features) for name, i in reader.infos.items()}
    different = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if different:
        raise UserError(f"{path}: {len(different)} modules differ from the network's, such as {different[0]}")
    written = measure((name, reader.read(name)) for name in reader.infos)
    for name, stream in verdict.streams.items():
        norm = written.streams[name].norm
        if abs(norm - stream.norm) > _RELATIVE * stream.norm + _rounded_away(name, reader):
            raise UserError(f"{path}: the {name} modules change by {norm:.4g}, those in training by {stream.norm:.4g}")


def _sizes(module: LoraModule) -> tuple[int, int, int]:
    return module.info.rank, module.info.in_features, module.info.out_features


def _rounded_away(stream: str, reader: LoraReader) -> float:
    """How much norm may vanish where factors are below the smallest number of the file's dtype (float16)."""
    infos = [info for name, info in reader.infos.items() if modality_of(name) == stream]
    smallest = max(torch.finfo(info.dtype).smallest_normal * torch.finfo(info.dtype).eps for info in infos)
    return 2 * smallest * math.sqrt(sum(info.out_features * info.rank**2 for info in infos))
