"""``--config_file``: flags in TOML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from musubi_tuner.common.errors import did_you_mean
from musubi_tuner.common.text_files import read_toml


def read_config_file(
    path: Path, spellings: Mapping[str, tuple[Any, bool]], problems: list[str]
) -> dict[str, tuple[str, Any]]:
    """Flags of a TOML file: flag name -> (key as written, raw value).

    One level of tables is flattened and its names are ignored. Keys may be any spelling of a flag, also a
    negated one (``no_convert_to_comfy = true``). Unknown and repeated keys are appended to ``problems``.
    """
    if not path.suffix and not path.exists():
        path = path.with_suffix(".toml")
    found: dict[str, tuple[str, Any]] = {}
    for key, value in _flattened(read_toml(path), path, problems):
        entry = spellings.get(key.replace("-", "_"))
        if entry is None:
            problems.append(f"{path}: unknown key {key!r}{did_you_mean(key, spellings)}")
            continue
        spec, negated = entry
        if spec.name in found:
            problems.append(f"{path}: {key!r} repeats {found[spec.name][0]!r}")
        found[spec.name] = (key, not value if negated and isinstance(value, bool) else value)
    return found


def _flattened(document: dict[str, Any], path: Path, problems: list[str]) -> list[tuple[str, Any]]:
    pairs = []
    for key, value in document.items():
        if not isinstance(value, dict):
            pairs.append((key, value))
            continue
        for inner, inner_value in value.items():
            if isinstance(inner_value, dict):
                problems.append(f"{path}: table [{key}.{inner}] is nested too deep; one level of tables is read")
            else:
                pairs.append((inner, inner_value))
    return pairs
