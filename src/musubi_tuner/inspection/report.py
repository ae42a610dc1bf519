"""What was found in the datasets, added up for the log and the page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from musubi_tuner.common.tables import count_text, format_table
from musubi_tuner.config.model import Mode
from musubi_tuner.dataset.buckets import audio_bucket_step, quantize_audio_length
from musubi_tuner.dataset.entries import DatasetEntry

from .examine import ClipReport, ItemReport
from .findings import Severity

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class CachedClip:
    """A decoded cache."""

    base_name: str
    shape: str  # in words
    strip: bytes | None = field(default=None, repr=False)
    wave: tuple[int, ...] = ()
    media: Path | None = None  # the written video or sound
    error: str | None = None


@dataclass(frozen=True)
class DatasetReport:
    """One dataset."""

    entry: DatasetEntry
    items: Sequence[ItemReport]
    cached: Sequence[CachedClip] = ()

    def clips(self) -> Iterator[ClipReport]:
        for item in self.items:
            yield from item.clips

    @property
    def unusable(self) -> int:
        return sum(any(f.severity == "error" for f in item.findings) for item in self.items)

    @property
    def seconds_used(self) -> float:
        """Of all clips; overlapping ones count each."""
        return sum(clip.seconds for clip in self.clips())

    @property
    def seconds(self) -> float | None:
        """Of all sources; ``None`` for images."""
        durations = [item.duration for item in self.items if item.duration is not None]
        return sum(durations) if durations else None


@dataclass(frozen=True)
class Inspection:
    """All datasets of a configuration."""

    config: Path
    mode: Mode
    datasets: Sequence[DatasetReport]


@dataclass(frozen=True)
class BucketRow:
    """Clips that can be in one batch."""

    bucket: str
    frames: int
    clips: int
    video_tokens: int
    audio_tokens: tuple[int, int]  # least and most


@dataclass(frozen=True)
class FindingGroup:
    """Items with the same kind of finding."""

    kind: str
    severity: Severity
    items: Sequence[tuple[str, ItemReport]]  # with the label of their dataset


def bucket_rows(report: DatasetReport) -> list[BucketRow]:
    """By size and length; sounds by the length of their audio bucket."""
    groups: dict[tuple[str, int], list[ClipReport]] = defaultdict(list)
    entry = report.entry
    step = audio_bucket_step(entry.audio_bucket_interval)
    for clip in report.clips():
        bucket = f"{clip.bucket[0]}x{clip.bucket[1]}"
        if entry.kind == "audio":
            bucket = f"{quantize_audio_length(clip.audio_tokens, step, entry.audio_bucket_strategy) / 25:g} s"
        groups[bucket, clip.frames].append(clip)
    return [
        BucketRow(
            bucket,
            frames,
            len(clips),
            clips[0].video_tokens,
            (min(c.audio_tokens for c in clips), max(c.audio_tokens for c in clips)),
        )
        for (bucket, frames), clips in sorted(groups.items(), key=lambda pair: -len(pair[1]))
    ]


def finding_groups(inspection: Inspection) -> list[FindingGroup]:
    """The worst first, then the most frequent."""
    groups: dict[tuple[Severity, str], list[tuple[str, ItemReport]]] = defaultdict(list)
    for dataset in inspection.datasets:
        for item in dataset.items:
            for severity, kind in dict.fromkeys((f.severity, f.kind) for f in item.all_findings):
                groups[severity, kind].append((dataset.entry.label, item))
    found = [FindingGroup(kind, severity, items) for (severity, kind), items in groups.items()]
    return sorted(found, key=lambda g: (SEVERITIES.index(g.severity), -len(g.items), g.kind))


# --- text ---------------------------------------------------------------------------------------------------


def log_tables(inspection: Inspection) -> Iterable[str]:
    """Tables of the datasets and their buckets."""
    rows = []
    for dataset in inspection.datasets:
        clips, items = list(dataset.clips()), dataset.items
        total = dataset.seconds
        rows.append(
            [
                dataset.entry.label,
                dataset.entry.kind,
                len(items),
                dataset.unusable,
                len(clips),
                time_text(dataset.seconds_used) if total is not None else "-",
                time_text(total) if total is not None else "-",
                sum(1 for clip in clips if clip.audio_tokens),
                sum(any(f.severity == "warning" for f in item.all_findings) for item in items),
            ]
        )
    headers = ("dataset", "kind", "files", "unusable", "clips", "in clips", "in files", "with sound", "to look at")
    yield format_table(headers, rows, title=f"datasets, mode {inspection.mode}")
    buckets = [
        [dataset.entry.label, row.bucket, row.frames, row.clips, row.video_tokens, range_text(row.audio_tokens)]
        for dataset in inspection.datasets
        for row in bucket_rows(dataset)
    ]
    if buckets:
        yield format_table(
            ("dataset", "bucket", "frames", "clips", "video tokens", "audio tokens"), buckets, title="buckets"
        )


def group_line(group: FindingGroup) -> str:
    """One line of the log for a kind of finding."""
    shown = [
        f"{item.item.path.name} ({next(f.text for f in item.all_findings if f.kind == group.kind)})"
        for _, item in group.items[:_NAMES_SHOWN]
    ]
    more = f" and {len(group.items) - _NAMES_SHOWN} more" if len(group.items) > _NAMES_SHOWN else ""
    return f"{group.kind}: {count_text(len(group.items), 'file')}: {', '.join(shown)}{more}"


def time_text(seconds: float) -> str:
    """``75`` to ``1:15``, short times with their fraction."""
    if seconds < 60:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def range_text(bounds: tuple[int, int]) -> str:
    return str(bounds[0]) if bounds[0] == bounds[1] else f"{bounds[0]} to {bounds[1]}"
