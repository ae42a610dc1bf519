"""Rules that several scripts share; each yields one message a violation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from .model import Mode
from .sampling import SampleDecodeConfig

_DTYPES = ("bfloat16", "bf16", "float16", "fp16", "float32", "fp32", "float")


def missing(paths: Mapping[str, Path | None]) -> Iterable[str]:
    """Flags whose file or folder does not exist."""
    for name, path in paths.items():
        if path is not None and not path.exists():
            where = "" if path.is_absolute() else f" (working directory: {Path.cwd()})"
            yield f"--{name} {path}: not found{where}"


def folder(name: str, path: Path | None) -> Iterable[str]:
    """A folder to write to, which need not exist yet."""
    if path is not None and path.exists() and not path.is_dir():
        yield f"--{name} {path}: is a file, expected a folder"


def output_file(name: str, path: Path, inputs: Iterable[Path]) -> Iterable[str]:
    """A safetensors file to write, which must not be one of those that are read."""
    if path.is_dir():
        yield f"--{name} {path}: is a folder, expected the name of a .safetensors file"
    elif path.suffix != ".safetensors":
        yield f"--{name} {path}: the name has to end in .safetensors"
    elif any(path.resolve() == p.resolve() for p in inputs):
        yield f"--{name} {path}: this is one of the inputs; choose another name"


def file_name(name: str, value: str) -> Iterable[str]:
    """The start of files' names: a path, or what some system refuses, would fail at the first save."""
    if not value.strip() or set(value) & set('/\\:*?"<>|'):
        yield f'--{name} {value!r}: expected a name for files, not empty and without / \\ : * ? " < > |'


def dtypes(names: Mapping[str, str | None]) -> Iterable[str]:
    """Flags whose value is no dtype."""
    for name, value in names.items():
        if value is not None and value.lower() not in _DTYPES:
            yield f"--{name} {value}: expected one of {', '.join(_DTYPES)}"


def tiles(name: str, size: int, overlap: int, *, least: int, step: int) -> Iterable[str]:
    """Sizes of VAE tiles, of the flags ``--{name}_size`` and ``--{name}_overlap``."""
    if size < least or size % step:
        yield f"--{name}_size {size}: expected a multiple of {step}, at least {least}"
    if overlap < 0 or overlap % step or overlap >= size:
        yield f"--{name}_overlap {overlap}: expected a multiple of {step} below the tile size {size}"


def samples(decode: SampleDecodeConfig, mode: Mode) -> Iterable[str]:
    """How previews and generated samples are decoded."""
    if decode.sample_audio_only and mode == "video":
        yield "--sample_audio_only needs --ltx2_mode av or audio"
    elif decode.sample_disable_audio and (decode.sample_audio_only or mode == "audio"):
        yield "--sample_disable_audio leaves nothing to decode, since only sound is generated"
    if decode.sample_tiled_vae:
        yield from tiles(
            "sample_vae_tile", decode.sample_vae_tile_size, decode.sample_vae_tile_overlap, least=64, step=32
        )
    temporal = decode.sample_vae_temporal_tile_size, decode.sample_vae_temporal_tile_overlap
    if temporal[0] != 0:
        yield from tiles("sample_vae_temporal_tile", *temporal, least=16, step=8)
