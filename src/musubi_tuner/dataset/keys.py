"""The keys of a dataset configuration: for which kinds, of what form, with what default."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from musubi_tuner.common.errors import did_you_mean

from .buckets import is_legal_frame_count
from .files import Kind
from .frames import Extraction

Parser = Callable[[Any], Any]  # raises ValueError with what was expected

KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Key:
    """One key of a ``[[datasets]]`` entry."""

    parse: Parser
    default: Any = None
    kinds: tuple[Kind, ...] = KINDS


def show(value: object) -> str:
    """A value as a configuration file would show it."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError:  # TOML has dates
        return str(value)


# --- forms --------------------------------------------------------------------------------------------------


_LARGEST = 1e300  # an integer of a file may be too large for a float


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST


def boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("an integer >= 1")
    return value


def positive(value: object) -> float:
    if not _is_number(value) or value <= 0:
        raise ValueError("a number > 0")
    return float(value)


def weight(value: object) -> float:
    if not _is_number(value) or value < 0:
        raise ValueError("a number >= 0")
    return float(value)


def text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a text that is not empty")
    return value


def path(value: object) -> str:
    """With the user's folder in place of ``~``."""
    written = text(value)
    if "\0" in written:
        raise ValueError("a path without the character 0")
    return os.path.expanduser(written)  # noqa: PTH111 (pathlib raises where a name only begins with ~)


def extension(value: object) -> str:
    """With its leading dot."""
    name = text(value).strip().lstrip(".")
    if not name:
        raise ValueError('an extension such as ".txt"')
    return f".{name}"


def size(value: object) -> tuple[int, int]:
    sides = [value, value] if not isinstance(value, list) else value
    if len(sides) != 2 or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in sides):
        raise ValueError("an integer >= 1 or [width, height]")
    return sides[0], sides[1]


def frame_counts(value: object) -> tuple[int, ...]:
    counts = value if isinstance(value, list) else [value]
    if not counts or any(isinstance(c, bool) or not isinstance(c, int) or c < 1 for c in counts):
        raise ValueError("a list of integers >= 1, such as [1, 25, 49]")
    return tuple(counts)


def legal_frames(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not is_legal_frame_count(value):
        raise ValueError("a number of frames of the form 8k + 1 (1, 9, 17, ...)")
    return value


def one_of(*choices: str) -> Parser:
    def parse(value: object) -> str:
        if value not in choices:
            near = did_you_mean(value, choices) if isinstance(value, str) else ""
            raise ValueError(f"one of {', '.join(choices)}{near}")
        return str(value)

    return parse


# --- the table ----------------------------------------------------------------------------------------------

_VIDEO: tuple[Kind, ...] = ("video",)
_AUDIO: tuple[Kind, ...] = ("audio",)
_PICTURES: tuple[Kind, ...] = ("video", "image")
_SOUNDS: tuple[Kind, ...] = ("video", "audio")

SOURCES: Mapping[str, Kind] = {f"{kind}_{form}": kind for form in ("directory", "jsonl_file") for kind in KINDS}

KEYS: Mapping[str, Key] = {
    **{name: Key(path, kinds=(kind,)) for name, kind in SOURCES.items()},
    "cache_directory": Key(path),
    "resolution": Key(size, (960, 544)),
    "caption_extension": Key(extension, ".txt"),
    "caption_field": Key(text, "caption"),
    "batch_size": Key(count, 1),
    "num_repeats": Key(count, 1),
    "enable_bucket": Key(boolean, False),
    "bucket_no_upscale": Key(boolean, False),
    "separate_audio_buckets": Key(boolean, False),
    "video_loss_weight": Key(weight),
    "audio_loss_weight": Key(weight),
    "cache_only": Key(boolean, False),
    "reference_directory": Key(path, kinds=_PICTURES),
    "control_directory": Key(path, kinds=_PICTURES),
    "reference_cache_directory": Key(path),
    "reference_frames": Key(legal_frames, 1, _PICTURES),
    "reference_downscale": Key(count, 1, _PICTURES),
    "reference_audio_directory": Key(path, kinds=_SOUNDS),
    "reference_audio_cache_directory": Key(path),
    "mask_directory": Key(path, kinds=_PICTURES),
    "audio_mask_directory": Key(path, kinds=_SOUNDS),
    "target_frames": Key(frame_counts, (1,), _VIDEO),
    "frame_extraction": Key(one_of(*get_args(Extraction)), "head", _VIDEO),
    "frame_stride": Key(count, 1, _VIDEO),
    "frame_sample": Key(count, 1, _VIDEO),
    "max_frames": Key(count, 129, _VIDEO),
    "source_fps": Key(positive, None, _VIDEO),
    "target_fps": Key(positive, 25.0, _VIDEO),
    "audio_bucket_strategy": Key(one_of("pad", "truncate"), "pad", _AUDIO),
    "audio_bucket_interval": Key(positive, 2.0, _AUDIO),
}

# Command-line options of these names apply where neither the entry nor [general] has the key.
COMMAND_LINE_DEFAULTS = frozenset(
    {
        "separate_audio_buckets",
        "audio_bucket_strategy",
        "audio_bucket_interval",
        "video_loss_weight",
        "audio_loss_weight",
        "reference_frames",
        "reference_downscale",
        "caption_field",
    }
)

_NO_SIZE_OF_ITS_OWN = "has no effect: a reference has its target's size, divided by reference_downscale"

IGNORED: Mapping[str, str] = {
    **dict.fromkeys(
        ("fp_latent_window_size", "fp_1f_clean_indices", "fp_1f_target_index", "fp_1f_no_post"),
        "belongs to another model (FramePack) and has no effect",
    ),
    **dict.fromkeys(
        (
            "no_resize_control",
            "control_resolution",
            "flux_kontext_no_resize_control",
            "qwen_image_edit_no_resize_control",
            "qwen_image_edit_control_resolution",
        ),
        _NO_SIZE_OF_ITS_OWN,
    ),
    "multiple_target": "has no effect: LTX-2 is trained on one target per item",
}

COMMAND_LINE_ONLY = frozenset(
    """
    audio_only_sequence_resolution audio_only_target_fps audio_only_target_resolution
    audio_video_latent_channels dataset_config debug_mode device gemma_root keep_cache
    gradient_accumulation_steps learning_rate ltx2_audio_dir ltx2_audio_dtype ltx2_audio_ext ltx2_mode
    ltx2_audio_source ltx2_checkpoint ltx_version max_train_epochs max_train_steps mixed_precision seed
    network_alpha network_dim num_timestep_buckets num_workers output_dir output_name skip_existing
    strict_captions vae vae_dtype
    """.split()  # noqa: SIM905
)


def unknown_key(name: str, kind: Kind | None) -> str:
    """Why ``name`` cannot stand in an entry of ``kind`` (None: in ``[general]``), and what may be meant."""
    if name in KEYS:
        kinds = " and ".join(KEYS[name].kinds)
        return f"belongs to {kinds} datasets, this is {'an' if kind != 'video' else 'a'} {kind} dataset"
    if name in COMMAND_LINE_ONLY:
        return f"is a command-line option; give it as --{name}"
    known = [key for key, rule in KEYS.items() if kind is None or kind in rule.kinds]
    return f"unknown key{did_you_mean(name, known) or did_you_mean(name, KEYS)}"
