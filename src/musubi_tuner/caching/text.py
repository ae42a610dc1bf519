"""Captions to text caches, and the prompts of previews to theirs."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from musubi_tuner.common.av import AV
from musubi_tuner.common.dtypes import dtype_name
from musubi_tuner.common.progress import progress
from musubi_tuner.common.tables import count_text
from musubi_tuner.config.model import Mode
from musubi_tuner.dataset.cache import CacheName, read_text_header, write_text
from musubi_tuner.dataset.entries import DatasetConfig, DatasetEntry
from musubi_tuner.dataset.fingerprint import provenance
from musubi_tuner.dataset.items import EncoderRecord
from musubi_tuner.dataset.mismatch import text_mismatch
from musubi_tuner.dataset.sources import SourceItem, caption_path, list_items

from .pipeline import (
    Output,
    RunOptions,
    StoppedError,
    Summary,
    outdated,
    remove_orphans,
    remove_partial,
    stop_if_full,
)

if TYPE_CHECKING:
    from musubi_tuner.generation.prompts import SamplePrompt
    from musubi_tuner.models.text_encoder import PromptEmbeds

logger = logging.getLogger(__name__)

_SAMPLES, _SAMPLE_BYTES = 16, 4096  # of each file of weights, for their fingerprint


class Encoder(Protocol):
    """What is used of :class:`musubi_tuner.models.text_encoder.TextEncoder`."""

    def encode(self, prompts: Sequence[str], mode: Mode) -> PromptEmbeds: ...
    def excess_tokens(self, prompt: str) -> int: ...


@dataclass(frozen=True)
class TextRecipe:
    """What determines the embeddings of a run beside the captions."""

    mode: Mode
    connectors: EncoderRecord
    gemma_id: str
    dtype: torch.dtype = torch.float32
    legacy_keys: bool = True
    max_length: int | None = None  # tokens of a padded caption; None: as the text encoder has it


def gemma_fingerprint(path: Path, quantization: str = "none") -> str:
    """Fingerprint of a Gemma folder or single file: sizes and samples of its weights, and how it is quantised."""
    files = sorted(path.rglob("model*.safetensors")) if path.is_dir() else [path]
    digest = hashlib.sha256(quantization.encode())
    for file in files:
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as stream:
            for index in range(_SAMPLES):
                stream.seek(size * index // _SAMPLES)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def cache_text(
    config: DatasetConfig,
    recipe: TextRecipe,
    load_encoder: Callable[[], Encoder],
    *,
    options: RunOptions = RunOptions(),  # noqa: B008 (frozen)
) -> Summary:
    """Encode the caption of every item of the training and validation datasets, one file a source.

    ``load_encoder`` is called only if something is to be encoded, so a run that finds all current is quick.
    """
    summary = Summary(strict=options.strict)
    with suppress(StoppedError):
        for entry in config.entries():
            if entry.source is not None:
                _cache_dataset(entry, recipe, load_encoder, options, summary)
    return summary


def text_output(entry: DatasetEntry, item: SourceItem, recipe: TextRecipe) -> Output:
    """The text cache of an item."""
    # Modes av and audio keep both parts, which serves mode video as well.
    kept = (False, True) if recipe.mode == "video" else (True,)
    mine, *others = (_text_metadata(entry, item, recipe, with_audio=with_audio) for with_audio in kept)
    return Output(
        entry.cache_directory / str(CacheName(item.stem, "text")),
        mine,
        fits=lambda path: _foreign_fits(path, item.caption, recipe.mode),
        also_current=tuple(others),
    )


def _text_metadata(entry: DatasetEntry, item: SourceItem, recipe: TextRecipe, *, with_audio: bool) -> dict[str, str]:
    settings = {
        "caption": hashlib.sha256(item.caption.encode("utf-8")).hexdigest(),
        "gemma": recipe.gemma_id,
        "dtype": dtype_name(recipe.dtype),
        "modalities": "video and audio" if with_audio else "video",
    }
    if recipe.max_length is not None:
        settings["max_length"] = str(recipe.max_length)
    listed_in = entry.source if entry.listed else None
    source = listed_in or caption_path(item.path, entry.caption_extension)
    return provenance(
        source if source.is_file() else item.path, recipe.connectors, settings, content_in_settings=True
    ) | {"ltx2_mode": recipe.mode}


def _foreign_fits(path: Path, caption: str, mode: Mode) -> bool:
    header = read_text_header(path)
    same_caption = header.metadata.get("caption1", caption) == caption
    return same_caption and text_mismatch(mode, header, None) is None


def _cache_dataset(
    entry: DatasetEntry,
    recipe: TextRecipe,
    load_encoder: Callable[[], Encoder],
    options: RunOptions,
    summary: Summary,
) -> None:
    label = entry.label
    listing = list_items(entry)
    summary.leave_out(label, "text", listing.problems)
    remove_partial(entry.cache_directory, ("text",))
    tally = summary.tally(label, "text")
    due: list[tuple[SourceItem, Output]] = []
    for item in listing.items:
        try:
            output = text_output(entry, item, recipe)
            reason = outdated(output)
        except OSError as error:  # a caption that is gone by now, a name too long for a cache
            summary.fail(label, "text", item.path.name, error)
            continue
        if reason is None and options.skip_existing:
            tally.current += 1
        else:
            summary.count_reasons([reason])
            due.append((item, output))
    if due:
        encoder = load_encoder()
        with progress(total=len(due), desc=f"{label} (text)", unit="caption") as bar:
            for batch in _batches(due, options.batch_size or entry.batch_size):
                _encode_batch(batch, label, recipe, encoder, summary)
                bar.update(len(batch))
    _finish(entry, [item.stem for item in listing.items], options, summary, complete=not listing.problems)


def _batches(due: list[tuple[SourceItem, Output]], size: int) -> Iterator[list[tuple[SourceItem, Output]]]:
    for first in range(0, len(due), size):
        yield due[first : first + size]


def _encode_batch(
    batch: list[tuple[SourceItem, Output]], label: str, recipe: TextRecipe, encoder: Encoder, summary: Summary
) -> None:
    try:
        _store(batch, recipe, encoder)
    except Exception as error:
        stop_if_full(error, batch[0][1].path.parent)
        if len(batch) > 1:  # one of them failed: find out which
            for one in batch:
                _encode_batch([one], label, recipe, encoder, summary)
            return
        summary.fail(label, "text", batch[0][0].path.name, error)
    else:
        summary.tally(label, "text").encoded += len(batch)
        for item, _ in batch:
            if excess := encoder.excess_tokens(item.caption):
                summary.cut_captions.append(f"{item.path.name} (the last {excess} tokens)")


def _store(batch: list[tuple[SourceItem, Output]], recipe: TextRecipe, encoder: Encoder) -> None:
    with torch.no_grad():
        embeds = encoder.encode([item.caption for item, _ in batch], recipe.mode)

    def cpu(tensor: Tensor) -> Tensor:
        return tensor.to(recipe.dtype).cpu()

    video = cpu(embeds.video)
    audio = None if embeds.audio is None else cpu(embeds.audio)
    mask = embeds.mask.cpu()
    for index, (item, output) in enumerate(batch):
        write_text(
            output.path,
            AV(video[index], None if audio is None else audio[index]),
            mask[index],
            output.metadata,
            caption=item.caption,
            legacy_keys=recipe.legacy_keys,
        )


def _finish(entry: DatasetEntry, stems: list[str], options: RunOptions, summary: Summary, *, complete: bool) -> None:
    label = entry.label
    if not stems:
        summary.empty.append(label)
    elif options.keep_cache:
        return
    elif summary.failed_in(label) or not complete:
        logger.info("%s: no old text caches are deleted, since some items could not be cached", label)
    else:
        produced = {CacheName(stem, "text") for stem in stems}
        if removed := remove_orphans(entry.cache_directory, produced, ("text",)):
            logger.info("%s: deleted %d text caches of items that are no more", label, len(removed))


# --- prompts of previews ------------------------------------------------------------------------------------


def read_sample_prompts(prompt_file: Path) -> list[SamplePrompt]:
    """The prompts of a prompt file, with guidance on unless one turns it off: the default scale is known only
    when training starts, and a negative prompt that is not needed costs little."""
    from musubi_tuner.generation.prompts import SamplePrompt, load_prompts

    return load_prompts(prompt_file, SamplePrompt(guidance_scale=2.0))


def cache_sample_prompts(path: Path, prompts: Sequence[SamplePrompt], recipe: TextRecipe, encoder: Encoder) -> None:
    """Encode prompts for previews without Gemma."""
    from musubi_tuner.generation.prompt_cache import encode_prompts, write_prompt_cache

    encoded = encode_prompts(encoder, prompts, recipe.mode)
    # Read by runs of the checkpoint that the connectors stand for.
    belongs_to = recipe.connectors.replaces or recipe.connectors.id
    write_prompt_cache(path, recipe.mode, prompts, encoded, encoder_id=belongs_to)
    logger.info("encoded %s into %s", count_text(len(prompts), "sample prompt"), path)
