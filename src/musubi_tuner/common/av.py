"""A pair of one video value and one audio value, either of which may be absent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

T = TypeVar("T")
U = TypeVar("U")

Modality = Literal["video", "audio"]
MODALITIES: tuple[Modality, Modality] = ("video", "audio")


@dataclass(frozen=True)
class AV(Generic[T]):
    """The video one and the audio one; ``None`` means absent."""

    video: T | None = None
    audio: T | None = None

    def items(self) -> Iterator[tuple[Modality, T]]:
        """The modalities that are present, video first."""
        for name in MODALITIES:
            value = getattr(self, name)
            if value is not None:
                yield name, value

    def map(self, f: Callable[[T], U]) -> AV[U]:
        """Apply ``f`` to the values that are present."""
        return AV(**{name: f(value) for name, value in self.items()})

    def map_named(self, f: Callable[[Modality, T], U]) -> AV[U]:
        """Like :meth:`map`, but ``f`` is told which modality it gets."""
        return AV(**{name: f(name, value) for name, value in self.items()})

    def __getitem__(self, name: Modality) -> T | None:
        if name not in MODALITIES:
            raise KeyError(name)
        return getattr(self, name)

    def __bool__(self) -> bool:
        return self.video is not None or self.audio is not None
