"""Dataclasses to flags. The only home of argparse.

A script's configuration is a frozen dataclass whose fields are groups of flags (frozen dataclasses made with
:func:`musubi_tuner.config.flag.flag`). Values come from the command line, then ``--config_file``, then the
defaults; everything is checked before anything heavy is imported.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from musubi_tuner.common.errors import ConfigErrors, UserError, did_you_mean
from musubi_tuner.config.flag import FlagInfo, default_of, flag_info

from .config_file import read_config_file

C = TypeVar("C")


@dataclass(frozen=True)
class Parsed(Generic[C]):
    """A script's configuration and the flags that the user gave, on the command line or in the file."""

    config: C
    explicit: frozenset[str]


@dataclass(frozen=True)
class FlagSpec:
    """One flag as declared: where it goes and how its values are read."""

    name: str
    group: str
    info: FlagInfo
    default: Any
    item_type: type
    choices: tuple[str, ...] | None
    is_list: bool

    @property
    def is_bool(self) -> bool:
        return self.item_type is bool

    @property
    def spellings(self) -> tuple[str, ...]:
        return (self.name, *self.info.aliases)

    @property
    def negations(self) -> tuple[str, ...]:
        return tuple(f"no_{s}" for s in self.spellings) if self.is_bool else ()

    def convert(self, value: Any) -> Any:
        """One value of the command line or of the config file to the flag's type.

        Raises:
            ValueError: with what was expected.
        """
        if self.is_bool:
            if isinstance(value, bool):
                return value
            raise ValueError("expected true or false")
        if isinstance(value, bool) and "true" in (self.choices or ()):
            value = str(value).lower()  # an unquoted true in a file, where true is one of several words
        if isinstance(value, (bool, dict, list)):
            raise ValueError(f"expected {self._expected()}")
        text = str(value)
        if self.info.convert is not None:
            return self.info.convert(text)
        if self.choices is not None:
            text = (self.info.values or {}).get(text, text)
            if text not in self.choices:
                raise ValueError(f"expected one of {', '.join(self.choices)}{did_you_mean(text, self.choices)}")
            return text
        try:
            converted = self.item_type(text)
        except ValueError:
            raise ValueError(f"expected {self._expected()}") from None
        if isinstance(converted, float) and not math.isfinite(converted):
            raise ValueError(f"expected {self._expected()}")
        return converted

    def _expected(self) -> str:
        names = {int: "an integer", float: "a number", str: "a string", Path: "a path"}
        return names.get(self.item_type, self.item_type.__name__)


@cache
def flag_specs(config_class: type) -> tuple[FlagSpec, ...]:
    """All flags of a script's configuration, in order of declaration."""
    specs = []
    for group, group_class in _groups(config_class):
        hints = typing.get_type_hints(group_class)
        for f in dataclasses.fields(group_class):
            info = flag_info(f)
            if info is not None:
                item_type, choices, is_list = _read_type(hints[f.name])
                specs.append(FlagSpec(f.name, group, info, default_of(f), item_type, choices, is_list))
    return tuple(specs)


def group_titles(config_class: type) -> dict[str, str]:
    """What each group of flags is called in ``--help``: the first line of its docstring."""
    return {
        group: (group_class.__doc__ or group).strip().splitlines()[0].rstrip(".")
        for group, group_class in _groups(config_class)
    }


def _groups(config_class: type) -> Iterable[tuple[str, type]]:
    hints = typing.get_type_hints(config_class)
    return [(f.name, hints[f.name]) for f in dataclasses.fields(config_class)]


def _read_type(hint: Any) -> tuple[type, tuple[str, ...] | None, bool]:
    """(type of one value, choices, whether it is a list) of an annotation."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        (hint,) = (a for a in args if a is not type(None))
        return _read_type(hint)
    if origin is tuple:
        item, choices, _ = _read_type(args[0])
        return item, choices, True
    if origin is Literal:
        return str, tuple(args), False
    return hint, None, False


class _Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # What is a value rather than a flag: as in Python 3.14; the older pattern does not know -5e-1.
        self._negative_number_matcher = re.compile(r"-\.?\d")

    def error(self, message: str) -> typing.NoReturn:
        match = re.match(r"argument (?:-\w/)?(--\w+)\S*: (.*)", message)
        if match is None:
            raise UserError(message)
        name, problem = match.groups()
        if problem.startswith("ignored explicit argument"):
            problem = "takes no value; --x turns a switch on, --no_x off"
        elif problem.startswith("expected"):
            problem += f"; one that begins with - is written {name}=-x"
        raise UserError(f"{name}: {problem}")


def build_parser(config_class: type, prog: str, description: str) -> argparse.ArgumentParser:
    """The argparse parser of a script; every value is suppressed unless given."""
    parser = _Parser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=42, width=110),
    )
    parser.add_argument(
        "--config_file", type=Path, metavar="TOML", help="read flags from a TOML file; the command line wins"
    )
    specs = flag_specs(config_class)
    for group, title in group_titles(config_class).items():
        section = parser.add_argument_group(title)
        for spec in (s for s in specs if s.group == group):
            _add(section, spec)
    return parser


def _add(section: Any, spec: FlagSpec) -> None:
    options = [f"--{s}" for s in spec.spellings]
    help_text = (spec.info.help + _default_text(spec)).replace("%", "%%")
    if spec.is_bool:
        section.add_argument(*options, dest=spec.name, action="store_const", const=True, help=help_text)
        negation_help = f"turn --{spec.name} off" if spec.default is not False else argparse.SUPPRESS
        section.add_argument(
            *(f"--{n}" for n in spec.negations),
            dest=spec.name,
            action="store_const",
            const=False,
            help=negation_help,
        )
        return
    metavar = spec.info.metavar
    if metavar is None:
        metavar = "{" + ",".join(spec.choices) + "}" if spec.choices else spec.name.rsplit("_", 1)[-1].upper()
    several = {"nargs": "+", "action": "extend"} if spec.is_list else {}
    section.add_argument(*options, dest=spec.name, metavar=metavar, help=help_text, **several)
    if spec.info.positional:
        section.add_argument(spec.name, nargs="*", action="extend", metavar=metavar, help=f"the same as --{spec.name}")


def _default_text(spec: FlagSpec) -> str:
    if spec.is_bool or spec.default is None or spec.default == ():
        return ""
    return f" (default: {spec.default})"


def parse(config_class: type[C], argv: Sequence[str], *, prog: str, description: str) -> Parsed[C]:
    """Read a script's configuration from its arguments and its config file.

    Raises:
        UserError: an unknown flag (with the nearest name), a bad value, a missing config file.
        ConfigErrors: several problems of the config file or of values.
    """
    parser = build_parser(config_class, prog, description)
    specs = {s.name: s for s in flag_specs(config_class)}
    namespace, unknown = parser.parse_known_args([_underscored(a) for a in argv])
    _reject_unknown(unknown, specs.values())
    given = dict(vars(namespace))
    config_file = given.pop("config_file", None)

    problems: list[str] = []
    values = {name: _converted(specs[name], raw, f"--{name}", problems) for name, raw in given.items()}
    if config_file is not None:
        for name, (key, raw) in read_config_file(config_file, spelling_table(specs.values()), problems).items():
            if name not in values:
                values[name] = _converted(specs[name], raw, f"{config_file}: {key}", problems)
    if problems:
        raise ConfigErrors(problems, "invalid arguments") if len(problems) > 1 else UserError(problems[0])
    return Parsed(build_config(config_class, values), frozenset(values))


def build_config(config_class: type[C], values: dict[str, Any]) -> C:
    """Fill the groups of a configuration from flat values; what is not named takes its default."""
    groups = {}
    for group, group_class in _groups(config_class):
        names = {f.name for f in dataclasses.fields(group_class)}
        groups[group] = group_class(**{k: v for k, v in values.items() if k in names})
    return config_class(**groups)


def spelling_table(specs: Iterable[FlagSpec]) -> dict[str, tuple[FlagSpec, bool]]:
    """Every spelling of every flag: its spec, and whether the spelling negates it."""
    table = {}
    for spec in specs:
        table |= dict.fromkeys(spec.spellings, (spec, False))
        table |= dict.fromkeys(spec.negations, (spec, True))
    return table


def _converted(spec: FlagSpec, raw: Any, where: str, problems: list[str]) -> Any:
    try:
        if not spec.is_list:
            return spec.convert(raw)
        items = raw if isinstance(raw, list) else [raw]
        return tuple(spec.convert(item) for item in items)
    except ValueError as error:
        problems.append(f"{where}: {error}, got {raw!r}")
        return None


def _underscored(argument: str) -> str:
    """``--blocks-to-swap=3`` to ``--blocks_to_swap=3``; a text that only begins with dashes stays as it is."""
    name, equals, value = argument.partition("=")
    if not re.fullmatch(r"--[\w-]+", name):
        return argument
    return "--" + name[2:].replace("-", "_") + equals + value


def _reject_unknown(unknown: Sequence[str], specs: Iterable[FlagSpec]) -> None:
    known = [*spelling_table(specs), "config_file", "help"]
    messages = []
    for argument in unknown:
        if argument.startswith("--"):
            name = argument[2:].partition("=")[0]
            messages.append(f"unknown flag --{name}{_elsewhere(name) or did_you_mean(name, known, flags=True)}")
        elif not messages:
            messages.append(f"unexpected argument {argument!r}; {_remedy(argument)}")
    if messages:
        raise UserError("; ".join(messages))


def _elsewhere(name: str) -> str:
    """`` (a flag of ...)`` where other scripts have the flag, else an empty string."""
    from .scripts import SCRIPTS  # the flags of every script, only wanted for this message

    scripts = [script for script, config in SCRIPTS.items() if name in spelling_table(flag_specs(config))]
    return f" (a flag of {', '.join(scripts)})" if scripts else ""


def _remedy(stray: str) -> str:
    if stray.lower() in ("true", "false"):
        return "switches take no value: --x turns on, --no_x turns off"
    return "a value stands behind its flag; put values with spaces in quotes"
