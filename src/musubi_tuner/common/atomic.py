"""Files that exist whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_MARK = ".partial-"
_OLD = ".old"
_TEMPORARY = re.compile(re.escape(_MARK) + "[0-9a-f]{8}")


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary sibling of ``path`` to write; it takes the name only when the block succeeds.

    Works for a file and for a directory that the block creates. On failure the temporary is removed and an
    older file of that name is left as it was.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: several writers (PyAV, PIL) choose the format by it.
    temporary = target.with_name(f"{target.stem}{_MARK}{uuid.uuid4().hex[:8]}{target.suffix}")
    try:
        yield temporary
        if temporary.is_dir():
            # A directory cannot be replaced in one step: the old one moves aside first, so that at every
            # moment either the old or the new one exists under some name.
            aside = target.with_name(f"{target.name}{_MARK}{uuid.uuid4().hex[:8]}{_OLD}")
            if target.exists():
                target.replace(aside)
            temporary.replace(target)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            temporary.replace(target)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def is_partial(path: Path) -> bool:
    """Whether ``path`` is a leftover of an interrupted :func:`atomic_path`."""
    return _MARK in path.name


def target_of(leftover: Path) -> Path:
    """The path that a leftover was made for."""
    return leftover.with_name(_TEMPORARY.sub("", leftover.name).removesuffix(_OLD))


def is_replaced(leftover: Path) -> bool:
    """Whether a leftover is the complete folder that was about to be replaced when the process ended."""
    return is_partial(leftover) and leftover.name.endswith(_OLD) and not target_of(leftover).exists()


def tidy(leftovers: Iterable[Path]) -> None:
    """Remove what interrupted processes left behind; a folder that was not replaced gets its name back."""
    for path in leftovers:
        if is_replaced(path):
            path.replace(target_of(path))
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder; while that goes on it has another name, so that what bears its own is never half removed."""
    aside = folder.with_name(f"{folder.name}{_MARK}{uuid.uuid4().hex[:8]}")
    folder.replace(aside)
    shutil.rmtree(aside, ignore_errors=True)


def to_disk(path: Path) -> None:
    """Wait for a file's content to reach the disk: after a power cut a renamed file may otherwise be empty."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
