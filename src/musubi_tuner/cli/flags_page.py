"""``docs/flags.md``: every flag of every script, as declared.

``python -m musubi_tuner.cli.flags_page`` writes it anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from .parser import FlagSpec, flag_specs, group_titles
from .scripts import SCRIPTS

PAGE = Path(__file__).parents[3] / "docs" / "flags.md"

_INTRODUCTION = """\
# Flags

Made from the declarations by `python -m musubi_tuner.cli.flags_page`; `--help` of each script says the same.

Every script also reads its flags from a TOML file given with `--config_file`; the command line wins over the file,
the file over the defaults. A switch `--x` has the opposite `--no_x`; dashes may stand for underscores.
"""


def flags_page() -> str:
    """The page as Markdown."""
    return "\n".join([_INTRODUCTION, *(line for script in SCRIPTS for line in _script(script))])


def _script(script: str) -> Iterator[str]:
    config_class = SCRIPTS[script]
    titles = group_titles(config_class)
    yield f"## {script}\n"
    for group, specs in groupby(flag_specs(config_class), key=lambda spec: spec.group):
        yield from _group(titles[group], specs)


def _group(title: str, specs: Iterable[FlagSpec]) -> Iterator[str]:
    yield f"### {title}\n"
    yield "| flag | default | meaning |"
    yield "|---|---|---|"
    yield from (_row(spec) for spec in specs)
    yield ""


def _row(spec: FlagSpec) -> str:
    names = ", ".join(f"`--{name}`" for name in spec.spellings)
    choices = f" ({', '.join(spec.choices)})" if spec.choices else ""
    cells = (names, _default(spec), spec.info.help + choices)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(spec: FlagSpec) -> str:
    if spec.default is None or spec.default == ():
        return "-"
    if spec.is_bool:
        return "on" if spec.default else "off"
    return f"`{spec.default.as_posix() if isinstance(spec.default, Path) else spec.default}`"


if __name__ == "__main__":
    PAGE.write_text(flags_page(), encoding="utf-8", newline="\n")
