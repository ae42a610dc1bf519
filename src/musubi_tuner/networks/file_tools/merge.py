"""Several LoRA files into one.

``concat`` stacks the factors: ``A = [A_1; A_2; ...]``, ``B = [s_1 B_1, s_2 B_2, ...]`` with ``s_i`` =
multiplier * alpha / r, so the delta is exactly the sum of the deltas and the rank the sum of the ranks.
``orthogonal`` removes from each of two LoRAs the input directions in which the other is strongest, then
refactors the sum.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from musubi_tuner.common.dtypes import dtype_name
from musubi_tuner.common.errors import UserError
from musubi_tuner.common.progress import progress
from musubi_tuner.networks.files.formats import Format
from musubi_tuner.networks.files.lora_file import LoraModule, ModuleInfo
from musubi_tuner.networks.files.lora_reader import LoraReader, refuse_dora
from musubi_tuner.networks.files.lora_writer import write_lora

logger = logging.getLogger(__name__)

RankMode = Literal["sum", "max", "min"]
_RANK_OF: dict[str, Callable[[Iterable[int]], int]] = {"sum": sum, "max": max, "min": min}

# What every source has to agree on for the result to be described by it.
_VERSION = "ss_ltx_version"
_COMMON_METADATA = ("ss_base_model_version", _VERSION, "modelspec.architecture")
_REFERENCE_METADATA = ("ss_reference_downscale_factor", "reference_downscale_factor")


@dataclass(frozen=True)
class MergeMethod:
    """How the parts of one module become one.

    ``rank`` tells the rank of the result from the ranks of the parts, ``combine`` makes it from the parts.
    """

    name: str
    rank: Callable[[Sequence[ModuleInfo]], int]
    combine: Callable[[Sequence[LoraModule]], LoraModule]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class FileSummary:
    """A row of the table printed after merging."""

    name: str
    format: str
    multiplier: float | None
    modules: int
    ranks: tuple[int, int]  # smallest, largest
    dtype: str


# --- methods ---


def concat_method() -> MergeMethod:
    """Stack the factors; exact."""
    return MergeMethod("concat", lambda infos: sum(i.rank for i in infos), _concat, {})


def orthogonal_method(k_fraction: float = 0.5, rank_mode: RankMode = "sum") -> MergeMethod:
    """Project two LoRAs off each other, then refactor by SVD. A module of one file only is kept as it is.

    Args:
        k_fraction: share in [0, 1] of the other's directions (its rank) to remove, strongest first.
        rank_mode: rank of the result as a function of the two ranks.
    """

    def rank(infos: Sequence[ModuleInfo]) -> int:
        if len(infos) == 1:
            return infos[0].rank
        return min(_RANK_OF[rank_mode](i.rank for i in infos), infos[0].in_features, infos[0].out_features)

    def combine(parts: Sequence[LoraModule]) -> LoraModule:
        if len(parts) == 1:
            return parts[0]
        return _orthogonal(parts[0], parts[1], k_fraction, rank([p.info for p in parts]))

    metadata = {"ss_merge_k_fraction": f"{k_fraction:g}", "ss_merge_rank_mode": rank_mode}
    return MergeMethod("orthogonal", rank, combine, metadata)


def _concat(parts: Sequence[LoraModule]) -> LoraModule:
    """Folded parts to one module with A [sum r, K] and B [N, sum r]."""
    return LoraModule(torch.cat([p.down.float() for p in parts]), torch.cat([p.up.float() for p in parts], dim=1))


def _orthogonal(first: LoraModule, second: LoraModule, k_fraction: float, rank: int) -> LoraModule:
    """Remove from each the other's strongest input directions; the best rank-``rank`` factors of the sum."""
    basis = [_top_directions(m, round(k_fraction * m.info.rank)) for m in (first, second)]  # [K, k]
    downs = [
        m.down.float() - (m.down.float() @ other) @ other.T for m, other in ((first, basis[1]), (second, basis[0]))
    ]
    down, up = torch.cat(downs), torch.cat([first.up.float(), second.up.float()], dim=1)
    # SVD of up @ down through its r x r core: U S V^T = Q_up (R_up R_down^T) Q_down^T.
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    root = s[:rank].sqrt()
    return LoraModule((root[:, None] * vh[:rank]) @ q_down.T, (q_up @ u[:, :rank]) * root)


def _top_directions(module: LoraModule, count: int) -> Tensor:
    """The ``count`` strongest right singular vectors of ``up @ down``, [K, count], without forming it."""
    q_down, r_down = torch.linalg.qr(module.down.float().T)
    _, r_up = torch.linalg.qr(module.up.float())
    _, _, vh = torch.linalg.svd(r_up @ r_down.T)
    return q_down @ vh[:count].T


# --- files ---


def broadcast_multipliers(multipliers: Sequence[float], count: int) -> tuple[float, ...]:
    """One multiplier per file: none given is 1.0 for all, one given is for all.

    Raises:
        UserError: another number of them.
    """
    if len(multipliers) in (0, 1):
        return tuple(multipliers or (1.0,)) * count
    if len(multipliers) != count:
        raise UserError(f"--lora_multiplier: {len(multipliers)} values for {count} files; give one each, one or none")
    return tuple(multipliers)


def merge_loras(
    paths: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    method: MergeMethod,
    *,
    multipliers: Sequence[float] = (),
    dtype: torch.dtype | None = None,
    emit_alpha: bool = False,
) -> list[FileSummary]:
    """Merge LoRA files of any formats, ranks and targets; the result has the format of the first.

    Only one module is in memory at a time. Modules that only some files have keep the parts there are.

    Args:
        multipliers: see :func:`broadcast_multipliers`; a file with 0 takes no part.
        dtype: of the result; ``None`` takes the widest of the inputs, at most float32.
        emit_alpha: write alpha = r also where the format does without.

    Returns:
        One summary per input, then that of the result.

    Raises:
        UserError: unreadable input, layers of different sizes, nothing to merge, or an overflow. No file is
            written then.
    """
    multipliers = broadcast_multipliers(multipliers, len(paths))
    _check_paths(paths, output)
    readers = [LoraReader(p) for p in paths]
    refuse_dora(readers)
    used = [(r, m) for r, m in zip(readers, multipliers, strict=True) if m != 0]
    if not used:
        raise UserError("--lora_multiplier: all are 0; there is nothing to merge")
    sources = _sources(used)
    dtype = dtype or _widest(i.dtype for r, _ in used for i in r.infos.values())
    infos = {name: _merged_info(name, parts, method, dtype) for name, parts in sources.items()}
    metadata = _metadata(readers, multipliers, method, infos)
    bar = progress(total=len(infos), desc="merging", unit="module")

    def produce(name: str) -> LoraModule:
        bar.update()
        return method.combine([r.read(name).folded(m) for r, m in sources[name]]).to(dtype)

    fmt = readers[0].format
    with bar:
        write_lora(output, fmt, infos, produce, metadata=metadata, emit_alpha=emit_alpha)
    rows = [_summary(r.path, r.format, m, r.infos) for r, m in zip(readers, multipliers, strict=True)]
    return [*rows, _summary(Path(output), fmt, None, infos)]


_Source = list[tuple[LoraReader, float]]


def _check_paths(paths: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]) -> None:
    target = Path(output)
    if target.is_dir():
        raise UserError(f"--save_merged_lora {target}: is a folder, expected the name of a file")
    if target.suffix != ".safetensors":
        raise UserError(f"--save_merged_lora {target}: the name has to end in .safetensors")
    if any(target.resolve() == Path(p).resolve() for p in paths):
        raise UserError(f"--save_merged_lora {target}: this is one of the inputs; choose another name")


def _sources(used: Sequence[tuple[LoraReader, float]]) -> dict[str, _Source]:
    """Per module, the files that have it; sizes are checked."""
    sources: dict[str, _Source] = {}
    for reader, multiplier in used:
        for name, info in reader.infos.items():
            parts = sources.setdefault(name, [])
            if parts:
                first = parts[0][0]
                expected = first.infos[name]
                if (info.in_features, info.out_features) != (expected.in_features, expected.out_features):
                    raise UserError(
                        f"{name}: {reader.path.name} is made for a layer of {info.in_features} -> "
                        f"{info.out_features} features, {first.path.name} for {expected.in_features} -> "
                        f"{expected.out_features}; they belong to different models"
                    )
            parts.append((reader, multiplier))
    return sources


def _merged_info(name: str, parts: _Source, method: MergeMethod, dtype: torch.dtype) -> ModuleInfo:
    infos = [reader.infos[name] for reader, _ in parts]
    return ModuleInfo(method.rank(infos), infos[0].in_features, infos[0].out_features, dtype)


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    first, *rest = set(dtypes)
    for dtype in rest:
        first = torch.promote_types(first, dtype)
    return torch.float32 if first == torch.float64 else first


def _metadata(
    readers: Sequence[LoraReader],
    multipliers: Sequence[float],
    method: MergeMethod,
    infos: Mapping[str, ModuleInfo],
) -> dict[str, str]:
    """How the result was made, and what all sources agree on."""
    ranks = {i.rank for i in infos.values()}
    rank = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    metadata = {
        "ss_network_module": "networks.lora_ltx2",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_merge_method": method.name,
        "ss_merge_sources": json.dumps([r.path.name for r in readers]),
        "ss_merge_multipliers": json.dumps(list(multipliers)),
        **method.metadata,
    }
    for key in (*_COMMON_METADATA, *_REFERENCE_METADATA):
        values = {r.metadata.get(key) for r in readers}
        if len(values) == 1 and None not in values:
            metadata[key] = values.pop()
        elif len(values) > 1 and key in _REFERENCE_METADATA:
            logger.warning("the inputs differ in %s; the merged file names none", key)
    versions = sorted({r.metadata[_VERSION] for r in readers if _VERSION in r.metadata})
    if len(versions) > 1:
        logger.warning("the inputs were trained on different versions of LTX-2: %s", ", ".join(versions))
    return metadata


def _summary(path: Path, fmt: Format, multiplier: float | None, infos: Mapping[str, ModuleInfo]) -> FileSummary:
    ranks = [i.rank for i in infos.values()]
    dtype = dtype_name(_widest(i.dtype for i in infos.values()))
    return FileSummary(path.name, fmt, multiplier, len(infos), (min(ranks), max(ranks)), dtype)
