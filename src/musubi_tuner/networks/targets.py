"""Which Linear layers of the transformer a network adapts.

Candidates are the Linear layers inside ``transformer_blocks``; embeddings, output heads and connectors are
never adapted. A candidate is a target when an include pattern (of the user, else of the preset) matches its
dotted path and no exclude pattern does. Patterns match the whole path (``re.fullmatch``).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from typing import Literal

from torch import nn

from musubi_tuner.common.errors import UserError
from musubi_tuner.common.registry import Registry

logger = logging.getLogger(__name__)

TargetModality = Literal["video", "audio", "cross"]

_CROSS_MODAL = ("audio_to_video_attn", "video_to_audio_attn")
_IN_BLOCK = re.compile(r"transformer_blocks\.\d+\..+")


def _projections(attention: str) -> tuple[str, ...]:
    return tuple(rf".*\.{attention}\.{p}$" for p in ("to_k", "to_q", "to_v", r"to_out\.0"))


def _feed_forward(name: str) -> tuple[str, ...]:
    return (rf".*\.{name}\.net\.0\.proj$", rf".*\.{name}\.net\.2$")


_ALL_ATTENTION = (r".*\.to_k$", r".*\.to_q$", r".*\.to_v$", r".*\.to_out\.0$")
_AUDIO = (
    *_projections("audio_attn1"),
    *_projections("audio_attn2"),
    *_feed_forward("audio_ff"),
    *_projections("video_to_audio_attn"),
)

DEFAULT_PRESET = "t2v"
# Include patterns; none at all means every candidate.
PRESETS: Registry[tuple[str, ...]] = Registry("LoRA target preset")
PRESETS.register("t2v")(_ALL_ATTENTION)
PRESETS.register("v2v")((*_ALL_ATTENTION, *_feed_forward("ff"), *_feed_forward("audio_ff")))
PRESETS.register("audio")(_AUDIO)
PRESETS.register("audio_ref_only_ic")((*_AUDIO, *_projections("audio_to_video_attn")))
PRESETS.register("full")(())
PRESETS.register("no_gates")((r".*(?<!\.to_gate_logits)$",))


def select_targets(
    model: nn.Module | Iterable[str],
    preset: str | None = None,
    include_patterns: Sequence[str] | None = None,
    exclude_patterns: Sequence[str] | None = None,
    *,
    quiet: bool = False,
) -> list[str]:
    """Dotted paths of the Linear layers to adapt, in model order.

    Args:
        model: the transformer, or the names of its modules.
        preset: a name of :data:`PRESETS`; ``None`` takes ``t2v``.
        include_patterns: regexes that replace the preset's (with a warning when a preset was named too).
        exclude_patterns: regexes of paths to leave out; they win over everything.
        quiet: say nothing of patterns that match no layer; for whoever asks before the network is made.

    Raises:
        UserError: unknown preset or invalid regex.
    """
    candidates = linear_names(model) if isinstance(model, nn.Module) else [n for n in model if _IN_BLOCK.fullmatch(n)]
    include = compile_patterns(PRESETS[preset or DEFAULT_PRESET], "preset")
    if include_patterns:
        if preset is not None and not quiet:
            logger.warning("include_patterns replace the target preset %r", preset)
        include = compile_patterns(include_patterns, "include_patterns")
        _warn_unmatched(() if quiet else include, candidates, "include_patterns")
    exclude = compile_patterns(exclude_patterns or (), "exclude_patterns")
    _warn_unmatched(() if quiet else exclude, candidates, "exclude_patterns")
    return [n for n in candidates if (not include or _matches(include, n)) and not _matches(exclude, n)]


def linear_names(transformer: nn.Module) -> list[str]:
    """Dotted paths of all Linear layers (also of subclasses, e.g. quantised ones) inside the blocks."""
    return [n for n, m in transformer.named_modules() if isinstance(m, nn.Linear) and _IN_BLOCK.fullmatch(n)]


def modality_of(name: str) -> TargetModality:
    """The stream a module (dotted or flat name) belongs to; cross-modal attention counts as its own."""
    if any(part in name for part in _CROSS_MODAL):
        return "cross"
    return "audio" if "audio_" in name else "video"


def output_stream(name: str) -> Literal["video", "audio"]:
    """The stream that a module's output goes into: attention between the streams belongs to the one that it changes."""
    if "video_to_audio_attn" in name or "v2a_gate" in name:
        return "audio"
    if "audio_to_video_attn" in name:
        return "video"
    return "audio" if "audio_" in name else "video"


def compile_patterns(patterns: Iterable[str], source: str) -> list[re.Pattern[str]]:
    """Compile regexes.

    Raises:
        UserError: one is invalid; the message names it and ``source``.
    """
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise UserError(f"{source}: {pattern!r} is not a valid regular expression ({error})") from None
    return compiled


def longest_match(patterns: Iterable[re.Pattern[str]], name: str) -> str | None:
    """The longest pattern that is found anywhere in ``name``; of equally long ones the first."""
    found = [p.pattern for p in patterns if p.search(name)]
    return max(found, key=len, default=None)


def _matches(patterns: Sequence[re.Pattern[str]], name: str) -> bool:
    return any(p.fullmatch(name) for p in patterns)


def _warn_unmatched(patterns: Sequence[re.Pattern[str]], names: Sequence[str], source: str) -> None:
    for pattern in patterns:
        if not any(pattern.fullmatch(n) for n in names):
            logger.warning("%s: %r matches no layer (a pattern has to match the whole path)", source, pattern.pattern)
