"""Text files that the user wrote."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises:
        UserError: the file is missing, cannot be read, or is in another encoding.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: file not found") from None
    except OSError as error:  # a folder, too (on Windows as a lack of permission)
        reason = "is a folder, expected a file" if path.is_dir() else error.strerror
        raise UserError(f"{path}: {reason}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        UserError: see :func:`read_text`, or the file is not JSON (with the line).
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise UserError(f"{path}: not valid JSON: {error}{_path_hint(text, 'double each')}") from None


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file.

    Raises:
        UserError: see :func:`read_text`, or the file is not TOML (with the line).
    """
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid TOML: {error}{_path_hint(text, 'write them in single quotes')}") from None


def _path_hint(text: str, remedy: str) -> str:
    return f"; Windows paths: replace \\ by /, or {remedy}" if "\\" in text else ""
