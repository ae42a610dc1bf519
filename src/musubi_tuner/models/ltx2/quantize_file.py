"""An NF4 copy of a checkpoint, made tensor by tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from musubi_tuner.common.errors import UserError
from musubi_tuner.common.progress import bytes_progress
from musubi_tuner.common.safetensors_io import SafetensorsFile, TensorInfo, write_streamed
from musubi_tuner.quantization.packed import Nf4
from musubi_tuner.quantization.stored import NF4_BLOCK_KEY, NF4_MARK, SCALE, SHAPE, read_stored

from .keys import transformer_keys
from .quantize import is_target


def quantize_file(source: Path, target: Path, *, block_size: int, device: torch.device | str) -> int:
    """Write ``target``: the transformer's weights in NF4, all else as it is; the number of quantised weights.

    The codes are those that loading ``source`` with ``--nf4_base`` makes. The scales have the dtype of the weights,
    which holds a largest magnitude exactly. Host memory holds one weight at a time.

    Raises:
        UserError: ``source`` has no transformer, is quantised already, or has no weight of a fitting width.
    """
    file, method = SafetensorsFile(source), Nf4(block_size)
    chosen = set(weights_to_quantise(file, block_size).values())
    infos: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for key, info in file.tensors.items():
        infos |= _quantised_infos(key, info, block_size) if key in chosen else {key: (info.dtype, info.shape)}
    metadata = {**file.metadata, **NF4_MARK, NF4_BLOCK_KEY: str(block_size)}
    write_streamed(target, infos, _tensors(file, chosen, method, device), metadata)
    return len(chosen)


def weights_to_quantise(file: SafetensorsFile, block_size: int) -> dict[str, str]:
    """Name in the transformer to key in the file of each weight that is quantised.

    Raises:
        UserError: see :func:`quantize_file`.
    """
    keys = transformer_keys(file.tensors)
    stored = read_stored({name: file.tensors[key] for name, key in keys.items()}, file.metadata, str(file.path))
    if stored.kind != "dense":
        raise UserError(f"{file.path} is quantised already ({stored.kind.upper()}); give the bf16 file")
    fits = Nf4(block_size).fits
    chosen = {name: key for name, key in keys.items() if is_target(name) and fits(file.tensors[key].shape)}
    if not chosen:
        raise UserError(f"{file.path}: no weight has rows of whole blocks of {block_size}; lower --nf4_block_size")
    return chosen


def _quantised_infos(key: str, info: TensorInfo, block_size: int) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
    layer, (n, k) = key.removesuffix(".weight"), info.shape
    return {
        key: (torch.uint8, (n, k // 2)),
        layer + SCALE: (info.dtype, (n, k // block_size, 1)),
        layer + SHAPE: (torch.int64, (2,)),
    }


def _tensors(
    file: SafetensorsFile, chosen: Collection[str], method: Nf4, device: torch.device | str
) -> Iterator[tuple[str, Tensor]]:
    sizes = {key: info.nbytes for key, info in file.tensors.items()}
    for key, tensor in bytes_progress(file.read(), sizes, desc="quantising"):
        if key not in chosen:
            yield key, tensor
            continue
        packed = method.quantize(tensor.to(device))
        layer = key.removesuffix(".weight")
        yield key, packed.weight
        yield layer + SCALE, packed.scale.to(tensor.dtype).unsqueeze(-1)
        yield layer + SHAPE, torch.tensor(tensor.shape)
