"""Flags of ``ltx2_demo.py``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .flag import flag
from .model import MODE_SHORT_FORMS, Mode, Version


@dataclass(frozen=True)
class DemoGroup:
    """Demo."""

    output_dir: Path = flag(Path("demo_output"), "folder of everything the demo writes")
    ltx_version: Version = flag("2.3", "version of the tiny model")
    ltx2_mode: Mode = flag("av", "what is trained", aliases=["ltx_mode"], values=MODE_SHORT_FORMS)
    max_train_steps: int = flag(300, "training steps")
    assets_only: bool = flag(False, "write the tiny model and the dataset, and stop")


@dataclass(frozen=True)
class DemoConfig:
    """``ltx2_demo.py``"""

    demo: DemoGroup = DemoGroup()
