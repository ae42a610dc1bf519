"""Files of LoftQ factors beside an NF4 checkpoint: their keys, and what a LoRA starts from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from musubi_tuner.common.errors import UserError
from musubi_tuner.common.progress import bytes_progress
from musubi_tuner.common.safetensors_io import SafetensorsFile
from musubi_tuner.config.loftq_names import loftq_path, loftq_rank
from musubi_tuner.models.ltx2.keys import transformer_keys
from musubi_tuner.networks.lora import LoRALinear
from musubi_tuner.networks.names import NATIVE_PREFIX, flat_name
from musubi_tuner.quantization.stored import NF4_BLOCK_KEY, OwnBase

RANK_KEY, ITERATIONS_KEY, COUNT_KEY = "loftq_rank", "loftq_iters", "num_modules"
BASE_KEY, TARGETS_KEY = "nf4_base_hash", "loftq_targets"
DOWN, UP = ".lora_A", ".lora_B"


class StoredLoftQ:
    """A file of LoftQ factors beside an NF4 checkpoint; only its header has been read.

    ``own_base``: how the checkpoint is marked, where its weights were quantised less these factors, and so need them.

    Raises:
        UserError: there is none of this rank, or it belongs to another checkpoint.
    """

    def __init__(self, checkpoint: Path, rank: int, block_size: str | None, own_base: OwnBase | None = None) -> None:
        path = loftq_path(checkpoint, rank)
        if own_base is not None:
            _check_own_base(checkpoint, path, rank, own_base)
        if not path.is_file():
            raise UserError(_nothing_of(checkpoint, rank))
        self._file, self._own_base = SafetensorsFile(path), own_base
        made = self._file.metadata
        if made.get(RANK_KEY) != str(rank) or made.get(NF4_BLOCK_KEY) != block_size:
            raise UserError(
                f"{path}: holds factors of rank {made.get(RANK_KEY)} for NF4 blocks of {made.get(NF4_BLOCK_KEY)}, "
                f"expected rank {rank} and {checkpoint.name}'s blocks of {block_size}; make both files again with "
                "ltx2_quantize_model.py --loftq_init"
            )
        if own_base is None and TARGETS_KEY in made:
            raise UserError(
                f"{path}: was written with weights that need it (--loftq_own_base), and {checkpoint.name} is not "
                "marked as them: it is another file, or was rewritten without its metadata; make both again"
            )
        if own_base is not None and made.get(ITERATIONS_KEY) != str(own_base.iterations):
            raise UserError(
                f"{path}: holds factors of {made.get(ITERATIONS_KEY)} rounds, expected {own_base.iterations}, as of "
                f"{checkpoint.name}; make both files again with ltx2_quantize_model.py --loftq_init --loftq_own_base"
            )

    def check_base(self, checkpoint: Path) -> None:
        """Compare with the weights of the checkpoint, of each its first row.

        Files without a hash pass, where the checkpoint is no base of its own.

        Raises:
            UserError: the factors were made with other weights.
        """
        expected = self._file.metadata.get(BASE_KEY)
        if expected is None and self._own_base is None:
            return
        file, own = SafetensorsFile(checkpoint), self._file.tensors
        keys = {name: key for name, key in transformer_keys(file.tensors).items() if factor_prefix(name) + DOWN in own}
        rows = (file.read_bytes(keys[name], file.tensors[keys[name]].shape[1]) for name in sorted(keys))
        if hash_rows(rows) != expected:
            raise UserError(
                f"{self._file.path}: its factors belong to other weights than those of {checkpoint.name}, which was "
                "written anew without them or renamed; make both files again with ltx2_quantize_model.py --loftq_init"
                + ("" if self._own_base is None else " --loftq_own_base")
            )

    def start(self, modules: Mapping[str, LoRALinear], quantised: Iterable[str]) -> list[str]:
        """Start the modules whose weight is among the ``quantised``; the paths of those.

        Raises:
            UserError: a module has another rank or size than the file, or is not in it, or one is missing that a base
                of its own needs, or factors are not finite.
        """
        quantised = list(quantised)
        chosen = [path for path in quantised if path in modules]
        if self._own_base is not None:
            self._check_targets(
                chosen, [path for path in quantised if factor_prefix(path) + DOWN in self._file.tensors]
            )
        owners: dict[str, tuple[str, str]] = {}
        for path in chosen:
            module, prefix = modules[path], factor_prefix(path)
            self._check(path, prefix + DOWN, (module.rank, module.lora_down.in_features))
            self._check(path, prefix + UP, (module.lora_up.out_features, module.rank))
            owners |= {prefix + DOWN: (path, DOWN), prefix + UP: (path, UP)}
        sizes = {key: self._file.tensors[key].nbytes for key in owners}
        waiting: dict[str, dict[str, Tensor]] = {}
        for key, factor in bytes_progress(self._file.read(owners), sizes, desc="LoftQ"):
            if not factor.isfinite().all():
                raise UserError(f"{self._file.path}: {key} holds NaN or infinity; make both files again")
            path, role = owners[key]
            factors = waiting.setdefault(path, {})
            factors[role] = factor
            if len(factors) == 2:
                modules[path].start_from(factors[DOWN], factors[UP])
                del waiting[path]
        return chosen

    def _check_targets(self, adapted: list[str], corrected: list[str]) -> None:
        """A weight less factors that nothing adds is worse than plain NF4, and so are factors without such a weight."""
        differences = {
            "leaves out": [path for path in corrected if path not in set(adapted)],
            "has besides": [path for path in adapted if path not in set(corrected)],
        }
        parts = [f"{len(paths)} that the network {what} ({paths[0]})" for what, paths in differences.items() if paths]
        if parts:
            preset = self._file.metadata.get(TARGETS_KEY)
            raise UserError(
                f"{self._file.path}: the weights beside it were quantised for LoRAs of --lora_target_preset {preset}, "
                f"and of their layers there are {' and '.join(parts)}; train with that preset, without patterns in "
                "--network_args, or make both files again with the preset of the training"
            )

    def _check(self, path: str, key: str, shape: tuple[int, int]) -> None:
        info = self._file.tensors.get(key)
        if info is None or info.shape != shape:
            found = "nothing" if info is None else f"{key} {list(info.shape)}"
            raise UserError(
                f"{self._file.path}: holds {found} for {path}, expected {list(shape)}; all modules have to have the "
                "rank of the file (no rank_pattern or audio_dim in --network_args), and both files to be made together"
            )


def hash_rows(rows: Iterable[bytes]) -> str:
    """What tells the weights of one checkpoint from those of another: of each its first row, sorted by name."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row)
    return digest.hexdigest()


def factor_prefix(name: str) -> str:
    """Of the keys of a weight's factors."""
    return NATIVE_PREFIX + flat_name(name.removesuffix(".weight"))


def _check_own_base(checkpoint: Path, factors: Path, rank: int, own_base: OwnBase) -> None:
    """It fits one rank, and needs its factors."""
    if rank != own_base.rank:
        raise UserError(
            f"{checkpoint}: its NF4 weights are for LoRAs of rank {own_base.rank} (--loftq_own_base), got "
            f"--network_dim {rank}; use --network_dim {own_base.rank}, or run ltx2_quantize_model.py on the original "
            f"with --loftq_init --loftq_own_base --network_dim {rank}"
        )
    if not factors.is_file():
        raise UserError(
            f"{factors}: not found; {checkpoint.name} was made with it (--loftq_own_base) and lacks its factors; put "
            "it back, or run ltx2_quantize_model.py on the original again"
        )


def companions(checkpoint: Path) -> dict[int, Path]:
    """Files of factors beside a checkpoint, made with it or not, by their ranks."""
    beside = checkpoint.parent.iterdir() if checkpoint.parent.is_dir() else ()
    return {rank: path for path in beside if (rank := loftq_rank(path, checkpoint)) is not None}


def _nothing_of(checkpoint: Path, rank: int) -> str:
    found = sorted(companions(checkpoint))
    others = f"only of rank {', '.join(map(str, found))}" if found else "none"
    instead = f"use --network_dim {found[0]}, or " if found else ""
    return (
        f"{loftq_path(checkpoint, rank)}: not found; --loftq_init with a quantised checkpoint reads its factors from "
        f"there, and there are {others}; {instead}run ltx2_quantize_model.py on the original with "
        f"--loftq_init --network_dim {rank}"
    )
