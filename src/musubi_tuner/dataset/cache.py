"""Cache files: their names, tensor keys and metadata, reading and writing.

A dataset item has one file each for video latents, audio latents and text embeddings::

    clip_00000-049_0768x0512_ltx2.safetensors        latents_7x16x24_bfloat16         [128, 7, 16, 24]
    clip_00000-049_0768x0512_ltx2_audio.safetensors  audio_latents_50x16x8_float16    [8, 50, 16]
                                                     audio_lengths_int32              []
    clip_ltx2_te.safetensors                         video_prompt_embeds_bfloat16     [L, Dv]
                                                     audio_prompt_embeds_bfloat16     [L, Da]  (modes av, audio)
                                                     prompt_attention_mask            [L]
                                                     text_bfloat16, text_mask         the same, for older readers
    clip_00000-049_0768x0512_ltx2_mask.safetensors   mask                             [7, 16, 24]  float32
                                                     audio_mask                       [50]         float32

References lie in directories of their own, under the names of the targets' latents and audio files.

Names and keys are those of musubi-tuner's LTX-2 caches, so files move between the two. Latents are normalised
(the VAE's per-channel statistics are applied). Sizes in names are ``width x height``: the bucket for video,
the original size for images, the dataset's resolution for sound.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from musubi_tuner.common.av import AV, Modality
from musubi_tuner.common.dtypes import dtype_name
from musubi_tuner.common.errors import UserError
from musubi_tuner.common.safetensors_io import Allocate, SafetensorsFile, TensorInfo, save_safetensors

from .buckets import Size

ARCHITECTURE = "ltx2_v1"
FORMAT_VERSION = "1.0.1"

# Metadata of a clip: how its video was cut. Not what the clip holds, but which others should be there.
EXTRACTION_KEY = "frame_extraction"

# Metadata of pictures: the version of the decoding and resizing before the encoder. Caches without it, or of an
# earlier one, were made of pixels that differ by about one level of 255: too little to make them again.
PREPARATION_KEY, PREPARATION = "preparation", "2"

CacheKind = Literal["latents", "audio", "text", "dino", "mask"]
Grid = tuple[int, int, int]

# --- names --------------------------------------------------------------------------------------------------

_ENDINGS: dict[CacheKind, str] = {"latents": "", "audio": "_audio", "text": "_te", "dino": "_dino", "mask": "_mask"}
_KINDS = {ending: kind for kind, ending in _ENDINGS.items()}
_NAME = re.compile(
    r"(?P<base>.+?)(?:_(?P<w>\d{4,})x(?P<h>\d{4,}))?_ltx2(?P<ending>|_audio|_te|_dino|_mask)\.safetensors"
)
_CLIP = re.compile(r"(?P<stem>.+)_(?P<start>\d{5,})-(?P<count>\d{3,})")


@dataclass(frozen=True)
class CacheName:
    """A cache file's name taken apart.

    ``base`` is the source's stem for images, sound and text, and ``<stem>_<start>-<count>`` for clips.
    """

    base: str
    kind: CacheKind
    size: Size | None = None  # (width, height); text files have none, others may lack it in old caches

    def __str__(self) -> str:
        size = f"_{self.size[0]:04d}x{self.size[1]:04d}" if self.size else ""
        return f"{self.base}{size}_ltx2{_ENDINGS[self.kind]}.safetensors"

    @classmethod
    def parse(cls, name: str) -> CacheName | None:
        """Read a file name, from the right since stems may hold anything; ``None`` if it is not a cache's."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        kind = _KINDS[match["ending"]]
        if kind == "text" and match["w"]:  # the stem ends in something like a size
            return cls(f"{match['base']}_{match['w']}x{match['h']}", "text")
        return cls(match["base"], kind, (int(match["w"]), int(match["h"])) if match["w"] else None)

    def sibling(self, kind: CacheKind) -> CacheName:
        """The name of another file of the same clip."""
        return CacheName(self.base, kind, self.size)


def clip_base(stem: str, start: int, count: int) -> str:
    """Base name of ``count`` frames from ``start``: ``clip_00000-049``."""
    return f"{stem}_{start:05d}-{count:03d}"


def split_clip_base(base: str) -> tuple[str, int, int] | None:
    """``clip_00000-049`` to ``("clip", 0, 49)``; ``None`` if there is no frame range."""
    match = _CLIP.fullmatch(base)
    return (match["stem"], int(match["start"]), int(match["count"])) if match else None


def list_caches(directory: Path) -> dict[CacheName, Path]:
    """All cache files directly in ``directory``, sorted by file name; nothing if it does not exist."""
    # Not glob: a "[" in the directory would be read as a pattern. Strings: a Path for every file takes longer.
    files = sorted(os.listdir(directory)) if directory.is_dir() else []  # noqa: PTH208
    named = ((CacheName.parse(file), file) for file in files)
    return {name: directory / file for name, file in named if name is not None}


# --- tensor keys --------------------------------------------------------------------------------------------

_DTYPES = (
    *("bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"),
    *("int8", "int16", "int32", "int64", "uint8", "bool", "bf16", "fp16", "fp32"),
)
_DTYPE = re.compile(rf"(?P<name>.+)_(?P<dtype>{'|'.join(_DTYPES)})")
_GRID = re.compile(r"(?P<name>(?:ref_)?(?:audio_)?latents)_(?P<grid>\d+x\d+x\d+)")


@dataclass(frozen=True)
class TensorKey:
    """``latents_7x16x24_bfloat16`` taken apart: name, grid as written, dtype as written."""

    name: str
    grid: Grid | None = None
    dtype: str | None = None

    @classmethod
    @lru_cache(maxsize=4096)  # thousands of files have the same few keys
    def parse(cls, key: str) -> TensorKey:
        if key.endswith("_mask"):
            return cls(key)
        # Only known dtypes are stripped: names such as float8_e4m3fn hold an underscore themselves.
        typed = _DTYPE.fullmatch(key)
        rest, dtype = (typed["name"], typed["dtype"]) if typed else (key, None)
        sized = _GRID.fullmatch(rest)
        if sized is None:
            return cls(rest, None, dtype)
        first, second, third = (int(n) for n in sized["grid"].split("x"))
        return cls(sized["name"], (first, second, third), dtype)


def _by_name(file: SafetensorsFile) -> dict[str, str]:
    """Key name without grid and dtype, to the key in the file."""
    return {TensorKey.parse(key).name: key for key in file.tensors}


# --- headers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LatentHeader:
    """What the header of a latent cache says."""

    channels: int
    grid: Grid  # (F, H, W)
    has_virtual_grid: bool  # made in mode audio
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class AudioHeader:
    """What the header of an audio cache says."""

    channels: int
    steps: int
    bins: int
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class TextHeader:
    """What the header of a text cache says."""

    tokens: int
    widths: AV[int]  # of the separate embeddings
    legacy_width: int | None  # of ``text_*``, which older files have alone
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class MaskHeader:
    """What the header of a mask cache says; the parts it has not are ``None``."""

    grid: Grid | None  # (F, H, W)
    audio_steps: int | None
    metadata: Mapping[str, str]


def read_latent_header(path: Path) -> LatentHeader:
    """Raises UserError if the file is damaged or holds no latents."""
    file = SafetensorsFile(path)
    names = _by_name(file)
    channels, *grid = _shape(file, names, "latents", ndim=4)
    return LatentHeader(channels, tuple(grid), "ltx2_virtual_num_frames" in names, file.metadata)  # type: ignore[arg-type]


def read_audio_header(path: Path) -> AudioHeader:
    """Raises UserError if the file is damaged or holds no audio latents."""
    file = SafetensorsFile(path)
    channels, steps, bins = _shape(file, _by_name(file), "audio_latents", ndim=3)
    return AudioHeader(channels, steps, bins, file.metadata)


def read_text_header(path: Path) -> TextHeader:
    """Raises UserError if the file is damaged or holds no embeddings."""
    file = SafetensorsFile(path)
    names = _by_name(file)
    found = {name: file.tensors[key] for name, key in names.items() if name in _TEXT_NAMES}
    if not found:
        raise _lacks(file, "video_prompt_embeds")
    shapes = {name: _shape(file, names, name, ndim=2) for name in found}
    return TextHeader(
        tokens=next(iter(shapes.values()))[0],
        widths=AV(*(shapes[n][1] if (n := f"{m}_prompt_embeds") in shapes else None for m in ("video", "audio"))),
        legacy_width=shapes["text"][1] if "text" in shapes else None,
        metadata=file.metadata,
    )


def read_mask_header(path: Path) -> MaskHeader:
    """Raises UserError if the file is damaged or holds no mask."""
    file = SafetensorsFile(path)
    names = {name: name for name in file.tensors}
    if not {"mask", "audio_mask"} & set(names):
        raise _lacks(file, "mask")
    return MaskHeader(
        grid=_shape(file, names, "mask", ndim=3) if "mask" in names else None,  # type: ignore[arg-type]
        audio_steps=_shape(file, names, "audio_mask", ndim=1)[0] if "audio_mask" in names else None,
        metadata=file.metadata,
    )


_TEXT_NAMES = ("video_prompt_embeds", "audio_prompt_embeds", "text")


def _shape(file: SafetensorsFile, names: Mapping[str, str], name: str, *, ndim: int) -> tuple[int, ...]:
    if name not in names:
        raise _lacks(file, name)
    info: TensorInfo = file.tensors[names[name]]
    if len(info.shape) != ndim or 0 in info.shape:
        raise UserError(
            f"{file.path}: {names[name]} has the shape {list(info.shape)}, expected {ndim} axes; cache it again"
        )
    return info.shape


def _lacks(file: SafetensorsFile, name: str) -> UserError:
    held = ", ".join(list(file.tensors)[:4]) or "nothing"
    return UserError(f"{file.path} has no {name} (it holds {held}); delete it and cache it again")


# --- reading ------------------------------------------------------------------------------------------------


def read_latents(path: Path, allocate: Allocate | None = None) -> Tensor:
    """[C, F, H, W], in memory of ``allocate`` where that is given."""
    file = SafetensorsFile(path)
    names = _by_name(file)
    _shape(file, names, "latents", ndim=4)
    return file.read_one(names["latents"], allocate=allocate)


def read_virtual_grid(path: Path) -> Grid | None:
    """Latent (F, H, W) that stands for a sound in mode audio; ``None`` in caches of other modes."""
    file = SafetensorsFile(path)
    names = _by_name(file)
    keys = [names.get(f"ltx2_virtual_{axis}") for axis in ("num_frames", "height", "width")]
    if None in keys:
        return None
    frames, height, width = (int(file.read_one(key)) for key in keys)  # type: ignore[arg-type]
    return frames, height, width


def read_audio(path: Path) -> tuple[Tensor, int]:
    """Latents [8, T, 16] and the number of valid steps."""
    file = SafetensorsFile(path)
    names = _by_name(file)
    steps = _shape(file, names, "audio_latents", ndim=3)[1]
    tensors = dict(file.read(names[name] for name in ("audio_latents", "audio_lengths") if name in names))
    length = int(tensors[names["audio_lengths"]]) if "audio_lengths" in names else steps
    return tensors[names["audio_latents"]], min(length, steps)


def read_mask(path: Path) -> AV[Tensor]:
    """Masks [F, H, W] and [T] in [0, 1], 1 = keep clean; a part that the file lacks is ``None``."""
    file = SafetensorsFile(path)
    return AV(*(file.read_one(key).float() if key in file.tensors else None for key in ("mask", "audio_mask")))


def read_text(
    path: Path,
    modalities: Iterable[Modality],
    legacy_widths: AV[int] | None = None,
    allocate: Allocate | None = None,
) -> tuple[AV[Tensor], Tensor | None]:
    """Embeddings [L, D] of ``modalities`` and the mask [L] bool (``None`` if the file has none).

    Only what is asked for is read, into memory of ``allocate`` where that is given. Files that hold ``text_*``
    alone are split by ``legacy_widths``.
    """
    file = SafetensorsFile(path)
    names = _by_name(file)
    keys = {modality: names.get(f"{modality}_prompt_embeds") for modality in modalities}
    mask_key = names.get("prompt_attention_mask") or names.get("text_mask")
    tensors = dict(file.read((key for key in (*keys.values(), mask_key) if key), allocate=allocate))
    embeds: dict[Modality, Tensor] = {
        modality: tensors[key] if key else _legacy_part(file, names, modality, legacy_widths)
        for modality, key in keys.items()
    }
    return AV(**embeds), tensors[mask_key].bool() if mask_key else None


def _legacy_part(file: SafetensorsFile, names: Mapping[str, str], modality: Modality, widths: AV[int] | None) -> Tensor:
    width = _shape(file, names, "text", ndim=2)[1]
    part = legacy_slice(width, modality, widths)
    if part is None:
        expected = f"; expected {widths.video} (video) and {widths.audio} (audio)" if widths else ""
        raise UserError(
            f"{file.path} holds one text tensor of width {width}, of which the {modality} part is not known"
            f"{expected}; encode the text again"
        )
    return file.read_one(names["text"])[:, part].contiguous()


def legacy_slice(width: int, modality: Modality, widths: AV[int] | None) -> slice | None:
    """Where ``modality`` lies in a ``text_*`` tensor of ``width``: video, audio, or video then audio."""
    if widths is None or widths.video is None or widths.audio is None:
        return None
    if width == widths.video + widths.audio:
        return slice(0, widths.video) if modality == "video" else slice(widths.video, None)
    alone = {"video": widths.video, "audio": widths.audio}
    # A tensor as wide as both embeddings is the video one: mode video is the default.
    holds: Modality = "video" if width == widths.video else "audio"
    return slice(None) if width == alone[modality] and modality == holds else None


# --- writing ------------------------------------------------------------------------------------------------


def write_latents(
    path: Path,
    latents: Tensor,
    metadata: Mapping[str, str],
    *,
    frame_count: int | None = None,
    virtual_grid: Grid | None = None,
) -> None:
    """Write video latents.

    Args:
        path: named by :class:`CacheName`, from which the metadata ``width`` and ``height`` come.
        latents: [C, F, H, W], normalised.
        metadata: what made it, beside the format's own entries.
        frame_count: pixel frames of a clip.
        virtual_grid: mode audio: the latent (F, H, W) that stands for the sound.

    Raises:
        UserError: NaN or infinity in ``latents``; nothing is written.
    """
    frames, height, width = latents.shape[1:]
    tensors = {f"latents_{frames}x{height}x{width}_{dtype_name(latents.dtype)}": _finite(path, latents)}
    if virtual_grid is not None:
        for axis, count in zip(("num_frames", "height", "width"), virtual_grid, strict=True):
            tensors[f"ltx2_virtual_{axis}_int32"] = torch.tensor(count, dtype=torch.int32)
    own = {"frame_count": str(frame_count)} if frame_count is not None else {}
    name = CacheName.parse(path.name)
    if name is not None and name.size is not None:
        own |= {"width": str(name.size[0]), "height": str(name.size[1])}
    save_safetensors(tensors, path, _metadata(own, metadata))


def write_audio(path: Path, latents: Tensor, metadata: Mapping[str, str]) -> None:
    """Write audio latents [8, T, 16]; raises UserError on NaN or infinity."""
    channels, steps, bins = latents.shape
    tensors = {
        # The key lists time, mel bins, channels; the tensor is channels, time, mel bins.
        f"audio_latents_{steps}x{bins}x{channels}_{dtype_name(latents.dtype)}": _finite(path, latents),
        "audio_lengths_int32": torch.tensor(steps, dtype=torch.int32),
    }
    save_safetensors(tensors, path, _metadata({}, metadata))


def write_text(
    path: Path,
    embeds: AV[Tensor],
    mask: Tensor,
    metadata: Mapping[str, str],
    *,
    caption: str,
    legacy_keys: bool = True,
) -> None:
    """Write text embeddings [L, D] and their mask [L]; raises UserError on NaN or infinity."""
    parts = [_finite(path, part) for _, part in embeds.items()]
    tensors = {f"{m}_prompt_embeds_{dtype_name(part.dtype)}": part for m, part in embeds.items()}
    tensors["prompt_attention_mask"] = mask.to(torch.int64)
    if legacy_keys:
        tensors[f"text_{dtype_name(parts[0].dtype)}"] = torch.cat(parts, dim=-1)
        tensors["text_mask"] = mask.to(torch.int64)
    save_safetensors(tensors, path, _metadata({"caption1": caption}, metadata))


def write_mask(path: Path, masks: AV[Tensor], metadata: Mapping[str, str]) -> None:
    """Write masks in [0, 1] (1 = keep clean): video [F, H, W], audio [T], one or both."""
    keys = {"video": "mask", "audio": "audio_mask"}
    tensors = {keys[modality]: _finite(path, mask.to(torch.float32)) for modality, mask in masks.items()}
    save_safetensors(tensors, path, _metadata({}, metadata))


def _metadata(own: Mapping[str, str], provenance: Mapping[str, str]) -> dict[str, str]:
    return {**provenance, **own, "architecture": ARCHITECTURE, "format_version": FORMAT_VERSION}


def _finite(path: Path, tensor: Tensor) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise UserError(
            f"{path.name}: the encoder gave NaN or infinity in {dtype_name(tensor.dtype)}; try another dtype "
            "(float32 or bfloat16)"
        )
    return tensor
