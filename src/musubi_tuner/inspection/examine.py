"""One source item as training will see it: decoded once, kept as numbers and small pictures."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

from musubi_tuner.common.errors import UserError
from musubi_tuner.config.model import Mode
from musubi_tuner.dataset.buckets import Size, audio_latent_length, latent_grid
from musubi_tuner.dataset.clip_sound import AudioSource
from musubi_tuner.dataset.clips import PreparedClip, iter_clips, require_files
from musubi_tuner.dataset.companions import Companions
from musubi_tuner.dataset.entries import DatasetEntry
from musubi_tuner.dataset.frames import ClipWindow
from musubi_tuner.dataset.plan import ItemPlan, plan_item
from musubi_tuner.dataset.sources import SourceItem

from .companions import Accompanied, CompanionView, look_at
from .findings import Finding, caption_findings, level_db, picture_findings, size_findings, sound_findings
from .pictures import frame_strip, wave_bars
from .timing import FrameUse, Timing, read_timing

logger = logging.getLogger(__name__)

CLIPS_SHOWN = 6  # of one file, with pictures


@dataclass(frozen=True)
class Preview:
    """Small pictures of one clip."""

    strip: bytes | None = field(default=None, repr=False)  # JPEG
    wave: tuple[int, ...] = ()  # see wave_bars


@dataclass(frozen=True)
class ClipReport:
    """One training sample."""

    base_name: str
    bucket: Size
    frames: int  # at the target rate; 0: sound alone
    seconds: float
    video_tokens: int
    audio_tokens: int
    window: ClipWindow | None = None
    use: FrameUse | None = None  # of the source, for videos
    level: float | None = None  # dB of the sound
    findings: tuple[Finding, ...] = ()
    preview: Preview | None = None


@dataclass(frozen=True)
class Unused:
    """A part of a video that no clip shows."""

    start: float  # seconds
    end: float
    reason: str


@dataclass(frozen=True)
class ItemReport:
    """One source file."""

    item: SourceItem
    plan: ItemPlan | None = None  # None: its header cannot be read
    clips: tuple[ClipReport, ...] = ()
    timing: str = ""  # the frame-rate rule in words
    duration: float | None = None  # seconds
    unused: tuple[Unused, ...] = ()
    findings: tuple[Finding, ...] = ()
    companions: tuple[CompanionView, ...] = ()  # references and masks

    @property
    def all_findings(self) -> tuple[Finding, ...]:
        """Of the file and its clips."""
        return (*self.findings, *(finding for clip in self.clips for finding in clip.findings))

    @property
    def has_sound(self) -> bool:
        return any(clip.audio_tokens for clip in self.clips)


def examine(
    item: SourceItem,
    entry: DatasetEntry,
    *,
    mode: Mode,
    audio_source: AudioSource,
    companions: Companions = Companions(),  # noqa: B008 (frozen)
    reference_seconds: float | None = None,
) -> ItemReport:
    """Decode an item clip by clip, with what accompanies the first. A damaged file becomes a finding.

    Args:
        reference_seconds: of a reference sound that are used; ``None`` = the whole.
    """
    findings = list(caption_findings(item.caption))
    clips: list[ClipReport] = []
    plan: ItemPlan | None = None
    timing: Timing | None = None
    accompanied = Accompanied()
    try:
        require_files(item, with_audio=mode == "av")
        plan = plan_item(item, entry, audio_source)
        if plan.size is not None:
            findings += size_findings(plan.size, plan.bucket)
        rate = entry.source_fps or plan.fps
        if item.kind == "video" and rate:
            timing = read_timing(item.path, entry, rate)
            findings += _timing_findings(timing)
        for clip in iter_clips(item, entry, with_audio=mode == "av", audio_source=audio_source):
            if item.path.is_dir() and not clips:
                findings += _order_findings(clip)
            if not clips:
                accompanied = look_at(companions, entry, mode, clip, reference_seconds)
            clips.append(_clip_report(clip, timing, pictures=len(clips) < CLIPS_SHOWN))
        findings += _length_findings(entry, plan, clips)
    except UserError as error:
        findings.append(unreadable(item, error))
    if plan is not None and plan.has_audio and mode == "video":
        findings.append(Finding("sound not used", "has sound, which mode video does not use", "note"))
    return ItemReport(
        item,
        plan,
        tuple(sorted(clips, key=lambda c: (c.frames, c.window.start if c.window else 0))),
        timing=timing.describe() if timing else "",
        duration=timing.duration if timing else _duration(plan, clips),
        unused=tuple(_unused(entry, timing, clips)) if timing else (),
        findings=(*findings, *accompanied.findings),
        companions=accompanied.views,
    )


def unreadable(item: SourceItem, error: Exception) -> Finding:
    """Why a file cannot be used, without its folder."""
    text = str(error) if isinstance(error, (UserError, OSError)) else f"{type(error).__name__}: {error}"
    return Finding("unreadable", text.replace(f"{item.path}: ", ""), "error")


def _clip_report(clip: PreparedClip, timing: Timing | None, *, pictures: bool) -> ClipReport:
    findings: list[Finding] = []
    if clip.pixels is not None:
        findings += picture_findings(clip.pixels)
    if clip.waveform is not None:
        findings += sound_findings(clip.waveform)
    elif clip.audio_status == "absent":
        findings.append(Finding("no sound", f"no sound ({clip.notes[-1]})" if clip.notes else "no sound"))
    tokens = 0
    if clip.pixels is not None:
        frames, height, width = latent_grid(len(clip.pixels), clip.bucket)
        tokens = frames * height * width
    preview = Preview(
        frame_strip(clip.pixels) if clip.pixels is not None else None,
        wave_bars(clip.waveform) if clip.waveform is not None else (),
    )
    return ClipReport(
        base_name=clip.base_name,
        bucket=clip.bucket,
        frames=len(clip.pixels) if clip.pixels is not None else 0,
        seconds=clip.duration,
        video_tokens=tokens,
        audio_tokens=audio_latent_length(clip.waveform.shape[1]) if clip.waveform is not None else 0,
        window=clip.window,
        use=timing.use(clip.window) if timing and clip.window else None,
        level=level_db(clip.waveform) if clip.waveform is not None else None,
        findings=tuple(findings),
        preview=preview if pictures else None,
    )


def _duration(plan: ItemPlan | None, clips: list[ClipReport]) -> float | None:
    if plan is None or plan.item.kind != "audio":
        return None
    return clips[0].seconds if clips else plan.duration


def _timing_findings(timing: Timing) -> Iterable[Finding]:
    if timing.rate.variable:
        yield Finding("variable frame rate", timing.describe(), "note")
    elif timing.rate.resample:
        yield Finding("resampled", timing.describe(), "note")
    if timing.rate.resample and timing.rate.source < timing.rate.target - 1:
        text = f"{timing.rate.source:.5g} FPS is below target_fps {timing.rate.target:.5g}: frames are repeated"
        yield Finding("repeats frames", f"{text}; set target_fps")


def _order_findings(clip: PreparedClip) -> Iterable[Finding]:
    """Of a folder of images whose names are in another order than their numbers."""
    notes = clip.notes[:-1] if clip.audio_status == "absent" else clip.notes
    yield from (Finding("order of images", note) for note in notes if "by name" in note)


def _length_findings(entry: DatasetEntry, plan: ItemPlan, clips: list[ClipReport]) -> Iterable[Finding]:
    if plan.item.kind != "video":
        return
    made = {clip.frames for clip in clips}
    wanted = () if entry.frame_extraction == "full" else entry.target_frames
    short = [frames for frames in wanted if frames not in made]
    if short:
        lengths = ", ".join(map(str, short))
        yield Finding(
            "too short", f"shorter than {lengths} frames at {entry.target_fps:.5g} FPS: no clip of that length"
        )
    elif not clips:
        yield Finding("too short", "gives no clip")


# --- what is not used ---------------------------------------------------------------------------------------


def _unused(entry: DatasetEntry, timing: Timing, clips: list[ClipReport]) -> Iterable[Unused]:
    """Gaps between and behind the clips, in seconds of the source."""
    if not clips:
        return
    reached = 0
    for window in sorted((clip.window for clip in clips if clip.window), key=lambda w: w.start):
        if window.start > reached:
            yield Unused(timing.second(reached), timing.second(window.start), _reason(entry, between=True))
        reached = max(reached, window.end)
    if reached < len(timing.indices):
        yield Unused(timing.second(reached), timing.duration, _reason(entry, between=False))


def _reason(entry: DatasetEntry, *, between: bool) -> str:
    mode, shortest = entry.frame_extraction, min(entry.target_frames)
    if mode == "head":
        return "head takes one clip from the beginning"
    if mode == "chunk":
        return f"less than a clip of {shortest} frames is left"
    if mode == "slide":
        return f"frame_stride {entry.frame_stride} steps over it"
    if mode == "uniform":
        return f"frame_sample {entry.frame_sample} clips do not cover it"
    return f"beyond max_frames {entry.max_frames}, or not a multiple of 8 frames"
