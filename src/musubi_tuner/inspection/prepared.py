"""``ltx2_cache_latents.py --debug_mode``: the clips as the encoder would get them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from musubi_tuner.caching.pipeline import Failed, default_workers, read_ahead
from musubi_tuner.caching.run import read_datasets
from musubi_tuner.common.atomic import atomic_path
from musubi_tuner.common.progress import progress
from musubi_tuner.common.tables import format_table
from musubi_tuner.common.text_files import read_text
from musubi_tuner.config.caching import CacheLatentsConfig
from musubi_tuner.config.model import Mode
from musubi_tuner.dataset.buckets import AUDIO_RATE, audio_latent_length, latent_grid
from musubi_tuner.dataset.clip_sound import AudioSource
from musubi_tuner.dataset.clips import PreparedClip, iter_clips
from musubi_tuner.dataset.entries import DatasetEntry
from musubi_tuner.dataset.sources import SourceItem, list_items, summarize_problems
from musubi_tuner.generation.decode import Sound
from musubi_tuner.generation.write import write_mp4, write_wav

from .companions import log_companions
from .examine import unreadable
from .findings import level_db
from .pictures import side_by_side

logger = logging.getLogger(__name__)

Form = Literal["image", "video", "console"]
FOLDER = "debug"


def show_prepared(config: CacheLatentsConfig, form: Form) -> int:
    """Prepare every clip and write or list it; the exit status: 1 if a file cannot be used.

    Raises:
        UserError: the dataset configuration is wrong.
    """
    audio = config.audio
    datasets, mode = read_datasets(
        config.dataset, config.checkpoint.ltx2_mode, defaults=config.references.dataset_defaults
    )
    source = AudioSource(audio.ltx2_audio_source, audio.ltx2_audio_dir, audio.ltx2_audio_ext)
    failed = 0
    for entry in datasets.entries():
        folder = datasets.path.parent / FOLDER / entry.label.replace("[", "_").replace("]", "")
        failed += _show_dataset(
            entry,
            form,
            folder,
            source if mode == "av" else None,
            mode=mode,
            workers=config.dataset.num_workers or default_workers(),
        )
        if form != "console":
            logger.info("%s: written to %s", entry.label, folder.resolve())
    return 0 if config.dataset.allow_failed else int(failed > 0)


def _show_dataset(
    entry: DatasetEntry, form: Form, folder: Path, sound: AudioSource | None, *, mode: Mode, workers: int
) -> int:
    """The number of files that cannot be used or lack a caption, and of references and masks that are missing."""

    def work(item: SourceItem) -> Iterator[PreparedClip]:
        return iter_clips(item, entry, with_audio=sound is not None, audio_source=sound)

    listing = list_items(entry)
    if listing.problems:
        logger.warning("%s: %s", entry.label, summarize_problems(listing.problems))
    rows, failed = [], len(listing.problems) + log_companions(entry, mode, listing.items)
    written = None if form == "console" else _Written(folder)
    streams = read_ahead(listing.items, work, workers=workers, describe=lambda item: str(item.path))
    with progress(total=len(listing.items), desc=f"{entry.label} ({entry.kind})", unit="file") as bar:
        for item, results in streams:
            for result in results:
                if isinstance(result, Failed):
                    failed += 1
                    logger.error("%s: %s", item.path.name, unreadable(item, result.error).text)
                    continue
                rows.append(_row(result))
                if written is not None:
                    _write(result, form, written)
            bar.update()
    headers = ("clip", "bucket", "frames", "seconds", "video tokens", "audio tokens", "dB", "remarks")
    logger.info("%s", format_table(headers, rows, title=entry.label))
    return failed


class _Written:
    """The files that a run writes to a folder, by a list beside it, so that the next run can remove them.

    Nothing else is removed: the folder may hold files of the user's.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._list = folder.with_name(f"{folder.name}.written.txt")
        if self._list.is_file():
            for name in read_text(self._list).splitlines():
                if name == Path(name).name and (folder / name).is_file():
                    (folder / name).unlink()
        self._list.write_text("", encoding="utf-8")

    def path(self, name: str) -> Path:
        """Where a file of this run goes. It is listed first, so an interrupted run leaves none behind."""
        with self._list.open("a", encoding="utf-8", newline="\n") as stream:
            stream.write(f"{name}\n")
        return self._folder / name


def _row(clip: PreparedClip) -> list[object]:
    tokens, frames = 0, 0
    if clip.pixels is not None:
        frames = len(clip.pixels)
        grid = latent_grid(frames, clip.bucket)
        tokens = grid[0] * grid[1] * grid[2]
    return [
        clip.base_name,
        f"{clip.bucket[0]}x{clip.bucket[1]}" if frames else "-",
        frames,
        f"{clip.duration:.2f}",
        tokens,
        audio_latent_length(clip.waveform.shape[1]) if clip.waveform is not None else 0,
        f"{level_db(clip.waveform):.0f}" if clip.waveform is not None else "-",
        "; ".join(clip.notes),
    ]


def _write(clip: PreparedClip, form: Form, written: _Written) -> None:
    sound = Sound(torch.from_numpy(clip.waveform), AUDIO_RATE) if clip.waveform is not None else None
    if clip.pixels is None:
        assert sound is not None
        write_wav(written.path(f"{clip.base_name}.wav"), sound)
    elif form == "video" and clip.item.kind == "video":
        write_mp4(written.path(f"{clip.base_name}.mp4"), torch.from_numpy(clip.pixels), clip.fps, sound)
    else:
        with atomic_path(written.path(f"{clip.base_name}.png")) as temporary:
            Image.fromarray(side_by_side(clip.pixels, clip.bucket)).save(temporary)
