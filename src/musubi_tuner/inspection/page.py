"""The page of an inspection: one HTML file that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

from musubi_tuner.common.atomic import write_text
from musubi_tuner.common.web_page import data_uri, section, web_page
from musubi_tuner.dataset.entries import DatasetEntry

from .companions import CompanionView
from .examine import ClipReport, ItemReport
from .findings import Finding
from .pictures import picture_width
from .report import (
    SEVERITIES,
    CachedClip,
    DatasetReport,
    FindingGroup,
    Inspection,
    bucket_rows,
    count_text,
    finding_groups,
    range_text,
    time_text,
)

_STYLE = Path(__file__).with_name("page.css")
_LINKED = 40  # names listed for one kind of finding; more are in the tables
_LONG_CAPTION = 300  # characters; longer ones open under the pointer
_CAPTION_LIMIT = 4000

_WORDS = {"error": "cannot be used", "warning": "look at it", "note": "note"}


def write_page(inspection: Inspection, path: Path) -> None:
    """Write the page whole or not at all."""
    files = sum(len(dataset.items) for dataset in inspection.datasets)
    lead = f"{inspection.config} · mode {inspection.mode}"
    anchors = _anchors(inspection)
    parts = [
        _totals(inspection, files),
        section("Findings", _groups(finding_groups(inspection), anchors)),
        "<div class='filter'><label><input type='checkbox' id='flagged'> only files with findings</label></div>",
        *(_dataset(dataset, anchors) for dataset in inspection.datasets),
    ]
    write_text(path, web_page("Dataset inspection", lead, "".join(parts), style=_STYLE.read_text(encoding="utf-8")))


Anchors = dict[tuple[str, Path], str]


def _anchors(inspection: Inspection) -> Anchors:
    """A short name for every item, wherever it is on the page."""
    return {
        (dataset.entry.label, report.item.path): f"d{number}i{index}"
        for number, dataset in enumerate(inspection.datasets)
        for index, report in enumerate(dataset.items)
    }


# --- above the datasets -------------------------------------------------------------------------------------


def _totals(inspection: Inspection, files: int) -> str:
    clips = [clip for dataset in inspection.datasets for clip in dataset.clips()]
    flagged = sum(bool(_worst(item) in ("error", "warning")) for d in inspection.datasets for item in d.items)
    values = {
        "files": files,
        "cannot be used": sum(dataset.unusable for dataset in inspection.datasets),
        "to look at": flagged,
        "clips": len(clips),
        "clips with sound": sum(1 for clip in clips if clip.audio_tokens),
        "seconds in clips": f"{sum(clip.seconds for clip in clips):.1f}",
        "longest, in tokens": max((clip.video_tokens + clip.audio_tokens for clip in clips), default=0),
    }
    cells = "".join(f"<span><b>{value}</b>{escape(name)}</span>" for name, value in values.items())
    return f"<section class='totals'>{cells}</section>"


def _groups(groups: Iterable[FindingGroup], anchors: Anchors) -> str:
    rows = "".join(
        f"<li>{_badge(group.severity, _WORDS[group.severity])}<details><summary>{escape(group.kind)}: "
        f"{count_text(len(group.items), 'file')}</summary>{_linked(group, anchors)}</details></li>"
        for group in groups
    )
    return f"<ul class='groups'>{rows}</ul>" if rows else f"<p>{_badge('fine', 'fine')} nothing remarkable</p>"


def _linked(group: FindingGroup, anchors: Anchors) -> str:
    lines = []
    for label, report in group.items[:_LINKED]:
        text = next(f.text for f in report.all_findings if f.kind == group.kind)
        target = anchors[label, report.item.path]
        name = escape(report.item.path.name)
        lines.append(f"<small><a href='#{target}'>{name}</a>: {escape(text)}</small>")
    if len(group.items) > _LINKED:
        lines.append(f"<small>and {len(group.items) - _LINKED} more, see the tables</small>")
    return "".join(lines)


# --- one dataset --------------------------------------------------------------------------------------------


def _dataset(report: DatasetReport, anchors: Anchors) -> str:
    entry = report.entry
    shown = [item for item in report.items if _is_shown(item)]
    cards = "".join(_card(item, anchors[entry.label, item.item.path]) for item in shown)
    hidden = [item for item in report.items if not _is_shown(item)]
    more = _aside(f"{count_text(len(hidden), 'more file')} in the table only (--max_items)") if hidden else ""
    hidden_paths = {item.item.path for item in hidden}
    rows = "".join(
        _file_row(item, anchors[entry.label, item.item.path], anchored=item.item.path in hidden_paths)
        for item in report.items
    )
    headers = "".join(
        f"<th>{h}</th>" for h in ("file", "size", "length", "clips", "bucket", "tokens", "sound", "findings")
    )
    table = (
        f"<details><summary>All {count_text(len(report.items), 'file')} as a table</summary>"
        f"<div class='wide'><table class='files'><tr>{headers}</tr>{rows}</table></div></details>"
    )
    body = _aside(_settings(entry)) + _bucket_table(report)
    if report.items:
        body += table + cards + more
    elif not report.cached:
        body += _aside("no sources to look at; --decode_caches shows the caches")
    body += _cached(report.cached)
    return section(f"{entry.label}: {entry.kind}", body)


def _is_shown(report: ItemReport) -> bool:
    """Whether the item gets a card: it has pictures, or nothing to show but an error."""
    return any(clip.preview for clip in report.clips) or (not report.clips and bool(report.findings))


def _settings(entry: DatasetEntry) -> str:
    width, height = entry.resolution
    parts = [str(entry.source or f"{entry.cache_directory} (caches only)")]
    if entry.kind != "audio":
        buckets = " with buckets" if entry.enable_bucket else ""
        parts.append(f"{width}x{height}{buckets}{', not enlarged' if entry.bucket_no_upscale else ''}")
    if entry.kind == "video":
        how = {
            "slide": f"slide, frame_stride {entry.frame_stride}",
            "uniform": f"uniform, frame_sample {entry.frame_sample}",
            "full": f"full, max_frames {entry.max_frames}",
        }.get(entry.frame_extraction, entry.frame_extraction)
        lengths = "" if entry.frame_extraction == "full" else f"{', '.join(map(str, entry.target_frames))} frames, "
        parts.append(f"{lengths}{how}, {entry.target_fps:g} FPS")
    if entry.kind == "audio":
        parts.append(f"audio buckets of {entry.audio_bucket_interval:g} s, {entry.audio_bucket_strategy}")
    parts += [f"batch_size {entry.batch_size}", *([f"repeated {entry.num_repeats}x"] if entry.num_repeats > 1 else [])]
    return " · ".join(parts)


def _bucket_table(report: DatasetReport) -> str:
    rows = bucket_rows(report)
    if not rows:
        return ""
    cells = "".join(
        f"<tr><td>{escape(row.bucket)}</td><td>{row.frames or '-'}</td><td>{row.clips}</td>"
        f"<td>{row.video_tokens or '-'}</td>"
        f"<td>{range_text(row.audio_tokens) if row.audio_tokens[1] else '-'}</td></tr>"
        for row in rows
    )
    headers = _headers("bucket", "frames", "clips", "video tokens", "audio tokens")
    return f"<div class='wide'><table class='buckets'><tr>{headers}</tr>{cells}</table></div>"


def _file_row(report: ItemReport, anchor: str, *, anchored: bool) -> str:
    plan, clips = report.plan, report.clips
    buckets = dict.fromkeys(f"{c.bucket[0]}x{c.bucket[1]}" for c in clips if c.video_tokens)
    tokens = dict.fromkeys(c.video_tokens + c.audio_tokens for c in clips)
    cells = [
        f"{plan.size[0]}x{plan.size[1]}" if plan and plan.size else "",
        time_text(report.duration) if report.duration is not None else "",
        str(len(clips)),
        ", ".join(buckets),
        ", ".join(map(str, tokens)),
        "yes" if report.has_sound else "",
        "; ".join(dict.fromkeys(f.kind for f in report.all_findings)),
    ]
    name = escape(report.item.path.name)
    first = f"<td id='{anchor}'>{name}</td>" if anchored else f"<td><a href='#{anchor}'>{name}</a></td>"
    return f"<tr>{first}{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


# --- one file -----------------------------------------------------------------------------------------------


def _card(report: ItemReport, anchor: str) -> str:
    plan, clips = report.plan, report.clips
    facts = []
    if plan and plan.size:
        buckets = dict.fromkeys(f"{c.bucket[0]}x{c.bucket[1]}" for c in clips)
        facts.append(f"{plan.size[0]}x{plan.size[1]} → {', '.join(buckets) or '-'}")
    if report.duration is not None:
        facts.append(time_text(report.duration))
    facts += [report.timing] if report.timing else []
    if clips:
        facts.append(count_text(len(clips), "clip"))
    link = escape(report.item.path.absolute().as_uri(), quote=True)
    header = f"<b><a href='{link}'>{escape(report.item.path.name)}</a></b>"
    header += "".join(f"<span>{escape(fact)}</span>" for fact in facts)
    shown = [clip for clip in clips if clip.preview]
    more = _aside(f"and {count_text(len(clips) - len(shown), 'more clip')}") if len(clips) > len(shown) > 0 else ""
    return (
        f"<article id='{anchor}'{' class=remarkable' if report.all_findings else ''}><header>{header}</header>"
        f"{_caption(report.item.caption)}{_remarks(report.findings)}{_timeline(report)}"
        f"{''.join(map(_clip, shown))}{more}{''.join(map(_companion, report.companions))}</article>"
    )


def _caption(caption: str) -> str:
    if not caption:
        return ""
    long = " long" if len(caption) > _LONG_CAPTION else ""
    cut = caption if len(caption) <= _CAPTION_LIMIT else caption[:_CAPTION_LIMIT] + " …"
    return f"<p class='caption{long}'>{escape(cut)}</p>"


def _remarks(findings: Iterable[Finding]) -> str:
    ordered = sorted(findings, key=lambda f: SEVERITIES.index(f.severity))
    rows = "".join(f"<li>{_badge(f.severity, f.kind)}{escape(f.text)}</li>" for f in ordered)
    return f"<ul class='remarks'>{rows}</ul>" if rows else ""


def _timeline(report: ItemReport) -> str:
    """The seconds of the source that clips show, and why the rest is not used."""
    uses = [clip.use for clip in report.clips if clip.use]
    if not uses or not report.duration:
        return ""
    scale = 1000 / report.duration
    bars = "".join(
        f"<rect x='{use.start * scale:.1f}' width='{max((use.end - use.start) * scale - 2, 1):.1f}' height='12' rx='2' "
        "fill='currentColor' opacity='0.75'/>"
        for use in uses
    )
    lost = sum(part.end - part.start for part in report.unused)
    reasons = ", ".join(dict.fromkeys(part.reason for part in report.unused))
    text = f"{time_text(lost)} not used: {reasons}" if lost > 0 else "used to the end"
    return (
        "<div class='timeline'><svg viewBox='0 0 1000 12' preserveAspectRatio='none'>"
        f"<rect class='all' width='1000' height='12' rx='2'/>{bars}</svg><span>{escape(text)}</span></div>"
    )


def _companion(view: CompanionView) -> str:
    return _figure(strip=view.strip, wave=view.wave, text=escape(view.text))


def _clip(clip: ClipReport) -> str:
    assert clip.preview is not None
    return _figure(
        strip=clip.preview.strip, wave=clip.preview.wave, text=_clip_facts(clip), below=_remarks(clip.findings)
    )


def _clip_facts(clip: ClipReport) -> str:
    facts = []
    if clip.use is not None:
        facts.append(f"{clip.use.start:.2f} to {clip.use.end:.2f} s")
        source = f"source frames {clip.use.first} to {clip.use.last}"
        repeated = clip.frames - clip.use.used
        changes = [f"{clip.use.dropped} dropped"] if clip.use.dropped else []
        changes += [f"{repeated} repeated"] if repeated > 0 else []
        facts += [f"{clip.frames} frames", source + (f" ({', '.join(changes)})" if changes else "")]
    elif clip.video_tokens == 0:
        facts.append(time_text(clip.seconds))
    if clip.video_tokens:
        facts.append(f"{clip.video_tokens} video tokens")
    if clip.audio_tokens:
        facts.append(f"{clip.audio_tokens} audio tokens")
    if clip.level is not None:
        facts.append(f"{clip.level:.0f} dB")
    return f"{escape(clip.base_name)}: {escape(', '.join(facts))}"


def _figure(*, strip: bytes | None, wave: tuple[int, ...], text: str, below: str = "") -> str:
    """``text`` and ``below`` are HTML."""
    image = ""
    if strip is not None:
        image = f"<img alt='' width='{picture_width(strip)}' src='{data_uri('image/jpeg', strip)}'>"
    pictures = f"<div class='pictures'>{image}{_wave(wave)}</div>"
    kind = "clip" if strip is not None else "clip sound"
    return f"<figure class='{kind}'>{pictures}<figcaption>{text}</figcaption>{below}</figure>"


def _wave(bars: tuple[int, ...]) -> str:
    """The envelope, mirrored; a thin line where it is silent."""
    if not bars:
        return ""
    heights = [max(bar, 1) / 2 for bar in bars]
    above = [f"{i} {50 - height:g}" for i, height in enumerate(heights)]
    below = [f"{i} {50 + height:g}" for i, height in enumerate(heights)]
    return (
        f"<svg viewBox='0 0 {max(len(bars) - 1, 1)} 100' preserveAspectRatio='none' role='img'>"
        f"<path d='M{'L'.join(above + below[::-1])}Z' fill='currentColor'/></svg>"
    )


# --- caches -------------------------------------------------------------------------------------------------


def _cached(clips: Iterable[CachedClip]) -> str:
    parts = []
    for clip in clips:
        name = escape(clip.base_name)
        if clip.error is not None:
            parts.append(f"<p>{_badge('error', 'cannot be decoded')} {name}: {escape(clip.error)}</p>")
            continue
        linked = f"<a href='{escape(clip.media.absolute().as_uri(), quote=True)}'>{name}</a>" if clip.media else name
        parts.append(_figure(strip=clip.strip, wave=clip.wave, text=f"{linked}: {escape(clip.shape)}"))
    if not parts:
        return ""
    return f"<details open><summary>Decoded caches: {len(parts)}</summary>{''.join(parts)}</details>"


# --- small things -------------------------------------------------------------------------------------------


def _badge(kind: str, text: str) -> str:
    return f"<span class='badge {kind}'>{escape(text)}</span>"


def _aside(text: str) -> str:
    return f"<p class='aside'>{escape(text)}</p>"


def _headers(*names: str) -> str:
    return "".join(f"<th>{name}</th>" for name in names)


def _worst(report: ItemReport) -> str | None:
    found = [SEVERITIES.index(f.severity) for f in report.all_findings]
    return SEVERITIES[min(found)] if found else None
