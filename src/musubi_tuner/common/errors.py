"""The error that a user can act on, and 'did you mean'."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """Something the user asked for cannot be done.

    The message says what was found, what was expected and what to do, naming the file or key. Entry scripts
    print it without a traceback and exit with status 2 (bad request) or 1 (work done, but incomplete).
    """


class ConfigErrors(UserError):
    """Several problems of one configuration, reported together."""

    def __init__(self, problems: Sequence[str], heading: str = "invalid configuration") -> None:
        self.problems = tuple(problems)
        super().__init__(heading + ":\n" + "\n".join(f"  - {p}" for p in self.problems))


def did_you_mean(name: str, known: Iterable[str], *, flags: bool = False) -> str:
    """``" (did you mean 'x'?)"`` (of ``flags``: ``--x``) for the nearest of ``known``, else an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    if not near:
        return ""
    return f" (did you mean {f'--{near[0]}' if flags else repr(near[0])}?)"
