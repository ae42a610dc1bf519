"""The official single-file checkpoint: which components it holds and how to read them.

One safetensors file carries the transformer, the video VAE, the audio VAE, the vocoder and the text
connectors, told apart by key prefixes; its metadata has a ``config`` JSON with a section for each. Repacks
with other prefixes and stand-alone VAE files are accepted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from musubi_tuner.common.dtypes import dtype_name
from musubi_tuner.common.errors import UserError
from musubi_tuner.common.safetensors_io import SafetensorsFile, TensorInfo

from .ltx2.config import Version, detect_version
from .ltx2.keys import PREFIXES, find_prefix, transformer_keys

Component = Literal["transformer", "video_vae_encoder", "video_vae_decoder", "audio_vae", "vocoder", "connectors"]

CONNECTOR_PREFIXES = ("video_embeddings_connector.", "audio_embeddings_connector.")
TEXT_PROJECTION_PREFIX = "text_embedding_projection."

# Title for messages, and the key prefix that shows the component is there.
_COMPONENTS: dict[str, tuple[str, str]] = {
    "transformer": ("transformer", "model.diffusion_model."),
    "video_vae_encoder": ("video VAE encoder", "vae.encoder."),
    "video_vae_decoder": ("video VAE decoder", "vae.decoder."),
    "audio_vae": ("audio VAE", "audio_vae."),
    "vocoder": ("vocoder", "vocoder."),
    "connectors": ("text connectors", TEXT_PROJECTION_PREFIX),
}

_FINGERPRINT_BYTES = 64 * 1024  # of each tensor


class Checkpoint:
    """A checkpoint file of which only the header has been read.

    Attributes:
        path: the file.
        metadata: safetensors metadata; values parsed as JSON where they are JSON.
        tensors: key to :class:`TensorInfo`, in file order.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = SafetensorsFile(path)
        self.path: Path = self._file.path
        self.metadata: dict[str, Any] = parse_metadata(self._file.metadata)
        self.tensors: Mapping[str, TensorInfo] = self._file.tensors

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Read the header of ``path``.

        Raises:
            UserError: the file is missing, truncated or not a safetensors file.
        """
        return cls(path)

    @property
    def config(self) -> dict[str, dict[str, Any]]:
        """Sections of the metadata ``config``; ``{}`` when the file has none. Null sections are left out."""
        config = self.metadata.get("config")
        if not isinstance(config, dict):
            return {}
        return {name: section for name, section in config.items() if isinstance(section, dict)}

    @cached_property
    def version(self) -> Version:
        """The LTX version, from metadata, else from the keys."""
        return detect_version(self.metadata, self.tensors)

    def read(
        self,
        keys: Iterable[str],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield ``(key, tensor)`` in file order; nothing but ``keys`` is read."""
        return self._file.read(keys, device=device, dtype=dtype)

    def component_keys(self, component: Component) -> dict[str, str]:
        """Name inside the component to key in the file, in file order; empty when the file lacks it.

        The video VAE halves include ``per_channel_statistics.*``, as the audio VAE does. The connectors are
        ``text_embedding_projection.*`` and ``{video,audio}_embeddings_connector.*``.
        """
        if component == "transformer":
            return {} if find_prefix(self.tensors) is None else transformer_keys(self.tensors)
        if component == "connectors":
            return self._connector_keys()
        if component.startswith("video_vae"):
            half = component.removeprefix("video_vae_") + "."
            keys = self._vae_keys("vae.", ndim=5)
            return _with_statistics({n: k for n, k in keys.items() if n.startswith(half)}, keys)
        if component == "audio_vae":
            keys = self._vae_keys("audio_vae.", ndim=4)
            return _with_statistics({n: k for n, k in keys.items() if n.startswith(("encoder.", "decoder."))}, keys)
        return _strip(self.tensors, _COMPONENTS[component][1])

    def has(self, component: Component) -> bool:
        """Whether the file holds the component."""
        return any(not name.startswith("per_channel_statistics.") for name in self.component_keys(component))

    def require(self, component: Component, purpose: str) -> None:
        """Raise unless the file holds the component.

        Raises:
            UserError: naming file, component, key prefix and ``purpose`` ("caching audio latents").
        """
        if not self.has(component):
            title, prefix = _COMPONENTS[component]
            raise UserError(
                f"{self.path} has no {title} (no key starting with {prefix!r}), needed for {purpose}; "
                "use the full checkpoint"
            )

    def encoder_id(self, kind: Literal["video_vae", "audio_vae", "text"]) -> str | None:
        """Fingerprint of what makes caches: SHA-256 over name, dtype, shape and first 64 KiB of each tensor.

        ``video_vae`` and ``audio_vae`` cover encoder and statistics, ``text`` the projection and connectors.
        A quantised copy of a checkpoint keeps its fingerprints, since only its transformer differs.
        ``None`` when the file has none of these tensors.
        """
        component: Component = {"video_vae": "video_vae_encoder", "text": "connectors"}.get(kind, kind)  # type: ignore[assignment]
        keys = {n: k for n, k in self.component_keys(component).items() if not n.startswith("decoder.")}
        if all(name.startswith("per_channel_statistics.") for name in keys):
            return None
        digest = hashlib.sha256()
        for name, key in sorted(keys.items()):
            info = self.tensors[key]
            digest.update(f"{name}\0{dtype_name(info.dtype)}\0{list(info.shape)}\0".encode())
            digest.update(self._file.read_bytes(key, _FINGERPRINT_BYTES))
        return digest.hexdigest()

    def _connector_keys(self) -> dict[str, str]:
        projection = {key: key for key in self.tensors if key.startswith(TEXT_PROJECTION_PREFIX)}
        if not projection:
            return {}
        for prefix in PREFIXES:
            connectors = {
                name: key for name, key in _strip(self.tensors, prefix).items() if name.startswith(CONNECTOR_PREFIXES)
            }
            if connectors:
                return projection | connectors
        return {}

    def _vae_keys(self, prefix: str, ndim: int) -> dict[str, str]:
        """Keys of a VAE under its prefix or, in a stand-alone file, bare (told apart by the convolutions)."""
        keys = _strip(self.tensors, prefix)
        if keys:
            return keys
        bare = ("encoder.", "decoder.", "per_channel_statistics.")
        keys = {key: key for key in self.tensors if key.startswith(bare)}
        convolutions = [self.tensors[key].shape for key in keys if key.endswith("conv_in.conv.weight")]
        return keys if convolutions and all(len(shape) == ndim for shape in convolutions) else {}


def parse_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Safetensors metadata with every value parsed that is a JSON object or list; others stay strings."""
    return {key: _parse(value) for key, value in metadata.items()}


def _strip(keys: Iterable[str], prefix: str) -> dict[str, str]:
    return {key[len(prefix) :]: key for key in keys if key.startswith(prefix)}


def _with_statistics(part: dict[str, str], keys: dict[str, str]) -> dict[str, str]:
    if not part:
        return {}
    return part | {name: key for name, key in keys.items() if name.startswith("per_channel_statistics.")}


def _parse(value: str) -> Any:
    """JSON where it is JSON, else the string. Numbers stay strings: '2.3' is a version, not a float."""
    if value[:1] not in "{[":
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
