"""Flags whose feature does not exist yet. They are known, so that a command that uses them gets an answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any

_OFF = "leave it out"

NOT_YET: Mapping[str, str] = {
    **dict.fromkeys(("video_role", "audio_role", "video_conditions", "audio_conditions"), _OFF),
    **dict.fromkeys(("blank_preservation", "blank_preservation_args", "dop", "dop_args", "dop_class_prompt"), _OFF),
    **dict.fromkeys(("prior_divergence", "prior_divergence_args", "audio_dop", "audio_dop_args"), _OFF),
    **dict.fromkeys(("precache_preservation_prompts", "use_precached_preservation"), _OFF),
    "preservation_prompts_cache": _OFF,
    **dict.fromkeys(("crepa", "crepa_args", "self_flow", "self_flow_args"), _OFF),
    "sample_include_reference": _OFF,
    **dict.fromkeys(("sample_two_stage", "spatial_upsampler_path", "distilled_lora_path"), _OFF),
    "sample_stage2_steps": _OFF,
}


def unavailable(config: Any) -> Iterable[str]:
    """One message that names every flag of a script's configuration whose feature does not exist yet."""
    asked = list(_asked(config))
    if asked:
        yield f"not available in this version: {'; '.join(asked)}"


def _asked(config: Any) -> Iterator[str]:
    for name, value, default in _values(config):
        if name in NOT_YET and value not in (default, "none"):
            yield f"--{name} ({NOT_YET[name]})"


def _values(config: Any) -> Iterator[tuple[str, Any, Any]]:
    """(name, value, default) of every flag."""
    for group_field in fields(config):
        group = getattr(config, group_field.name)
        yield from ((f.name, getattr(group, f.name), f.default) for f in fields(group))
