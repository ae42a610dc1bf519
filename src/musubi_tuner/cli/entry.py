"""From ``sys.argv`` to a script's body, and from its errors to an exit code."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from musubi_tuner.common.errors import ConfigErrors, UserError
from musubi_tuner.common.log import setup_logging

from .parser import Parsed, parse

logger = logging.getLogger(__name__)

C = TypeVar("C")
Rule = Callable[[Parsed[C]], Iterable[str]]


def entry(
    config_class: type[C], description: str, *, rules: Sequence[Rule[C]] = ()
) -> Callable[[Callable[[Parsed[C]], int | None]], Callable[[Sequence[str] | None], None]]:
    """Make a script's ``main(argv=None)`` of a function that takes the parsed configuration.

    ``rules`` look at several flags at once and return the violations; all are reported together. The process
    exits with 2 when the request is wrong or a file cannot be read or written, 1 when the body returns a truthy
    status, 130 on Ctrl-C.
    """

    def decorate(body: Callable[[Parsed[C]], int | None]) -> Callable[[Sequence[str] | None], None]:
        def main(argv: Sequence[str] | None = None) -> None:
            # Threads of PyTorch that spin while they wait take the cores from the workers that read data; where other
            # programs run, a step takes many times as long. It has to be set before PyTorch is loaded.
            os.environ.setdefault("OMP_WAIT_POLICY", "passive")
            prog = Path(body.__code__.co_filename).name
            status = _run(lambda: body(_checked(config_class, argv, prog, description, rules)))
            if status:
                sys.exit(status)

        main.__doc__ = description
        return main

    return decorate


def _checked(
    config_class: type[C], argv: Sequence[str] | None, prog: str, description: str, rules: Sequence[Rule[C]]
) -> Parsed[C]:
    parsed = parse(config_class, sys.argv[1:] if argv is None else argv, prog=prog, description=description)
    setup_logging()
    violations = [v for rule in rules for v in rule(parsed)]
    if violations:
        raise (ConfigErrors(violations, "invalid arguments") if len(violations) > 1 else UserError(violations[0]))
    return parsed


def _run(body: Callable[[], int | None]) -> int:
    # What a pipe or an old console cannot show must not end a script that has done its work.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        return body() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # no right to write, a full disk, a folder where a file should be
        logger.debug("traceback", exc_info=error)
        print(f"error: {_described(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _described(error: OSError) -> str:
    if error.strerror is None:
        return str(error) or type(error).__name__
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
