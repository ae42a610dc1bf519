"""What discovery finds of one dataset, and what is said of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from musubi_tuner.common.tables import count_text, format_table
from musubi_tuner.config.model import Mode

from .cache import split_clip_base
from .entries import DatasetEntry
from .fingerprint import short_list
from .items import CachedItem, CacheProblem


@dataclass
class Find:
    """What was found of one dataset, stage by stage; names are base names."""

    entry: DatasetEntry
    sources: int | None = None  # None: the sources are not there, every cache counts
    items: list[CachedItem] = field(default_factory=list)
    problems: list[CacheProblem] = field(default_factory=list)
    latents: int = 0
    texts: int = 0
    strangers: list[str] = field(default_factory=list)  # no item of the dataset has this name
    leftovers: list[str] = field(default_factory=list)  # from other settings, beside a current cache
    uncached: list[str] = field(default_factory=list)  # sources without latents
    textless: list[str] = field(default_factory=list)
    soundless: list[str] = field(default_factory=list)
    cut_otherwise: list[str] = field(default_factory=list)  # sources of which clips may be missing
    incomplete: Mapping[str, list[str]] = field(default_factory=dict)  # without a reference or mask: what, to names
    changed: list[str] = field(default_factory=list)  # since the manifest was saved
    redated: list[str] = field(default_factory=list)  # files of another date than when they were cached
    uncaptioned: int = 0


def explain_empty(find: Find) -> str:
    """Counts of each stage, and the first thing to do."""
    entry = find.entry
    sources = "not read" if find.sources is None else str(find.sources)
    counts = (
        f"{entry.label}: sources {sources}, latent caches {find.latents}, text caches {find.texts}, "
        f"both 0 (in {entry.cache_directory})"
    )
    if find.uncaptioned and find.uncaptioned == find.sources:
        return f"{counts}; no source has a caption file *{entry.caption_extension}"
    if entry.files is not None:
        return f"{counts}; the manifest lists no items: cache both latents and text, then save it again"
    if find.latents == 0:
        return f"{counts}; run ltx2_cache_latents.py with this configuration"
    if find.textless:
        return f"{counts}; run ltx2_cache_text_encoder_outputs.py with this configuration"
    if find.incomplete:
        lacks = "; ".join(_incomplete(find))
        return f"{entry.label}: no item is complete: {lacks}; run ltx2_cache_latents.py with this configuration"
    return f"{counts}; the caches ({short_list(find.strangers)}) belong to other sources than {entry.source}"


def _incomplete(find: Find) -> Iterable[str]:
    for what, names in find.incomplete.items():
        yield f"no {what} for {short_list(names, shown=5)}"


def counts_report(finds: list[Find], mode: Mode, purpose: str) -> Iterable[str]:
    rows = []
    for find in finds:
        sound = len(find.items) - len(find.soundless)
        row = [find.entry.label, find.entry.kind, "-" if find.sources is None else find.sources, len(find.items)]
        rows.append(row + ([] if mode == "video" else [sound]))
    headers = ["dataset", "kind", "sources", "items", *([] if mode == "video" else ["with sound"])]
    yield format_table(headers, rows, title=f"cached items for {purpose}, mode {mode}")
    total = sum(len(find.items) for find in finds)
    if mode == "av" and total:
        sound = total - sum(len(find.soundless) for find in finds)
        yield f"{sound} of {total} items have sound ({sound / total:.0%})"


def remarks(find: Find, mode: Mode) -> Iterable[str]:
    entry = find.entry
    if find.uncached:
        yield f"no cached latents for {short_list(find.uncached)}; left out"
    if find.textless:
        yield f"no cached text for {short_list(find.textless)}; left out (ltx2_cache_text_encoder_outputs.py)"
    yield from (f"{lacks}; left out (ltx2_cache_latents.py)" for lacks in _incomplete(find))
    if find.uncaptioned:
        yield f"{count_text(find.uncaptioned, 'source')} without a readable caption; left out"
    if find.strangers:
        owner = "no item of this dataset" if entry.files is None else "no item of the manifest"
        yield f"caches of {owner} are ignored: {short_list(find.strangers)}"
    if find.changed:
        yield f"cached again with other sizes since the manifest was saved: {short_list(find.changed)}"
    if find.redated:
        yield (
            f"another date, but the same size, as when they were cached: {short_list(find.redated)}; if their content "
            "changed, run ltx2_cache_latents.py with --skip_existing"
        )
    if find.leftovers:
        yield f"caches from other settings are ignored: {short_list(find.leftovers)}"
    if find.cut_otherwise:
        yield (
            f"{short_list(find.cut_otherwise)}: cached with other settings of frame_extraction than "
            f"{entry.extraction.record!r}, so clips may be missing; run ltx2_cache_latents.py with --skip_existing"
        )
    if mode == "av" and entry.kind == "video" and find.items and len(find.soundless) == len(find.items):
        yield (
            "no item has cached sound; if the clips have any, run ltx2_cache_latents.py with --ltx2_mode av "
            "--skip_existing"
        )
    if entry.kind == "video" and entry.frame_extraction != "full":
        counts = {clip[2] for item in find.items if (clip := split_clip_base(item.base))}
        absent = [frames for frames in entry.target_frames if counts and frames not in counts]
        if absent:
            yield f"target_frames {absent}: no cached clip has this length"
