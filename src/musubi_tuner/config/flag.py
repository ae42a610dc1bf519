"""A dataclass field that is also a command-line flag: name, default, help and rules in one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any

_KEY = "flag"


@dataclass(frozen=True)
class FlagInfo:
    """What the command line knows of a field beyond its name, type and default."""

    help: str
    aliases: tuple[str, ...] = ()  # other spellings, without dashes
    values: Mapping[str, str] | None = None  # short forms of a choice: {"v": "video"}
    metavar: str | None = None
    convert: Callable[[str], Any] | None = None  # for types that argparse does not know
    positional: bool = False  # a list that may also be given without its flag


def flag(
    default: Any,
    help: str,
    *,
    aliases: Sequence[str] = (),
    values: Mapping[str, str] | None = None,
    metavar: str | None = None,
    convert: Callable[[str], Any] | None = None,
    positional: bool = False,
) -> Any:
    """Declare a flag. The type annotation of the field decides how it is read.

    ``bool`` gives ``--x`` and ``--no_x``; ``Literal`` gives choices; ``tuple[T, ...]`` takes one or more values, and
    more where the flag is repeated; ``T | None`` is optional.
    """
    info = FlagInfo(help, tuple(aliases), values, metavar, convert, positional)
    return field(default=default, metadata={_KEY: info})


def flag_info(dataclass_field: Any) -> FlagInfo | None:
    """The :class:`FlagInfo` of a field made by :func:`flag`, else ``None``."""
    return dataclass_field.metadata.get(_KEY)


def default_of(dataclass_field: Any) -> Any:
    """Default of a field made by :func:`flag`."""
    assert dataclass_field.default is not MISSING
    return dataclass_field.default
