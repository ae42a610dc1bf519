"""Whether files are still what they were when caches were made of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .fingerprint import source_stamp


class SourceChanges:
    """Holds files against the metadata of caches. Each file is asked for its size and date once."""

    def __init__(self) -> None:
        self._stamps: dict[tuple[Path, ...], Mapping[str, str]] = {}
        self._redated: dict[str, None] = {}

    @property
    def redated(self) -> list[str]:
        """Names of files that :meth:`differs` found with another date only: copied perhaps, or edited."""
        return list(self._redated)

    def is_of_today(self, metadata: Mapping[str, str], *paths: Path) -> bool:
        """Whether size and date are those of the files now; also true where either is not known."""
        return all(metadata.get(key) == value for key, value in self._stamp(paths).items())

    def differs(self, metadata: Mapping[str, str], *paths: Path) -> bool:
        """Whether the files have another size than when ``metadata`` was recorded, so are others for certain.

        Metadata of other programs, which has no size, is not judged.
        """
        stamp = self._stamp(paths)
        recorded = metadata.get("source_size")
        if not stamp or recorded is None:
            return False
        if recorded != stamp["source_size"]:
            return True
        if any(metadata.get(key) != value for key, value in stamp.items()):
            self._redated[paths[0].name] = None
        return False

    def _stamp(self, paths: tuple[Path, ...]) -> Mapping[str, str]:
        if paths not in self._stamps:
            try:
                self._stamps[paths] = source_stamp(*paths)
            except OSError:  # gone, or not readable: not for this to tell
                self._stamps[paths] = {}
        return self._stamps[paths]
