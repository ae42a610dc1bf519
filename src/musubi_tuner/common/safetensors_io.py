"""Reading and writing safetensors files with bounded memory.

Format: 8 bytes little-endian header length, a JSON header (tensor name to dtype, shape and byte range, and
``__metadata__`` with string values), then the tensor bytes (https://github.com/huggingface/safetensors).

Files are read with ``readinto`` rather than mapped: the pages of a map count towards the resident set until
the system takes them back, so keeping a third of a mapped file costs the whole file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .atomic import atomic_path
from .errors import UserError

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_FIRST_BYTES = 4096  # hold the whole header of a cache file
STAGING_BYTES = 32 * 2**20  # chunk through which a tensor is cast or sent to a device
_READERS = 4  # threads
_PIECE_BYTES = 4 * 2**20  # what one of them reads at a time


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # absolute byte offset
    nbytes: int


# Where to read a tensor of this name: uninitialised, contiguous, with the shape and dtype of the file.
Allocate = Callable[[str, TensorInfo], Tensor]


class SafetensorsFile:
    """One safetensors file, of which only the header has been read.

    Attributes:
        path: the file.
        metadata: its ``__metadata__``, strings to strings.
        tensors: name to :class:`TensorInfo`, in file order.

    Raises:
        UserError: the file is missing, truncated or not a safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path if isinstance(path, Path) else Path(path)  # a copy takes as long as a read
        header, data_start, size = _read_header(self.path)
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        infos = {name: _parse_info(self.path, name, entry, data_start) for name, entry in header.items()}
        self.tensors: dict[str, TensorInfo] = dict(sorted(infos.items(), key=lambda item: item[1].start))
        end = max((info.start + info.nbytes for info in infos.values()), default=data_start)
        if end > size:
            raise UserError(
                f"{self.path} is truncated: its header announces {end} bytes, the file has {size}; "
                "make, copy or download it again"
            )

    def read(
        self,
        keys: Iterable[str] | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        allocate: Allocate | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield ``(name, tensor)`` for ``keys`` (default: all) in the order in which they lie in the file.

        Every tensor owns its memory, unless ``allocate`` gives it some on the CPU. ``dtype`` casts floating-point
        tensors; others keep theirs. Besides the tensors that the caller keeps, at most ``STAGING_BYTES`` are
        allocated.
        """
        wanted = list(self.tensors if keys is None else keys)
        if missing := [key for key in wanted if key not in self.tensors]:
            raise KeyError(f"{self.path} has no tensor {', '.join(missing[:5])}")
        device = torch.device(device)
        staging: Tensor | None = None
        # Memory that is given has mostly been touched before, and then threads only cost time.
        large = allocate is None and any(self.tensors[key].nbytes >= 2 * _PIECE_BYTES for key in wanted)
        with ExitStack() as stack:
            file = stack.enter_context(self.path.open("rb", buffering=0))
            pool = stack.enter_context(ThreadPoolExecutor(_READERS)) if large else None
            for key in sorted(wanted, key=lambda name: self.tensors[name].start):
                info = self.tensors[key]
                target = dtype if dtype is not None and info.dtype.is_floating_point else info.dtype
                result = (
                    torch.empty(info.shape, dtype=target, device=device) if allocate is None else allocate(key, info)
                )
                if device.type == "cpu" and target == info.dtype:
                    self._read_into(_as_bytes(result), info.start, file, pool)
                else:
                    if staging is None:
                        staging = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
                    self._read_through(info, result, staging, file, pool)
                yield key, result

    def read_one(
        self,
        key: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        allocate: Allocate | None = None,
    ) -> Tensor:
        """One tensor; see :meth:`read`."""
        return next(self.read([key], device=device, dtype=dtype, allocate=allocate))[1]

    def read_bytes(self, key: str, limit: int | None = None) -> bytes:
        """A tensor as it is stored, or its first ``limit`` bytes (for fingerprints)."""
        info = self.tensors[key]
        with self.path.open("rb") as file:
            file.seek(info.start)
            return file.read(info.nbytes if limit is None else min(limit, info.nbytes))

    def _read_through(
        self, info: TensorInfo, result: Tensor, staging: Tensor, file: RawIOBase, pool: Executor | None
    ) -> None:
        """Read ``info`` chunk by chunk through ``staging``, casting or sending to a device on the way."""
        flat = result.view(-1)
        size = info.dtype.itemsize
        per_chunk = staging.numel() // size
        for first in range(0, flat.numel(), per_chunk):
            part = flat[first : first + per_chunk]
            chunk = staging[: part.numel() * size]
            self._read_into(chunk, info.start + first * size, file, pool)
            part.copy_(chunk.view(info.dtype))  # blocking, so the chunk is free again

    def _read_into(self, buffer: Tensor, start: int, file: RawIOBase, pool: Executor | None) -> None:
        """Fill flat uint8 ``buffer`` from ``start`` on; big ones by several threads.

        One thread reaches neither a fast disk's rate nor, out of the page cache, that of memory: the first
        touch of fresh pages is what takes the time.
        """
        view = memoryview(buffer.numpy())
        if pool is None or len(view) < 2 * _PIECE_BYTES:
            self._fill(view, start, file)
            return
        pieces = [(view[i : i + _PIECE_BYTES], start + i) for i in range(0, len(view), _PIECE_BYTES)]
        list(pool.map(lambda piece: self._read_piece(*piece), pieces))

    def _read_piece(self, view: memoryview, start: int) -> None:
        with self.path.open("rb", buffering=0) as file:  # a position of its own
            self._fill(view, start, file)

    def _fill(self, view: memoryview, start: int, file: RawIOBase) -> None:
        file.seek(start)
        while len(view):
            count = file.readinto(view)
            if not count:
                raise UserError(f"{self.path} ended while it was read; it is truncated or being written")
            view = view[count:]


def _as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor as flat uint8."""
    return tensor.view(-1).view(torch.uint8)


def _read_header(path: Path) -> tuple[dict, int, int]:
    """Header dictionary, absolute start of the data, size of the file."""
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(_FIRST_BYTES)
            length = int.from_bytes(first[:8], "little")
            if size < 8 or not 0 < length <= MAX_HEADER_BYTES:
                raise UserError(f"{path} is not a safetensors file (no valid header at its start)")
            raw = first[8 : 8 + length]
            while len(raw) < length and (more := file.read(length - len(raw))):
                raw += more
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:  # a folder, too (on Windows as a lack of permission)
        if path.is_dir():
            raise UserError(f"{path} is a folder; expected a .safetensors file") from None
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(raw) < length and raw.lstrip()[:1] == b"{":
        raise UserError(f"{path} is truncated within its header; make, copy or download it again")
    try:
        header = json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError):
        header = None
    if not isinstance(header, dict):
        raise UserError(f"{path} is not a safetensors file (its header is not a JSON object)")
    return header, 8 + length, size


def _parse_info(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    try:
        dtype_name, shape = entry["dtype"], tuple(entry["shape"])  # type: ignore[index]
        begin, end = entry["data_offsets"]  # type: ignore[index]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is not a safetensors file (bad header entry for {name!r})") from None
    dtype = _DTYPES.get(dtype_name)
    if dtype is None:
        raise UserError(
            f"{path}: tensor {name!r} has the dtype {dtype_name}, which is not supported; known: {', '.join(_DTYPES)}"
        )
    info = TensorInfo(dtype, shape, data_start + begin, end - begin)
    count = 1
    for size in shape:
        count *= size
    if begin < 0 or info.nbytes != count * dtype.itemsize:
        raise UserError(f"{path} is damaged: {name!r} {list(shape)} {dtype_name} does not fill its byte range")
    return info


def save_safetensors(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write ``tensors`` atomically. The same content gives the same bytes (the safetensors package itself
    writes metadata in a random order).
    """
    infos = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_streamed(path, infos, tensors.items(), metadata)


def write_streamed(
    path: str | os.PathLike[str],
    infos: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file of any size atomically, tensor by tensor.

    Args:
        path: the file; an older one is replaced only when the new one is complete.
        infos: dtype and shape of every tensor, known before the first is made.
        tensors: ``(name, tensor)`` in any order, from any device; each name of ``infos`` exactly once.
        metadata: strings to strings.
    """
    with streamed_file(path, infos, metadata) as file:
        for name, tensor in tensors:
            file.write(name, tensor)


class StreamedFile:
    """A file that :func:`streamed_file` has open for writing."""

    def __init__(
        self,
        file: BinaryIO,
        infos: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None,
    ) -> None:
        self._file, self._infos = file, infos
        header, self._offsets = _layout(infos, metadata)
        self._data_start = 8 + len(header)
        self._done: set[str] = set()
        self._write_header(header)

    def write(self, name: str, tensor: Tensor) -> None:
        """One of the announced tensors, from any device."""
        dtype, shape = self._infos[name]
        if name in self._done or tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"{name}: got {tensor.dtype} {tuple(tensor.shape)}, announced {dtype} {tuple(shape)}"
                + (" (written twice)" if name in self._done else "")
            )
        self._file.seek(self._data_start + self._offsets[name])
        self._file.write(memoryview(_as_bytes(tensor.detach().contiguous().cpu()).numpy()))
        self._done.add(name)

    def describe(self, metadata: Mapping[str, str]) -> None:
        """Replace the metadata, by some that takes as much room: what is known only once all tensors are made."""
        header, _ = _layout(self._infos, metadata)
        if 8 + len(header) != self._data_start:
            raise ValueError("other metadata has to have the length of the first")
        self._write_header(header)

    def _write_header(self, header: bytes) -> None:
        self._file.seek(0)
        self._file.write(len(header).to_bytes(8, "little") + header)

    def check_complete(self) -> None:
        if missing := [name for name in self._infos if name not in self._done]:
            raise ValueError(f"announced but not written: {', '.join(missing[:5])}")


@contextmanager
def streamed_file(
    path: str | os.PathLike[str],
    infos: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
) -> Iterator[StreamedFile]:
    """What :func:`write_streamed` does, for tensors that are made while something else is written as well.

    The file gets its name when the block ends without an error.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        streamed = StreamedFile(file, infos, metadata)
        yield streamed
        streamed.check_complete()


def _layout(
    infos: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, int]]:
    """Header bytes (padded to 8) and the data offset of every tensor.

    Wide dtypes come first, so that every tensor is aligned to its item size whatever precedes it.
    """
    header: dict[str, object] = {}
    if metadata:
        for key, value in metadata.items():
            if not isinstance(value, str):
                raise TypeError(f"metadata {key!r} is {type(value).__name__}; safetensors holds strings only")
        header["__metadata__"] = dict(sorted(metadata.items()))
    offsets: dict[str, int] = {}
    position = 0
    for name in sorted(infos, key=lambda key: -infos[key][0].itemsize):
        dtype, shape = infos[name]
        if dtype not in _NAMES:
            raise TypeError(f"{name}: safetensors cannot hold {dtype}")
        end = position + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        offsets[name] = position
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    return text + b" " * (-len(text) % 8), offsets
