"""LoftQ starts of a LoRA: computed while the base is quantised, or read from a file beside a quantised base."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from musubi_tuner.common.errors import UserError
from musubi_tuner.common.progress import bytes_progress
from musubi_tuner.common.safetensors_io import SafetensorsFile, write_streamed
from musubi_tuner.models.ltx2.keys import transformer_keys
from musubi_tuner.models.ltx2.quantize_file import weights_to_quantise
from musubi_tuner.quantization.loftq import Factors, quantize_with_factors
from musubi_tuner.quantization.packed import Method, Nf4, Packed
from musubi_tuner.quantization.stored import NF4_BLOCK_KEY

from .lora import LoRALinear
from .names import NATIVE_PREFIX, flat_name

RANK_KEY, ITERATIONS_KEY, COUNT_KEY = "loftq_rank", "loftq_iters", "num_modules"
BASE_KEY = "nf4_base_hash"
DOWN, UP = ".lora_A", ".lora_B"


class LoftQ:
    """Quantises weights for a loader and starts the LoRA modules of those that are adapted.

    Attributes:
        started: dotted paths of the modules that have a start.
    """

    def __init__(self, modules: Mapping[str, LoRALinear], iterations: int) -> None:
        self._modules = modules
        self._iterations = iterations
        self.started: list[str] = []

    def quantize(self, name: str, weight: Tensor, method: Method) -> Packed:
        """Alternate where the weight is adapted, else quantise it plainly."""
        path = name.removesuffix(".weight")
        module = self._modules.get(path)
        if module is None:
            return method.quantize(weight)
        _check_rank(path, module.rank, weight.shape)
        packed, factors = quantize_with_factors(
            weight, method.quantize, rank=module.rank, iterations=self._iterations, name=name
        )
        module.start_from(factors.down, factors.up)
        self.started.append(path)
        return packed


class StoredLoftQ:
    """A file of LoftQ factors beside an NF4 checkpoint; only its header has been read.

    Raises:
        UserError: there is none of this rank, or it belongs to another checkpoint.
    """

    def __init__(self, checkpoint: Path, rank: int, block_size: str | None) -> None:
        path = loftq_path(checkpoint, rank)
        if not path.is_file():
            raise UserError(_nothing_of(checkpoint, rank))
        self._file = SafetensorsFile(path)
        made = self._file.metadata
        if made.get(RANK_KEY) != str(rank) or made.get(NF4_BLOCK_KEY) != block_size:
            raise UserError(
                f"{path}: holds factors of rank {made.get(RANK_KEY)} for NF4 blocks of {made.get(NF4_BLOCK_KEY)}, "
                f"expected rank {rank} and {checkpoint.name}'s blocks of {block_size}; make both files again with "
                "ltx2_quantize_model.py --loftq_init"
            )

    def check_base(self, checkpoint: Path) -> None:
        """Compare with the weights of the checkpoint, of each its first row. Files without a hash pass.

        Raises:
            UserError: the factors were made with other weights.
        """
        expected = self._file.metadata.get(BASE_KEY)
        if expected is None:
            return
        file, own = SafetensorsFile(checkpoint), self._file.tensors
        keys = {name: key for name, key in transformer_keys(file.tensors).items() if _prefix(name) + DOWN in own}
        rows = (file.read_bytes(keys[name], file.tensors[keys[name]].shape[1]) for name in sorted(keys))
        if _hash(rows) != expected:
            raise UserError(
                f"{self._file.path}: its factors belong to other weights than those of {checkpoint.name}, which was "
                "written anew without them or renamed; make both files again with ltx2_quantize_model.py --loftq_init"
            )

    def start(self, modules: Mapping[str, LoRALinear], quantised: Iterable[str]) -> list[str]:
        """Start the modules whose weight is among the ``quantised``; the paths of those.

        Raises:
            UserError: a module has another rank or size than the file, or is not in it.
        """
        chosen = [path for path in quantised if path in modules]
        owners: dict[str, tuple[str, str]] = {}
        for path in chosen:
            module, prefix = modules[path], _prefix(path)
            self._check(path, prefix + DOWN, (module.rank, module.lora_down.in_features))
            self._check(path, prefix + UP, (module.lora_up.out_features, module.rank))
            owners |= {prefix + DOWN: (path, DOWN), prefix + UP: (path, UP)}
        sizes = {key: self._file.tensors[key].nbytes for key in owners}
        waiting: dict[str, dict[str, Tensor]] = {}
        for key, factor in bytes_progress(self._file.read(owners), sizes, desc="LoftQ"):
            path, role = owners[key]
            factors = waiting.setdefault(path, {})
            factors[role] = factor
            if len(factors) == 2:
                modules[path].start_from(factors[DOWN], factors[UP])
                del waiting[path]
        return chosen

    def _check(self, path: str, key: str, shape: tuple[int, int]) -> None:
        info = self._file.tensors.get(key)
        if info is None or info.shape != shape:
            found = "nothing" if info is None else f"{key} {list(info.shape)}"
            raise UserError(
                f"{self._file.path}: holds {found} for {path}, expected {list(shape)}; all modules have to have the "
                "rank of the file (no rank_pattern or audio_dim in --network_args), and both files to be made together"
            )


def write_loftq(source: Path, target: Path, *, rank: int, block_size: int, device: torch.device | str) -> Path:
    """Write the factors for the plain NF4 weights of ``source`` beside ``target``, their file; the path.

    Host memory holds one weight and its factors at a time.

    Raises:
        UserError: ``source`` cannot be quantised, or has a weight that is too small for the rank.
    """
    file = SafetensorsFile(source)
    names = {key: name for name, key in weights_to_quantise(file, Nf4(block_size)).items()}
    infos: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for key, name in names.items():
        (n, k), prefix = file.tensors[key].shape, _prefix(name)
        _check_rank(name, rank, (n, k))
        infos |= {prefix + DOWN: (torch.float32, (rank, k)), prefix + UP: (torch.float32, (n, rank))}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        sizes = {key: file.tensors[key].nbytes for key in names}
        for key, weight in bytes_progress(file.read(names), sizes, desc="LoftQ"):
            factors = _plain_factors(weight.to(device), rank, block_size, names[key])
            yield _prefix(names[key]) + DOWN, factors.down
            yield _prefix(names[key]) + UP, factors.up

    made = {RANK_KEY: rank, ITERATIONS_KEY: 1, NF4_BLOCK_KEY: block_size, COUNT_KEY: len(names)}
    made[BASE_KEY] = _hash(_first_rows(file, names, block_size))
    path = loftq_path(target, rank)
    write_streamed(path, infos, tensors(), {name: str(value) for name, value in made.items()})
    return path


def _first_rows(file: SafetensorsFile, names: Mapping[str, str], block_size: int) -> Iterator[bytes]:
    """NF4 codes of the first row of each weight, sorted by name. ``names``: key to name."""
    for key in sorted(names, key=names.__getitem__):
        info = file.tensors[key]
        row = bytearray(file.read_bytes(key, info.shape[1] * info.dtype.itemsize))
        weight = torch.frombuffer(row, dtype=info.dtype).view(1, -1)
        yield Nf4(block_size).quantize(weight).weight.numpy().tobytes()


def _hash(rows: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row)
    return digest.hexdigest()


def _plain_factors(weight: Tensor, rank: int, block_size: int, name: str) -> Factors:
    return quantize_with_factors(weight, Nf4(block_size).quantize, rank=rank, iterations=1, name=name)[1]


def _prefix(name: str) -> str:
    return NATIVE_PREFIX + flat_name(name.removesuffix(".weight"))


def loftq_path(checkpoint: Path, rank: int) -> Path:
    """``x-nf4.safetensors`` to ``x-nf4.loftq_r32.safetensors``."""
    return checkpoint.with_name(f"{checkpoint.stem}.loftq_r{rank}.safetensors")


def _nothing_of(checkpoint: Path, rank: int) -> str:
    pattern = re.compile(re.escape(checkpoint.stem) + r"\.loftq_r(\d+)\.safetensors")
    found = sorted(int(match[1]) for p in checkpoint.parent.iterdir() if (match := pattern.fullmatch(p.name)))
    others = f"only of rank {', '.join(map(str, found))}" if found else "none"
    instead = f"use --network_dim {found[0]}, or " if found else ""
    return (
        f"{loftq_path(checkpoint, rank)}: not found; --loftq_init with a quantised checkpoint reads its factors from "
        f"there, and there are {others}; {instead}run ltx2_quantize_model.py on the original with "
        f"--loftq_init --network_dim {rank}"
    )


def _check_rank(path: str, rank: int, shape: Iterable[int]) -> None:
    if rank > min(shape):
        raise UserError(f"--loftq_init: {path} has a weight of {list(shape)}, so no rank {rank}; lower --network_dim")
