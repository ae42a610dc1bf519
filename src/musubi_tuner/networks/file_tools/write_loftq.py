"""Writing files of LoftQ factors, and the NF4 checkpoints that they are made with."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from musubi_tuner.common.atomic import atomic_path
from musubi_tuner.common.errors import UserError
from musubi_tuner.common.progress import bytes_progress
from musubi_tuner.common.safetensors_io import SafetensorsFile, StreamedFile, streamed_file, write_streamed
from musubi_tuner.config.loftq_names import loftq_path
from musubi_tuner.models.ltx2.quantize_file import Alternation, quantize_file, weights_to_quantise
from musubi_tuner.networks.files.loftq_factors import (
    BASE_KEY,
    COUNT_KEY,
    DOWN,
    ITERATIONS_KEY,
    RANK_KEY,
    TARGETS_KEY,
    UP,
    companions,
    factor_prefix,
    hash_rows,
)
from musubi_tuner.networks.loftq import check_rank
from musubi_tuner.networks.targets import select_targets
from musubi_tuner.quantization.loftq import Factors, quantize_with_factors
from musubi_tuner.quantization.packed import Method, Nf4, Packed
from musubi_tuner.quantization.stored import NF4_BLOCK_KEY, OwnBase

logger = logging.getLogger(__name__)

Infos = dict[str, tuple[torch.dtype, tuple[int, ...]]]

_UNKNOWN_HASH = "0" * 64


def write_loftq(source: Path, target: Path, *, rank: int, block_size: int, device: torch.device | str) -> Path:
    """Write the factors for the plain NF4 weights of ``source`` beside ``target``, their file; the path.

    Host memory holds one weight and its factors at a time.

    Raises:
        UserError: ``source`` cannot be quantised, or has a weight that is too small for the rank.
    """
    file = SafetensorsFile(source)
    names = {key: name for name, key in weights_to_quantise(file, Nf4(block_size)).items()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        sizes = {key: file.tensors[key].nbytes for key in names}
        for key, weight in bytes_progress(file.read(names), sizes, desc="LoftQ"):
            factors = _plain_factors(weight.to(device), rank, block_size, names[key])
            yield factor_prefix(names[key]) + DOWN, factors.down
            yield factor_prefix(names[key]) + UP, factors.up

    infos = _factor_infos({name: file.tensors[key].shape for key, name in names.items()}, rank)
    made = _description(rank, 1, block_size, len(names))
    path = loftq_path(target, rank)
    base = hash_rows(_first_rows(file, names, block_size))
    write_streamed(path, infos, tensors(), {**made, BASE_KEY: base})
    return path


def write_own_base(
    source: Path,
    target: Path,
    *,
    rank: int,
    iterations: int,
    block_size: int,
    preset: str,
    device: torch.device | str,
) -> tuple[Path, int]:
    """Write ``target``, NF4 weights less factors, and these beside it; their path and how many weights are quantised.

    Both are those that a training from ``source`` with ``--loftq_init`` and the target ``preset`` makes for itself.
    Both are complete before either gets its name, the factors first, so that no older factors are beside new weights.
    Host memory holds one weight and its factors at a time.

    Raises:
        UserError: ``source`` cannot be quantised, or has a weight that is too small for the rank, or none that
            the preset adapts.
    """
    file = SafetensorsFile(source)
    shapes = {name: file.tensors[key].shape for name, key in weights_to_quantise(file, Nf4(block_size)).items()}
    modules = select_targets([name.removesuffix(".weight") for name in shapes], preset)
    names = {f"{module}.weight" for module in modules}
    if not names:
        raise UserError(f"{source}: --lora_target_preset {preset} adapts none of its quantised layers; choose another")
    infos = _factor_infos({name: shapes[name] for name in shapes if name in names}, rank)
    made = {**_description(rank, iterations, block_size, len(names)), TARGETS_KEY: preset}
    path, mark = loftq_path(target, rank), OwnBase(rank, iterations)
    rows: dict[str, bytes] = {}
    with (
        atomic_path(target) as temporary,
        streamed_file(path, infos, {**made, BASE_KEY: _UNKNOWN_HASH}) as factors,
    ):
        alternate = _Alternating(mark, names, factors, rows)
        count = quantize_file(
            source,
            temporary,
            method=Nf4(block_size),
            device=device,
            alternation=Alternation(mark, names, alternate.quantize),
        )
        factors.describe({**made, BASE_KEY: hash_rows(rows[name] for name in sorted(rows))})
    _remove_others(target, path)
    return path, count


class _Alternating:
    """Quantises weights and writes the factors of each; ``rows`` gets the codes of its first row."""

    def __init__(self, mark: OwnBase, names: set[str], factors: StreamedFile, rows: dict[str, bytes]) -> None:
        self._mark, self._names, self._file, self._rows = mark, names, factors, rows

    def quantize(self, name: str, weight: Tensor, method: Method) -> Packed:
        if name not in self._names:
            return method.quantize(weight)
        packed, factors = quantize_with_factors(
            weight, method.quantize, rank=self._mark.rank, iterations=self._mark.iterations, name=name
        )
        self._file.write(factor_prefix(name) + DOWN, factors.down)
        self._file.write(factor_prefix(name) + UP, factors.up)
        self._rows[name] = packed.weight[0].cpu().numpy().tobytes()
        return packed


def _remove_others(target: Path, kept: Path) -> None:
    """Factors of the checkpoint that ``target`` has replaced."""
    for path in companions(target).values():
        if path != kept:
            path.unlink(missing_ok=True)
            logger.warning("%s: removed; its factors belonged to the file that %s replaced", path, target.name)


def _factor_infos(shapes: Mapping[str, tuple[int, ...]], rank: int) -> Infos:
    infos: Infos = {}
    for name, (n, k) in shapes.items():
        prefix = factor_prefix(name)
        check_rank(name, rank, (n, k))
        infos |= {prefix + DOWN: (torch.float32, (rank, k)), prefix + UP: (torch.float32, (n, rank))}
    return infos


def _description(rank: int, iterations: int, block_size: int, count: int) -> dict[str, str]:
    made = {RANK_KEY: rank, ITERATIONS_KEY: iterations, NF4_BLOCK_KEY: block_size, COUNT_KEY: count}
    return {key: str(value) for key, value in made.items()}


def _first_rows(file: SafetensorsFile, names: Mapping[str, str], block_size: int) -> Iterator[bytes]:
    """NF4 codes of the first row of each weight, sorted by name. ``names``: key to name."""
    for key in sorted(names, key=names.__getitem__):
        info = file.tensors[key]
        row = bytearray(file.read_bytes(key, info.shape[1] * info.dtype.itemsize))
        weight = torch.frombuffer(row, dtype=info.dtype).view(1, -1)
        yield Nf4(block_size).quantize(weight).weight.numpy().tobytes()


def _plain_factors(weight: Tensor, rank: int, block_size: int, name: str) -> Factors:
    return quantize_with_factors(weight, Nf4(block_size).quantize, rank=rank, iterations=1, name=name)[1]
