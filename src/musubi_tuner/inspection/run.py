"""``ltx2_inspect_dataset.py``: examine every item once, then the log, then the page."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from musubi_tuner.caching.pipeline import Failed, default_workers, read_ahead
from musubi_tuner.common.log import quiet
from musubi_tuner.common.progress import progress
from musubi_tuner.config.inspect import InspectConfig
from musubi_tuner.config.model import Mode
from musubi_tuner.dataset.clip_sound import AudioSource
from musubi_tuner.dataset.companions import find_companions
from musubi_tuner.dataset.entries import DatasetEntry
from musubi_tuner.dataset.schema import check_mode, load_dataset_config
from musubi_tuner.dataset.sources import ItemListing, Problem, SourceItem, list_items

from .companions import counts_text
from .duplicates import find_duplicates
from .examine import ItemReport, examine, unreadable
from .findings import Finding
from .page import write_page
from .report import CachedClip, DatasetReport, Inspection, finding_groups, group_line, log_tables

logger = logging.getLogger(__name__)

_LEVELS = {"error": logging.ERROR, "warning": logging.WARNING, "note": logging.INFO}
PAGE = "index.html"


def run_inspection(config: InspectConfig) -> int:
    """The exit status: 1 if files cannot be used.

    Raises:
        UserError: the request or the dataset configuration is wrong.
    """
    flags, audio = config.inspect, config.audio
    assert flags.dataset_config is not None
    datasets = load_dataset_config(
        flags.dataset_config, command_line={"caption_field": flags.caption_field, **config.references.dataset_defaults}
    )
    mode = check_mode(datasets, flags.ltx2_mode)
    output = flags.output_dir or flags.dataset_config.parent / "inspection"
    sound = AudioSource(audio.ltx2_audio_source, audio.ltx2_audio_dir, audio.ltx2_audio_ext)
    reference_seconds = config.references.reference_audio_max_seconds
    workers = flags.num_workers or default_workers()
    previews = _cache_previews(config, list(datasets.entries()), output)

    listings = {entry.label: list_items(entry) for entry in datasets.entries()}
    duplicates = find_duplicates({label: listing.items for label, listing in listings.items()})
    reports = []
    with quiet("musubi_tuner.dataset.rates", "musubi_tuner.dataset.clip_sound"):  # the page says it in its place
        for entry in datasets.entries():
            examined = _examine_all(
                entry,
                listings[entry.label],
                partial(examine, mode=mode, audio_source=sound, reference_seconds=reference_seconds),
                mode=mode,
                workers=workers,
                max_shown=flags.max_items,
            )
            items = [_with(item, duplicates.get((entry.label, item.item.path), ())) for item in examined]
            reports.append(DatasetReport(entry, items, previews.get(entry.label, ())))
    inspection = Inspection(flags.dataset_config, mode, reports)
    _log(inspection)
    output.mkdir(parents=True, exist_ok=True)
    write_page(inspection, output / PAGE)
    logger.info("page: %s", (output / PAGE).resolve())
    return int(any(report.unusable for report in reports))


def _cache_previews(
    config: InspectConfig, entries: Sequence[DatasetEntry], output: Path
) -> Mapping[str, Sequence[CachedClip]]:
    flags = config.inspect
    if not flags.decode_caches:
        return {}
    from .decoded import decode_caches  # the only part that loads a model

    assert flags.ltx2_checkpoint is not None
    return decode_caches(
        entries, flags.ltx2_checkpoint, output / "decoded", device=flags.device, max_clips=flags.max_items
    )


def _examine_all(
    entry: DatasetEntry,
    listing: ItemListing,
    look: Callable[..., ItemReport],
    *,
    mode: Mode,
    workers: int,
    max_shown: int,
) -> list[ItemReport]:
    """All items by path. Pictures are kept of the first ``max_shown`` and of as many remarkable ones."""

    companions = find_companions(entry, listing.items, mode)
    if counts := counts_text(entry, mode, listing.items, companions):
        logger.info("%s: %s", entry.label, counts)

    def work(item: SourceItem) -> Iterator[ItemReport]:
        yield look(item, entry, companions=companions.of(item))

    reports = [_left_out(problem, entry) for problem in listing.problems]
    shown = remarkable = 0
    streams = read_ahead(listing.items, work, workers=workers, describe=lambda item: str(item.path))
    with progress(total=len(listing.items), desc=f"{entry.label} ({entry.kind})", unit="file") as bar:
        for item, results in streams:
            for result in results:
                report = _failed(item, result.error) if isinstance(result, Failed) else result
                if shown < max_shown:
                    shown += 1
                elif report.all_findings and remarkable < max_shown:
                    remarkable += 1
                else:
                    report = _without_pictures(report)
                reports.append(report)
            bar.update()
    return sorted(reports, key=lambda report: report.item.path)


def _left_out(problem: Problem, entry: DatasetEntry) -> ItemReport:
    item = SourceItem(problem.path, problem.path.stem, "", entry.kind)
    return ItemReport(item, findings=(Finding("caption missing or unreadable", problem.reason, "error"),))


def _failed(item: SourceItem, error: Exception) -> ItemReport:
    logger.debug("%s", item.path, exc_info=error)
    return ItemReport(item, findings=(unreadable(item, error),))


def _without_pictures(report: ItemReport) -> ItemReport:
    return replace(report, companions=(), clips=tuple(replace(clip, preview=None) for clip in report.clips))


def _with(report: ItemReport, findings: Sequence[Finding]) -> ItemReport:
    return replace(report, findings=(*report.findings, *findings))


def _log(inspection: Inspection) -> None:
    for table in log_tables(inspection):
        logger.info("%s", table)
    for group in finding_groups(inspection):
        logger.log(_LEVELS[group.severity], "%s", group_line(group))
