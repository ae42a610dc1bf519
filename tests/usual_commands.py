"""The commands of the usual recipes, as users have them in their notes.

``usual_commands.txt`` holds them with the ``^`` of Windows prompts and with ``...`` for what is left out, each after
the flags that are refused, since their feature does not exist yet.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from musubi_tuner.cli.parser import flag_specs
from musubi_tuner.cli.scripts import SCRIPTS


@dataclass(frozen=True)
class Command:
    script: str
    arguments: tuple[str, ...]
    refuses: frozenset[str]

    def __str__(self) -> str:
        return " ".join((self.script, *self.arguments))[:60]


def commands() -> list[Command]:
    text = (Path(__file__).parent / "usual_commands.txt").read_text(encoding="utf-8")
    return [_command(block) for block in text.strip().split("\n\n")]


def _command(block: str) -> Command:
    first, _, rest = block.partition("\n")
    refuses = first.removeprefix("# refuses: ").split()
    words = shlex.split(re.sub(r"[\^\\]\n", " ", re.sub(r"\.\.\. \([^)]*\)", "...", rest)))
    script = next(word for word in words if word.startswith("ltx2_"))
    takes_value = {f"--{s}" for spec in flag_specs(SCRIPTS[script]) if not spec.is_bool for s in spec.spellings}
    arguments = words[words.index(script) + 1 :]
    kept = [w for before, w in zip(["", *arguments], arguments, strict=False) if w != "..." or before in takes_value]
    return Command(script, tuple(kept), frozenset(refuses) - {"-"})
