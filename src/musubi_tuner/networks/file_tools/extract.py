"""A LoRA of the difference of two checkpoints: the best low-rank factors of each weight's change."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from musubi_tuner.common.errors import UserError
from musubi_tuner.common.progress import progress
from musubi_tuner.common.seeding import generator
from musubi_tuner.networks.base_weights import BaseWeights
from musubi_tuner.networks.files.formats import Format
from musubi_tuner.networks.files.hashes import tensor_bytes
from musubi_tuner.networks.files.lora_file import LoraModule, ModuleInfo
from musubi_tuner.networks.files.lora_writer import write_lora
from musubi_tuner.networks.names import known_names

logger = logging.getLogger(__name__)

_OVERSAMPLING = 16
_POWER_STEPS = 4
_LISTED = 3


@dataclass(frozen=True)
class RankRule:
    """How many directions of a change are kept.

    Attributes:
        most: ranks are no larger.
        energy: as few as hold this share of the squared norm; 1 for ``most`` of them.
        ratio: singular values below this share of the largest are dropped.
    """

    most: int
    energy: float = 1.0
    ratio: float = 0.0

    def rank(self, values: Tensor, squared_norm: float) -> int:
        """From the largest singular values, in descending order, and the squared norm of all; at least 1."""
        values = values[: self.most].double()
        count = int((values > self.ratio * values[0]).sum()) if self.ratio else len(values)
        if self.energy < 1:
            reached = values.square().cumsum(0) >= self.energy * squared_norm
            count = min(count, int((~reached).sum()) + 1)
        # Directions of rounding noise beyond the change's own rank add nothing.
        count = min(count, int((values > values[0] * torch.finfo(torch.float32).eps).sum()))
        return max(count, 1)


@dataclass(frozen=True)
class Extracted:
    """What was found.

    Attributes:
        changed, unchanged: weights that a LoRA may adapt.
        inexpressible: other tensors that differ (biases, norms, tables), which a LoRA cannot hold.
        ranks: smallest and largest.
        kept: share of the squared norm of all changes that the LoRA holds.
    """

    changed: int
    unchanged: int
    inexpressible: int
    ranks: tuple[int, int]
    kept: float


def extract_lora(
    base_path: str | os.PathLike[str],
    tuned_path: str | os.PathLike[str],
    targets: Collection[tuple[Path, Format]],
    rule: RankRule,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    exact: bool = False,
) -> Extracted:
    """Write the difference ``tuned - base`` as a LoRA, in each of ``targets``' formats.

    One weight is in memory at a time; factors wait in a temporary file until their sizes are known.

    Args:
        base_path, tuned_path: checkpoints in full precision or FP8, of one model.
        targets: (file, format).
        rule: which ranks.
        dtype: of the factors.
        device: where the decompositions are computed.
        exact: full SVDs instead of randomised ones (Halko et al. 2011), which find the same for what has low rank.

    Raises:
        UserError: the checkpoints do not correspond or do not differ, or a value is not finite. Nothing is written
            then.
    """
    base, tuned = BaseWeights(base_path), BaseWeights(tuned_path)
    modules = _common_modules(base, tuned)
    infos: dict[str, ModuleInfo] = {}
    total = kept = 0.0
    folder = next(iter(targets))[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        spool = _Spool(file)
        for name in progress(modules, desc="extracting", unit="weight"):
            change = _difference(base, tuned, f"{name}.weight", device)
            squared = float(change.square().sum(dtype=torch.float64))
            if not squared:
                continue
            module, held = _decompose(change, rule, squared, name, exact=exact)
            infos[name] = ModuleInfo(module.info.rank, module.info.in_features, module.info.out_features, dtype)
            spool.put(name, module.to(dtype))
            total, kept = total + squared, kept + held
        if not infos:
            raise UserError(f"{tuned.path} does not differ from {base.path} in any of {len(modules)} weights")
        metadata = _metadata(base, tuned, infos)
        for path, fmt in targets:
            write_lora(path, fmt, infos, lambda name: spool.get(name, infos[name]), metadata=metadata)
    ranks = [i.rank for i in infos.values()]
    others = _changed_others(base, tuned, modules)
    return Extracted(len(infos), len(modules) - len(infos), others, (min(ranks), max(ranks)), kept / total)


def low_rank(matrix: Tensor, rank: int, key: str, *, exact: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The largest ``rank`` singular values of [N, K] and a little more, with their vectors: U, S, V^T.

    Args:
        key: of the random numbers, so that a result can be repeated.
    """
    width = rank + _OVERSAMPLING
    if exact or 2 * width >= min(matrix.shape):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u, s, vh
    start = torch.randn(matrix.shape[1], width, generator=generator("extract", key)).to(matrix.device)
    q, _ = torch.linalg.qr(matrix @ start)
    for _ in range(_POWER_STEPS):
        back, _ = torch.linalg.qr(matrix.T @ q)
        q, _ = torch.linalg.qr(matrix @ back)
    u, s, vh = torch.linalg.svd(q.T @ matrix, full_matrices=False)
    return q @ u, s, vh


def _decompose(change: Tensor, rule: RankRule, squared: float, name: str, *, exact: bool) -> tuple[LoraModule, float]:
    """The factors of a change, and the part of its squared norm that they hold."""
    u, s, vh = low_rank(change, rule.most, name, exact=exact)
    rank = rule.rank(s, squared)
    root = s[:rank].sqrt()
    held = float(s[:rank].double().square().sum())
    return LoraModule(root[:, None] * vh[:rank], u[:, :rank] * root), min(held, squared)


class _Spool:
    """Factors of modules in a temporary file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._starts: dict[str, int] = {}

    def put(self, name: str, module: LoraModule) -> None:
        self._starts[name] = self._file.seek(0, os.SEEK_END)
        for tensor in (module.down, module.up):
            self._file.write(tensor_bytes(tensor))

    def get(self, name: str, info: ModuleInfo) -> LoraModule:
        self._file.seek(self._starts[name])
        return LoraModule(
            self._read(info.dtype, (info.rank, info.in_features)),
            self._read(info.dtype, (info.out_features, info.rank)),
        )

    def _read(self, dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
        data = bytearray(self._file.read(dtype.itemsize * shape[0] * shape[1]))
        return torch.frombuffer(data, dtype=dtype).view(shape)


def _common_modules(base: BaseWeights, tuned: BaseWeights) -> list[str]:
    """The linear weights that a LoRA may adapt, which have to be the same ones in both files."""
    known = known_names()
    first, second = ({n: s for n, s in b.weights().items() if n in known} for b in (base, tuned))
    only = sorted(set(first) ^ set(second))
    wrong = [n for n in first if n in second and first[n] != second[n]]
    if only or wrong:
        count, example = (len(only), only[0]) if only else (len(wrong), wrong[0])
        what = "are in one of the files only" if only else "have other sizes"
        raise UserError(
            f"{tuned.path} is no variant of {base.path}: {count} weights {what}, such as {example}; give two "
            "checkpoints of the same version"
        )
    return list(first)


def _difference(base: BaseWeights, tuned: BaseWeights, name: str, device: torch.device | str) -> Tensor:
    """tuned - base of one tensor, in float32 on ``device``."""
    change = tuned.dense(name).to(device) - base.dense(name).to(device)
    if not change.isfinite().all():
        raise UserError(f"{name} holds NaN or infinity in {tuned.path} or {base.path}; the file is broken")
    return change


def _changed_others(base: BaseWeights, tuned: BaseWeights, modules: Collection[str]) -> int:
    """How many tensors differ that a LoRA cannot hold."""
    adapted = {f"{m}.weight" for m in modules}
    names = [n for n in base.keys if n not in adapted and n not in base.stored.companions and n in tuned.keys]
    changed = [n for n in names if base.info(n).shape != tuned.info(n).shape or not base.dense(n).equal(tuned.dense(n))]
    if changed:
        logger.warning(
            "%d tensors differ that a LoRA cannot hold (biases, norms, tables), such as %s; they are left out",
            *(len(changed), ", ".join(changed[:_LISTED])),
        )
    return len(changed)


def _metadata(base: BaseWeights, tuned: BaseWeights, infos: dict[str, ModuleInfo]) -> dict[str, str]:
    ranks = {i.rank for i in infos.values()}
    rank = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    return {
        "ss_network_module": "networks.lora_ltx2",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_extracted_from": tuned.path.name,
        "ss_extracted_base": base.path.name,
    }
