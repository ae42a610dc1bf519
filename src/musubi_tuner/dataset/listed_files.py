"""The cache files that a manifest lists, as discovery asks for them."""

from __future__ import annotations

from collections.abc import Iterable

from .buckets import pixel_frames, pixel_size
from .cache import AudioHeader, CacheName, LatentHeader
from .files import ItemFiles


class ListedFiles:
    """The files that a manifest lists."""

    def __init__(self, files: Iterable[ItemFiles]) -> None:
        self.latents: dict[CacheName, ItemFiles] = {}
        self.texts: dict[CacheName, None] = {}
        self.sounds: dict[CacheName, None] = {}
        self.masks: dict[CacheName, None] = {}
        for item in files:
            self.latents[_parsed(item.latents)] = item
            self.texts[_parsed(item.text)] = None
            if item.audio is not None:
                self.sounds[_parsed(item.audio)] = None
            if item.mask is not None:
                self.masks[_parsed(item.mask)] = None

    def __contains__(self, name: CacheName) -> bool:
        listed = {"text": self.texts, "audio": self.sounds, "mask": self.masks}.get(name.kind)
        # Files of other kinds lie beside the latents and are not listed themselves.
        return name.sibling("latents") in self.latents if listed is None else name in listed

    def differ(self, name: CacheName, latents: LatentHeader, audio: AudioHeader | None) -> bool:
        """Whether latents have other sizes than listed; what is not listed does not count."""
        listed = self.latents[name]
        pairs = (
            (listed.bucket, pixel_size(latents.grid)),
            (listed.frames, pixel_frames(latents.grid)),
            (listed.audio_steps, audio.steps if audio else None),
        )
        return any(None not in pair and pair[0] != pair[1] for pair in pairs)


def _parsed(name: str) -> CacheName:
    parsed = CacheName.parse(name)
    assert parsed is not None  # the manifest's reader has seen to it
    return parsed
