"""Flags of what each stream is for, and what of it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .flag import flag

Role = Literal["generated", "frozen", "absent"]


@dataclass(frozen=True)
class RoleConfig:
    """Roles of the streams (not available yet)."""

    video_role: Role | None = flag(None, "the video is trained, given clean or left out (not available yet)")
    audio_role: Role | None = flag(None, "the same for the sound (not available yet)")
    video_conditions: tuple[str, ...] = flag(
        (), "what of the video is given, type[:parameter][@probability] (not available yet)"
    )
    audio_conditions: tuple[str, ...] = flag((), "the same for the sound (not available yet)")
