"""Every command in the README and the docs has flags that exist and values that they take."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from musubi_tuner.cli.flags_page import PAGE, flags_page
from musubi_tuner.cli.parser import parse
from musubi_tuner.cli.scripts import SCRIPTS

ROOT = Path(__file__).parents[1]


def commands() -> list[list[str]]:
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"```\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.splitlines():
                command = line.partition("#")[0].rpartition("&&")[2].strip()
                if re.match(r"(python|accelerate launch) .*ltx2_", command):
                    found.append(shlex.split(command))
    return found


def script_of(command: list[str]) -> str:
    return next(word for word in command if word.startswith("ltx2_") and word.endswith(".py"))


@pytest.mark.parametrize("command", commands(), ids=lambda c: " ".join(c)[:60])
def test_documented_command_parses(command: list[str]):
    script = script_of(command)
    arguments = command[command.index(script) + 1 :]
    parse(SCRIPTS[script], arguments, prog=script, description="")
    assert (ROOT / script).exists()


def test_there_are_commands_for_every_script():
    assert {script_of(command) for command in commands()} == set(SCRIPTS)


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_page_of_flags_is_current():
    assert PAGE.read_text(encoding="utf-8") == flags_page(), "run: python -m musubi_tuner.cli.flags_page"
