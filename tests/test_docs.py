"""Every command in the README and the docs has flags that exist and values that they take."""

from __future__ import annotations

import ast
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
        for block in re.findall(r"```\w*\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
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


def printed_texts() -> list[str]:
    """String constants of the product; what f-strings and log messages fill in is a line break."""
    texts = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\n" for part in node.values)
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(re.sub(r"%[-.\d]*[sdrfg]", "\n", node.value).replace("%%", "%"))
    return texts


def test_quoted_messages_are_those_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r'`"(.*?)"`', page)
    assert len(quoted) > 40
    texts = printed_texts()

    def is_printed(message: str) -> bool:
        fragments = [re.escape(part.strip()) for part in message.split("...")]
        pattern = re.compile(".*".join(fragments), re.DOTALL)
        return any(pattern.search(text) for text in texts)

    assert [message for message in quoted if not is_printed(message)] == []
