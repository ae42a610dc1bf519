"""Logging set-up: one line a message, beside progress bars, on the main process only."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _BarSafeHandler(logging.StreamHandler):
    """Writes above a running tqdm bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm = sys.modules.get("tqdm")
        if tqdm is None:
            super().emit(record)
            return
        try:
            tqdm.tqdm.write(self.format(record), file=self.stream)
            self.flush()
        except Exception:
            self.handleError(record)


def setup_logging(level: int = logging.INFO) -> None:
    """Log to standard error; every process but the first shows errors only."""
    if int(os.environ.get("RANK", "0")) != 0:
        level = logging.ERROR
    handler = _BarSafeHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname).1s %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("musubi_tuner").setLevel(level)
    # Says at every import that an optional CPU kernel for 4-bit inference, which nothing here uses, is not installed.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.captureWarnings(True)


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Without the messages of these modules, except errors."""
    levels = {module: module.level for module in map(logging.getLogger, names)}
    for module in levels:
        module.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for module, level in levels.items():
            module.setLevel(level)


_SEEN: set[tuple[str, str]] = set()


def warn_once(logger: logging.Logger, cause: str, message: str, *args: object) -> None:
    """Warn the first time a cause occurs in this process."""
    if (logger.name, cause) not in _SEEN:
        _SEEN.add((logger.name, cause))
        logger.warning(message, *args)
