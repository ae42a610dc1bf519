"""Flags of ``ltx2_inspect_dataset.py``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .caching import CAPTION_FIELD_HELP, AudioSourceConfig, ReferenceSizeConfig
from .flag import flag
from .model import MODE_SHORT_FORMS, Mode
from .rules_caching import reference_sizes
from .rules_common import folder, missing


@dataclass(frozen=True)
class InspectGroup:
    """Inspection."""

    dataset_config: Path | None = flag(None, "dataset configuration, TOML or JSON (required)")
    ltx2_mode: Mode = flag(
        "video",
        "what the dataset is for: video, audio and video, or audio",
        aliases=["ltx_mode"],
        values=MODE_SHORT_FORMS,
    )
    caption_field: str | None = flag(None, CAPTION_FIELD_HELP, metavar="NAME")
    output_dir: Path | None = flag(None, "folder of the page; not given: 'inspection' beside the configuration")
    max_items: int = flag(300, "files of each dataset that are shown with pictures; the tables hold all of them")
    num_workers: int | None = flag(None, "files examined at once; not given: CPU count - 1")
    decode_caches: bool = flag(False, "also decode the latent caches, to the page and to videos")
    ltx2_checkpoint: Path | None = flag(None, "checkpoint with the decoders, for --decode_caches")
    device: str | None = flag(None, "device of the decoders; not given: cuda if present, else cpu")


@dataclass(frozen=True)
class InspectConfig:
    """``ltx2_inspect_dataset.py``"""

    inspect: InspectGroup = InspectGroup()
    audio: AudioSourceConfig = AudioSourceConfig()
    references: ReferenceSizeConfig = ReferenceSizeConfig()


def rules(config: InspectConfig) -> Iterable[str]:
    """What the script cannot do without."""
    flags = config.inspect
    if flags.dataset_config is None:
        yield "--dataset_config is required"
    yield from missing(
        {
            "dataset_config": flags.dataset_config,
            "ltx2_checkpoint": flags.ltx2_checkpoint,
            "ltx2_audio_dir": config.audio.ltx2_audio_dir,
        }
    )
    yield from folder("output_dir", flags.output_dir)
    if flags.decode_caches and flags.ltx2_checkpoint is None:
        yield "--decode_caches needs --ltx2_checkpoint"
    yield from reference_sizes(config.references)
    if flags.max_items < 0:
        yield f"--max_items {flags.max_items}: expected at least 0"
    if flags.num_workers is not None and flags.num_workers < 1:
        yield f"--num_workers {flags.num_workers}: expected at least 1"
