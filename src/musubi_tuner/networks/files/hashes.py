"""safetensors files written in one pass, with the two hashes that model managers look up.

``sshs_model_hash`` is the SHA-256 of the tensor data (everything after the header). ``sshs_legacy_hash`` is
the first 8 hex digits of the SHA-256 of bytes 0x100000 to 0x110000 of the file as it would be with only the
``ss_`` metadata. Both need the tensors in the order of the file, and no more than one at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from musubi_tuner.common.atomic import atomic_path, to_disk

MODEL_HASH, LEGACY_HASH = "sshs_model_hash", "sshs_legacy_hash"
_LEGACY_WINDOW = (0x100000, 0x110000)

# In the order of the format's own enumeration: data is laid out from the last of these to the first.
_DTYPES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_RANK = {dtype: i for i, dtype in enumerate(_DTYPES)}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written: what the header has to know before the data exists."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class SshsHasher:
    """Both hashes of a file, fed with its data in order."""

    def __init__(self, specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> None:
        hashed = {k: v for k, v in metadata.items() if k.startswith("ss_")}
        header = _header(file_order(specs), hashed)
        self._model, self._legacy = hashlib.sha256(), hashlib.sha256()
        self._position = 0
        self._feed_legacy(header)

    def update(self, data: memoryview) -> None:
        self._model.update(data)
        self._feed_legacy(data)

    def digests(self) -> dict[str, str]:
        """The two metadata entries."""
        return {MODEL_HASH: self._model.hexdigest(), LEGACY_HASH: self._legacy.hexdigest()[:8]}

    def _feed_legacy(self, data: bytes | memoryview) -> None:
        start, stop = (min(max(edge - self._position, 0), len(data)) for edge in _LEGACY_WINDOW)
        self._legacy.update(data[start:stop])
        self._position += len(data)


def sshs_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """``sshs_model_hash`` and ``sshs_legacy_hash`` of tensors as they would be saved with ``metadata``."""
    specs = file_order(specs_of(tensors))
    hasher = SshsHasher(specs, metadata)
    for spec in specs:
        hasher.update(tensor_bytes(tensors[spec.name]))
    return hasher.digests()


def write_safetensors(
    path: str | os.PathLike[str],
    specs: Iterable[TensorSpec],
    produce: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    *,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Write a safetensors file with its hashes, one tensor in memory at a time; whole or not at all.

    ``produce`` is called once per name, in the order of the file: by dtype, then by name. ``check`` looks at the
    complete file before it gets its name; what it raises leaves an older file of that name as it was.
    """
    specs = file_order(specs)
    hasher = SshsHasher(specs, metadata)
    # The hashes are known last but stand first: their room is kept by strings of the same length.
    metadata = {**metadata, MODEL_HASH: "0" * 64, LEGACY_HASH: "0" * 8}
    with atomic_path(path) as temporary:
        with temporary.open("wb") as file:
            file.write(_header(specs, metadata))
            for spec in specs:
                tensor = produce(spec.name)
                assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), spec
                data = tensor_bytes(tensor)
                hasher.update(data)
                file.write(data)
            file.seek(0)
            file.write(_header(specs, {**metadata, **hasher.digests()}))
        to_disk(temporary)
        if check is not None:
            check(temporary)
    return Path(path)


def specs_of(tensors: Mapping[str, Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]


def file_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """The order in which safetensors lays tensors out: widest dtype first, then by name."""
    return sorted(specs, key=lambda s: (-_RANK[s.dtype], s.name))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw little-endian bytes of a tensor."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()).cast("B") if flat.numel() else memoryview(b"")


def _header(specs: list[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """The length field and the JSON header, padded to a multiple of 8 bytes."""
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for spec in specs:
        end = offset + spec.nbytes
        entries[spec.name] = {
            "dtype": _DTYPES[spec.dtype],
            "shape": spec.shape,
            "data_offsets": (offset, end),
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
