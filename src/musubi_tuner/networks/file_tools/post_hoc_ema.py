"""The average that a run would have kept, made afterwards from the LoRA files that it saved.

``W = first``, then ``W = beta * W + (1 - beta) * W_i`` for each later file, tensor by tensor in float32.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from musubi_tuner.common.errors import UserError
from musubi_tuner.common.progress import progress
from musubi_tuner.networks.files.adapter_file import FLOATS, AdapterFile
from musubi_tuner.networks.files.alpha_notes import NOTES
from musubi_tuner.networks.files.hashes import LEGACY_HASH, MODEL_HASH, TensorSpec, write_safetensors

logger = logging.getLogger(__name__)

_MOST_SIGMA = 12**-0.5  # above it the power function has no positive exponent


@dataclass(frozen=True)
class Averaged:
    """One file's part in the average."""

    path: Path
    beta: float | None  # None: the start
    share: float  # of the result


def linear_betas(count: int, beta: float, beta2: float | None = None) -> list[float]:
    """For each file after the first: from ``beta`` to ``beta2`` in equal steps, or ``beta`` throughout."""
    merges = count - 1
    last = beta if beta2 is None else beta2
    return [beta + (last - beta) * (i / (merges - 1) if merges > 1 else 0.0) for i in range(merges)]


def power_betas(count: int, sigma_rel: float) -> list[float]:
    """For each file after the first, of a power-function average of relative width ``sigma_rel`` (Karras et al. 2024).

    The file at place t of all (the first is 1) gets ``(1 - 1 / t) ** (gamma + 1)``.

    Raises:
        UserError: no such width.
    """
    gamma = power_exponent(sigma_rel)
    return [(1 - 1 / t) ** (gamma + 1) for t in range(2, count + 1)]


def power_exponent(sigma_rel: float) -> float:
    """The positive root gamma of ``(g + 1) / ((g + 2)^2 (g + 3)) = sigma_rel^2``."""
    if not 0 < sigma_rel < _MOST_SIGMA:
        raise UserError(f"--sigma_rel {sigma_rel}: expected above 0 and below {_MOST_SIGMA:.4f}")
    low, high = 0.0, 1.0 / sigma_rel  # the width falls as gamma grows, and is below 1 / gamma
    for _ in range(200):
        middle = (low + high) / 2
        wide = (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > sigma_rel**2
        low, high = (middle, high) if wide else (low, middle)
    return (low + high) / 2


def shares(betas: Sequence[float]) -> list[float]:
    """How much of each file is in the average; they add up to 1."""
    result = [1.0]
    for beta in betas:
        result = [share * beta for share in result] + [1 - beta]
    return result


def average_loras(paths: Sequence[Path], output: Path, betas: Sequence[float], *, note: str) -> list[Averaged]:
    """Average LoRA (or LyCORIS) files of one run, all in one format.

    One tensor of two files is in memory at a time. The result has the dtypes of the first file and the last one's
    metadata.

    Args:
        note: how, for the metadata.

    Raises:
        UserError: files of different tensors or alphas, another model, or values that are not finite. No file is
            written then.
    """
    files = [AdapterFile(path) for path in paths]
    _check_same(files)
    first = files[0].file
    specs = [TensorSpec(key, info.dtype, info.shape) for key, info in first.tensors.items()]
    stale = (MODEL_HASH, LEGACY_HASH, NOTES)
    metadata = {k: v for k, v in files[-1].metadata.items() if k not in stale}
    metadata |= {"format": "pt", "ss_post_hoc_ema": note, "ss_post_hoc_ema_files": str(len(files))}
    bar = progress(total=len(specs), desc="averaging", unit="tensor")

    def produce(key: str) -> Tensor:
        bar.update()
        if key.endswith(".alpha") or first.tensors[key].dtype not in FLOATS:
            return first.read_one(key)
        return _average(files, key, betas)

    with bar:
        write_safetensors(output, specs, produce, metadata)
    return [Averaged(f.path, b, s) for f, b, s in zip(files, [None, *betas], shares(betas), strict=True)]


def _average(files: Sequence[AdapterFile], key: str, betas: Sequence[float]) -> Tensor:
    dtype = files[0].file.tensors[key].dtype
    average = _finite(files[0], key)
    for file, beta in zip(files[1:], betas, strict=True):
        average.mul_(beta).add_(_finite(file, key), alpha=1 - beta)
    return average.to(dtype)


def _finite(file: AdapterFile, key: str) -> Tensor:
    tensor = file.file.read_one(key, dtype=torch.float32)
    if not tensor.isfinite().all():
        raise UserError(f"{file.path}: {key} holds NaN or infinity; leave the file out")
    return tensor


def _check_same(files: Sequence[AdapterFile]) -> None:
    first = files[0]
    shapes = {key: info.shape for key, info in first.file.tensors.items()}
    alphas = [key for key in shapes if key.endswith(".alpha")]
    for other in files[1:]:
        if other.format != first.format:
            raise UserError(
                f"{other.path} is in the {other.format} format, {first.path} in {first.format}; give the files of one "
                "format, or convert them with ltx2_convert_lora.py"
            )
        theirs = {key: info.shape for key, info in other.file.tensors.items()}
        different = sorted(k for k in {**shapes, **theirs} if shapes.get(k) != theirs.get(k))
        if different:
            raise UserError(
                f"{other.path}: {len(different)} tensors are not those of {first.path}, such as {different[0]}; give "
                "files of one run"
            )
        for key in alphas:
            if not torch.equal(other.file.read_one(key), first.file.read_one(key)):
                raise UserError(f"{other.path}: {key} is another than in {first.path}; give files of one run")
