"""Training runs in a process of their own that ends at any moment, without a chance to clean up."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from musubi_tuner.ltx2_train_network import main as train

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, to be quick")

# What changes files, as Python reports it to audit hooks; and opening them to write.
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def run_killed_at(argv: Sequence[str], folder: Path, event: int | None) -> bool:
    """Train in a child process that dies before its ``event``-th change of the files in ``folder`` (from 1).

    Returns:
        Whether it was killed; ``event`` None or beyond the last lets it come to its end.
    """
    pid = os.fork()
    if pid == 0:
        if event is not None:
            sys.addaudithook(_Killer(folder, event))
        _train_and_leave(argv)
    return _was_killed(pid)


def run_killed_after(argv: Sequence[str], seconds: float) -> bool:
    """Train in a child process that is killed after a while; returns whether it had not ended by then."""
    pid = os.fork()
    if pid == 0:
        _train_and_leave(argv)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return False
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    return _was_killed(pid)


class _Killer:
    def __init__(self, folder: Path, event: int) -> None:
        self._folder, self._left = str(folder), event

    def __call__(self, name: str, args: tuple) -> None:
        # Within rmtree names are relative to an open folder; only runs in the test's folder remove any.
        changes = name in _CHANGES or (name == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"))
        if changes and isinstance(args[0], (str, os.PathLike)) and self._counts(os.fspath(args[0])):
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def _counts(self, path: str) -> bool:
        return path.startswith(self._folder) or not Path(path).is_absolute()


def _train_and_leave(argv: Sequence[str]) -> None:
    # os._exit: the child must not run what pytest has planned for the end of its own process.
    status = 70
    try:
        train(list(argv))
        status = 0
    except SystemExit as stop:
        status = 71 if stop.code else 0
    finally:
        os._exit(status)


def _was_killed(pid: int) -> bool:
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), f"the run ended with {code}"
    return code != 0


def until_complete(run: Callable[[int], bool], *, limit: int) -> int:
    """Call ``run(attempt)`` until it says that it was not killed; returns how often it was."""
    for attempt in range(limit):
        if not run(attempt):
            return attempt
    raise AssertionError(f"{limit} runs were killed and none came to its end")
