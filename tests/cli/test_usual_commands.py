"""The commands of the usual recipes, as users have them in their notes: they parse, and pass the rules.

``usual_commands.txt`` holds them with the ``^`` of Windows prompts and with ``...`` for what is left out. Those that
use a feature which does not exist yet are refused by name, and for nothing else.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from musubi_tuner.cli.parser import flag_specs, parse
from musubi_tuner.cli.scripts import SCRIPTS
from musubi_tuner.config import rules_caching
from musubi_tuner.config.rules_training import all_rules
from musubi_tuner.config.unavailable import unavailable

RULES = {
    "ltx2_train_network.py": all_rules,
    "ltx2_cache_latents.py": lambda p: [
        *rules_caching.required(p.config),
        *rules_caching.latents(p.config),
        *rules_caching.references(p.config),
        *rules_caching.sample_latents(p.config),
    ],
    "ltx2_cache_text_encoder_outputs.py": lambda p: [*rules_caching.required(p.config), *rules_caching.text(p.config)],
    "ltx2_merge_lora.py": lambda p: [],
}
# Files that are not here, and flags that ``...`` stands for.
EXPECTED = re.compile(r"not found$|is required|^not available in this version|^give --gemma_root")


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


@pytest.mark.parametrize("command", commands(), ids=str)
def test_command(command: Command):
    parsed = parse(SCRIPTS[command.script], command.arguments, prog=command.script, description="")
    refusals = list(unavailable(parsed.config))
    assert len(refusals) == bool(command.refuses), "one message"
    assert set(re.findall(r"--(\w+)[^;(]* \(", refusals[0])) == command.refuses if refusals else True
    others = [v for v in RULES[command.script](parsed) if not EXPECTED.search(v)]
    assert others == []
