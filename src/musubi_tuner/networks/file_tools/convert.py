"""Adapter files from one format to another, tensor by tensor.

Names change, values do not, but for alpha: the formats with lora_A and lora_B hold none, so alpha / r goes into B. What
that takes away is noted (:mod:`.alpha_notes`), so the way back gives the same bits. LyCORIS tensors keep their names
and their alpha.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from musubi_tuner.common.dtypes import dtype_name
from musubi_tuner.common.errors import UserError
from musubi_tuner.common.progress import progress
from musubi_tuner.networks.files.adapter_file import FLOATS, KEPT_PEFT, AdapterFile
from musubi_tuner.networks.files.adapter_keys import ALPHA, DOWN, MAGNITUDE, UP, is_lora
from musubi_tuner.networks.files.alpha_notes import NOTES, AlphaNote, fold, restoring_dtype, write_notes
from musubi_tuner.networks.files.formats import FLAT, SPELLINGS, Format
from musubi_tuner.networks.files.hashes import LEGACY_HASH, MODEL_HASH, TensorSpec, write_safetensors
from musubi_tuner.networks.files.peft_config import PEFT_METADATA

logger = logging.getLogger(__name__)

_KEPT_ALPHA = "musubi_keep_alpha"  # in the metadata: the way back writes alpha

Magnitudes = Callable[[str, Tensor], Tensor]  # (module, magnitude as stored) -> as the target means it


@dataclass(frozen=True)
class Part:
    """A file to write: the modules that it takes, and what it says of itself."""

    path: Path
    holds: Callable[[str], bool] = lambda name: True
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Converted:
    """What was written to one file."""

    path: Path
    modules: int
    ranks: tuple[int, int] | None  # smallest, largest; None: no plain LoRA
    folded: int  # modules whose alpha went into B
    rounded: int  # those of them of which the way back gives the product, not the bits


@dataclass(frozen=True)
class _Out:
    """A tensor to write and how it is made."""

    spec: TensorSpec
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class _Plan:
    """What becomes of one module."""

    outs: tuple[_Out, ...]
    note: AlphaNote | None = None  # what was folded
    plain: bool = True  # nothing was, or nothing is lost by it
    rounded: bool = False


def convert_adapter(
    source: AdapterFile,
    parts: Collection[Part],
    fmt: Format,
    *,
    dtype: torch.dtype | None = None,
    keep_alpha: bool = False,
    magnitudes: Magnitudes | None = None,
) -> list[Converted]:
    """Write an adapter file in another format.

    Args:
        source: the file.
        parts: files to write; each takes the modules that it asks for.
        fmt: of the result.
        dtype: of the factors; ``None`` keeps each as it is, so that nothing is lost. Alphas and magnitudes are always
            kept as they are.
        keep_alpha: write ``.alpha`` also where the format does without; ComfyUI applies it, other readers may not.
        magnitudes: what becomes of DoRA's magnitudes; ``None`` keeps them.

    Raises:
        UserError: the format cannot hold the file, a part is empty, or a value is not finite. Nothing is written then.
    """
    _check_target(source, fmt)
    keep = keep_alpha or (fmt not in FLAT and _KEPT_ALPHA in source.metadata)
    names = list(source.adapters.modules)
    taken = [[n for n in names if part.holds(n)] for part in parts]
    for part, chosen in zip(parts, taken, strict=True):
        if not chosen:
            raise UserError(f"{source.path}: holds nothing for {part.path.name}; convert it as a whole")
    peft = source.peft_text() if fmt == "diffusers" and dtype is None and not keep else None
    express = _Expression(source, fmt, dtype, keep=keep, peft=peft is not None, magnitudes=magnitudes)
    plans = {n: express.plan(n) for n in progress(names, desc="reading", unit="module", leave=False)}
    common = _metadata(source, fmt, peft)
    written: list[Converted] = []
    try:
        for part, chosen in zip(parts, taken, strict=True):
            written.append(_write(source, part, {n: plans[n] for n in chosen}, common, lossless=dtype is None))
    except BaseException:
        for done in written:  # all files or none
            done.path.unlink(missing_ok=True)
        raise
    return written


def _check_target(source: AdapterFile, fmt: Format) -> None:
    others = [n for n in source.adapters.modules if not is_lora(source.roles(n))]
    if others and fmt == "diffusers":
        example = next(iter(source.roles(others[0]).values()))
        raise UserError(
            f"{source.path}: {len(others)} LyCORIS modules, such as {example}; diffusers has no such format. "
            "Use native or comfy"
        )
    if fmt == "comfy" and any("on_input" in source.roles(n) for n in others):
        logger.warning("%s holds IA3 modules, which ComfyUI does not read", source.path)
    inputs = [n for n in source.adapters.modules if source.of_inputs(n)]
    if inputs and fmt == "diffusers":
        raise UserError(
            f"{source.path}: {len(inputs)} DoRA modules have a magnitude for each input (wd_on_output=False), such as "
            f"{source.roles(inputs[0])[MAGNITUDE]}; diffusers has one for each output alone. Use native or comfy"
        )


@dataclass(frozen=True)
class _Expression:
    """How modules are said in a format."""

    source: AdapterFile
    fmt: Format
    dtype: torch.dtype | None
    keep: bool
    peft: bool
    magnitudes: Magnitudes | None

    def plan(self, name: str) -> _Plan:
        roles = self.source.roles(name)
        if not is_lora(roles):
            return _Plan(tuple(self._magnitude(name) if r == MAGNITUDE else self._as_it_is(name, r) for r in roles))
        up, note = self.source.up(name)
        outs = [self._out(name, DOWN, lambda: self.source.read(name, DOWN))]
        if MAGNITUDE in roles:
            outs.append(self._magnitude(name))
        if not (self.fmt in FLAT or self.keep or self.peft):
            return self._folded(name, up, note, outs)
        outs.append(self._out(name, UP, lambda: self.source.up(name)[0], up.dtype))
        # A native file without alpha stays one.
        if not self.peft and (self.keep or note.alpha is not None):
            alpha = float(self.source.rank(name)) if note.alpha is None else note.alpha
            spec = TensorSpec(self._key(name, ALPHA), note.alpha_dtype, ())
            outs.append(_Out(spec, lambda: torch.tensor(alpha, dtype=note.alpha_dtype)))
        return _Plan(tuple(outs))

    def _folded(self, name: str, up: Tensor, note: AlphaNote, outs: list[_Out]) -> _Plan:
        rank = self.source.rank(name)
        exact = restoring_dtype(up, note, rank) if self.dtype is None else self.dtype
        stored = exact or up.dtype
        scale = note.scale(rank)
        outs.append(self._out(name, UP, lambda: fold(self.source.up(name)[0], scale, stored), stored))
        note = replace(note, up_dtype=up.dtype)
        plain = note == AlphaNote(float(rank), torch.float32, stored)
        return _Plan(tuple(outs), note, plain=plain, rounded=exact is None)

    def _magnitude(self, name: str) -> _Out:
        if self.source.of_inputs(name):
            return self._as_it_is(name, MAGNITUDE)
        info = self.source.file.tensors[self.source.roles(name)[MAGNITUDE]]
        rows = torch.Size(info.shape).numel()
        to = (rows,) if self.fmt == "diffusers" else (rows, 1)

        def make() -> Tensor:
            stored = self.source.read(name, MAGNITUDE)
            changed = stored if self.magnitudes is None else self.magnitudes(name, stored.reshape(-1)).to(stored.dtype)
            return changed.reshape(to)

        return _Out(TensorSpec(self._key(name, MAGNITUDE), info.dtype, to), make)

    def _as_it_is(self, name: str, role: str) -> _Out:
        info = self.source.file.tensors[self.source.roles(name)[role]]
        kept = role in (ALPHA, MAGNITUDE) or info.dtype not in FLOATS
        dtype = info.dtype if self.dtype is None or kept else self.dtype
        spec = TensorSpec(self._key(name, role), dtype, info.shape)
        return _Out(spec, lambda: self.source.read(name, role).to(dtype))

    def _out(self, name: str, role: str, make: Callable[[], Tensor], stored: torch.dtype | None = None) -> _Out:
        info = self.source.file.tensors[self.source.roles(name)[role]]
        dtype = self.dtype or stored or info.dtype
        return _Out(TensorSpec(self._key(name, role), dtype, info.shape), lambda: make().to(dtype))

    def _key(self, name: str, role: str) -> str:
        flat = self.fmt in FLAT
        suffixes = {
            DOWN: "lora_down.weight" if flat else "lora_A.weight",
            UP: "lora_up.weight" if flat else "lora_B.weight",
            MAGNITUDE: "lora_magnitude_vector" if self.fmt == "diffusers" else "dora_scale",
        }
        return f"{SPELLINGS[self.fmt](name)}.{suffixes.get(role, role)}"


def _metadata(source: AdapterFile, fmt: Format, peft: str | None) -> dict[str, str]:
    """The source's metadata without what no longer holds, with what the way back needs."""
    stale = (MODEL_HASH, LEGACY_HASH, NOTES, PEFT_METADATA, _KEPT_ALPHA, KEPT_PEFT)
    kept = {k: v for k, v in source.metadata.items() if k not in stale}
    if peft is not None:
        return kept | {PEFT_METADATA: peft}
    own = source.peft_text()
    if own is not None:
        kept[KEPT_PEFT] = own
    dotted_alpha = source.format not in FLAT and any(
        ALPHA in r and is_lora(r) for r in source.adapters.modules.values()
    )
    if fmt in FLAT and (dotted_alpha or _KEPT_ALPHA in source.metadata):
        kept[_KEPT_ALPHA] = "true"
    return kept


def _write(
    source: AdapterFile, part: Part, plans: Mapping[str, _Plan], common: Mapping[str, str], *, lossless: bool
) -> Converted:
    makers = {out.spec.name: out for plan in plans.values() for out in plan.outs}
    notes = {n: p.note for n, p in plans.items() if p.note is not None}
    needed = not all(plan.plain for plan in plans.values())
    metadata = {**common, **part.metadata, **(write_notes(notes) if lossless and needed else {})}
    bar = progress(total=len(makers), desc=part.path.name, unit="tensor", leave=False)

    def produce(key: str) -> Tensor:
        bar.update()
        tensor = makers[key].make()
        if not tensor.float().isfinite().all():
            raise UserError(f"{key} is not finite as {dtype_name(tensor.dtype)}; choose a wider --dtype")
        return tensor

    with bar:
        write_safetensors(part.path, [out.spec for out in makers.values()], produce, {"format": "pt", **metadata})
    ranks = [source.rank(n) for n in plans if is_lora(source.roles(n))]
    folded = sum(n.scale(source.rank(name)) != 1 for name, n in notes.items())
    rounded = sum(p.rounded for p in plans.values())
    return Converted(part.path, len(plans), (min(ranks), max(ranks)) if ranks else None, folded, rounded)
