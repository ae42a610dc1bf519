"""The demo's report: one HTML file that needs nothing beside it."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from musubi_tuner.common.atomic import write_text
from musubi_tuner.common.web_page import data_uri, section, web_page

_STYLE = Path(__file__).with_name("report.css")
_FOOTER = "Clips: Big Buck Bunny, (c) Blender Foundation, bigbuckbunny.org, CC BY 3.0."
_TYPES = {".mp4": "video/mp4", ".png": "image/png", ".wav": "audio/wav"}


@dataclass(frozen=True)
class Step:
    """One command of the demo."""

    title: str
    command: str
    seconds: float


@dataclass(frozen=True)
class Check:
    """Something the demo proved, or failed to."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Sample:
    """A rendered file and what to say below it."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Curve:
    """Points (step, value) of one line."""

    name: str
    points: Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Report:
    title: str
    summary: str
    checks: Sequence[Check]
    curves: Mapping[str, Sequence[Curve]]  # chart title -> lines
    samples: Mapping[str, Sequence[Sample]]  # heading -> files
    settings: Mapping[str, object]
    steps: Sequence[Step]


def write_report(report: Report, path: Path) -> None:
    """Write the page; videos and sounds are embedded."""
    sections = [
        section("Checks", _checks(report.checks)),
        section("Loss", "".join(_chart(title, curves) for title, curves in report.curves.items())),
        *(section(heading, _gallery(samples)) for heading, samples in report.samples.items() if samples),
        section("Commands", _commands(report.steps)),
        section("Settings", _settings(report.settings)),
    ]
    style = _STYLE.read_text(encoding="utf-8")
    body = f"{''.join(sections)}<footer>{_FOOTER}</footer>"
    write_text(path, web_page(report.title, report.summary, body, style=style))


def _checks(checks: Sequence[Check]) -> str:
    rows = "".join(
        f"<li class='{'ok' if c.passed else 'bad'}'><b>{'pass' if c.passed else 'FAIL'}</b>"
        f"<span>{html.escape(c.name)}<small>{html.escape(c.detail)}</small></span></li>"
        for c in checks
    )
    return f"<ul class='checks'>{rows}</ul>"


def _gallery(samples: Sequence[Sample]) -> str:
    return f"<div class='gallery'>{''.join(_figure(s) for s in samples)}</div>"


def _figure(sample: Sample) -> str:
    kind = _TYPES[sample.path.suffix]
    data = data_uri(kind, sample.path.read_bytes())
    if kind.startswith("video"):
        media = f"<video controls loop muted playsinline autoplay src='{data}'></video>"
    elif kind.startswith("audio"):
        media = f"<audio controls src='{data}'></audio>"
    else:
        media = f"<img alt='' src='{data}'>"
    return f"<figure>{media}<figcaption>{html.escape(sample.caption)}</figcaption></figure>"


def _commands(steps: Sequence[Step]) -> str:
    return "".join(
        f"<h3>{html.escape(s.title)} <small>{s.seconds:.1f} s</small></h3><pre>{html.escape(s.command)}</pre>"
        for s in steps
    )


def _settings(settings: Mapping[str, object]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(str(v))}</td></tr>" for k, v in settings.items()
    )
    return f"<table>{rows}</table>"


# --- charts ---

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 640, 240, 52, 28, 12
_COLOURS = ("#2563eb", "#d97706", "#059669", "#7c3aed")


def _chart(title: str, curves: Sequence[Curve]) -> str:
    """An SVG line chart with axes."""
    curves = [c for c in curves if c.points]
    if not curves:
        return ""
    steps = [s for c in curves for s, _ in c.points]
    values = [v for c in curves for _, v in c.points]
    x_range, ticks = (min(steps), max(max(steps), min(steps) + 1)), _ticks(min(values), max(values))
    y_range = (ticks[0], ticks[-1])

    def place(step: float, value: float) -> tuple[float, float]:
        x = _LEFT + (step - x_range[0]) / (x_range[1] - x_range[0]) * (_WIDTH - _LEFT - 12)
        y = _HEIGHT - _BOTTOM - (value - y_range[0]) / (y_range[1] - y_range[0]) * (_HEIGHT - _BOTTOM - _TOP)
        return x, y

    grid = "".join(
        f"<line x1='{_LEFT}' x2='{_WIDTH - 12}' y1='{place(x_range[0], t)[1]:.1f}' y2='{place(x_range[0], t)[1]:.1f}'/>"
        f"<text x='{_LEFT - 6}' y='{place(x_range[0], t)[1] + 4:.1f}' text-anchor='end'>{t:g}</text>"
        for t in ticks
    )
    middle = (x_range[0] + x_range[1]) // 2
    grid += "".join(
        f"<text x='{place(s, y_range[0])[0]:.1f}' y='{_HEIGHT - 8}' text-anchor='middle'>{s}</text>"
        for s in (x_range[0], middle, x_range[1])
    )
    lines = "".join(
        f"<polyline stroke='{_COLOURS[i % len(_COLOURS)]}' points='"
        + " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(s, v) for s, v in c.points))
        + "'/>"
        for i, c in enumerate(curves)
    )
    legend = "".join(
        f"<span><i style='background:{_COLOURS[i % len(_COLOURS)]}'></i>{html.escape(c.name)}</span>"
        for i, c in enumerate(curves)
    )
    return (
        f"<figure class='chart'><figcaption>{html.escape(title)} <em>{legend}</em></figcaption>"
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img'>{grid}{lines}</svg></figure>"
    )


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers around a range."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / 4
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= raw)
    first = math.floor(low / step)
    last = math.ceil(high / step)
    return [round(i * step, 10) for i in range(first, last + 1)]
