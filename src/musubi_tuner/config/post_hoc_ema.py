"""Flags of ``ltx2_lora_post_hoc_ema.py``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .flag import flag
from .rules_common import missing, output_file


@dataclass(frozen=True)
class EmaFiles:
    """Files."""

    path: tuple[Path, ...] = flag((), "LoRA files of a run, at least two (required)", metavar="FILES", positional=True)
    output_file: Path | None = flag(None, "the averaged LoRA to write (required)", metavar="FILE")
    sort: bool = flag(True, "average in the order in which the files were written; --no_sort: as given")


@dataclass(frozen=True)
class EmaOptions:
    """Averaging."""

    beta: float = flag(0.95, "how much of the average stays at each file, 0 to 1")
    beta2: float | None = flag(None, "let beta go in equal steps to this at the last file")
    sigma_rel: float | None = flag(
        None, "average by a power function of this relative width instead of beta, above 0 and below 0.2887"
    )


@dataclass(frozen=True)
class EmaConfig:
    """``ltx2_lora_post_hoc_ema.py``"""

    files: EmaFiles = EmaFiles()
    options: EmaOptions = EmaOptions()


def ema_rules(parsed: Any) -> Iterable[str]:
    """Every violation."""
    files, options = parsed.config.files, parsed.config.options
    if len(files.path) < 2:
        yield f"name at least two LoRA files, got {len(files.path)}"
    for path in files.path:
        if not path.exists():
            yield from missing({"path": path})
    if files.output_file is None:
        yield "--output_file is required"
    else:
        yield from output_file("output_file", files.output_file, files.path)
    for name, value in (("beta", options.beta), ("beta2", options.beta2)):
        if value is not None and not 0 <= value <= 1:
            yield f"--{name} {value}: expected 0 to 1"
    if options.sigma_rel is not None:
        if not 0 < options.sigma_rel < 12**-0.5:
            yield f"--sigma_rel {options.sigma_rel}: expected above 0 and below 0.2887"
        if {"beta", "beta2"} & parsed.explicit:
            yield "--sigma_rel sets beta at each file; leave out --beta and --beta2"
