"""A quantised copy of a checkpoint, made tensor by tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from musubi_tuner.common.errors import UserError
from musubi_tuner.common.progress import bytes_progress
from musubi_tuner.common.safetensors_io import SafetensorsFile, write_streamed
from musubi_tuner.quantization.packed import Int8, Nf4
from musubi_tuner.quantization.stored import INT8_MARK, NF4_BLOCK_KEY, NF4_MARK, SCALE, SHAPE, OwnBase, read_stored

from .keys import transformer_keys
from .quantize import Quantize, is_target, quantize_plainly


@dataclass(frozen=True)
class Alternation:
    """Weights that are quantised less the factors of a LoRA.

    Attributes:
        own_base: how the file is marked.
        names: of the weights in the transformer.
        quantize: makes the packed weight of a dense one, given its name and the method.
    """

    own_base: OwnBase
    names: Collection[str]
    quantize: Quantize


def quantize_file(
    source: Path,
    target: Path,
    *,
    method: Nf4 | Int8,
    device: torch.device | str,
    alternation: Alternation | None = None,
) -> int:
    """Write ``target``: the transformer's weights quantised, all else as it is; the number of quantised weights.

    The codes are those that loading ``source`` with ``--nf4_base`` or ``--int8_base`` makes. The scales of NF4 have the
    dtype of the weights, which holds a largest magnitude exactly; those of an ``alternation``, whose weights are none
    of the file's, are float32. Host memory holds one weight at a time.

    Raises:
        UserError: ``source`` has no transformer, is quantised already, has no weight of a fitting width, or one that
            is not finite.
    """
    file = SafetensorsFile(source)
    chosen = {key: name for name, key in weights_to_quantise(file, method).items()}
    infos: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for key, info in file.tensors.items():
        if key in chosen:
            infos |= _quantised_infos(key, info.shape, _scale_dtype(info.dtype, chosen[key], alternation), method)
        else:
            infos[key] = (info.dtype, info.shape)
    mark = {**NF4_MARK, NF4_BLOCK_KEY: str(method.block_size)} if isinstance(method, Nf4) else INT8_MARK
    if alternation is not None:
        mark = {**mark, **alternation.own_base.metadata}
    write_streamed(target, infos, _tensors(file, chosen, method, device, alternation), {**file.metadata, **mark})
    return len(chosen)


def _scale_dtype(dtype: torch.dtype, name: str, alternation: Alternation | None) -> torch.dtype:
    """Of NF4."""
    return torch.float32 if alternation is not None and name in alternation.names else dtype


def weights_to_quantise(file: SafetensorsFile, method: Nf4 | Int8) -> dict[str, str]:
    """Name in the transformer to key in the file of each weight that is quantised.

    Raises:
        UserError: see :func:`quantize_file`.
    """
    try:
        keys = transformer_keys(file.tensors)
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from None
    stored = read_stored({name: file.tensors[key] for name, key in keys.items()}, file.metadata, str(file.path))
    if stored.kind != "dense":
        raise UserError(f"{file.path} is quantised already ({stored.kind.upper()}); give the bf16 file")
    chosen = {name: key for name, key in keys.items() if is_target(name) and method.fits(file.tensors[key].shape)}
    if not chosen:
        size = method.block_size
        raise UserError(f"{file.path}: no weight has rows of whole blocks of {size}; lower --nf4_block_size")
    return chosen


def _quantised_infos(
    key: str, shape: tuple[int, ...], scale_dtype: torch.dtype, method: Nf4 | Int8
) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
    layer, (n, k) = key.removesuffix(".weight"), shape
    if isinstance(method, Int8):
        return {key: (torch.int8, (n, k)), layer + SCALE: (torch.float32, (n, method.blocks_of(k), 1))}
    return {
        key: (torch.uint8, (n, k // 2)),
        layer + SCALE: (scale_dtype, (n, k // method.block_size, 1)),
        layer + SHAPE: (torch.int64, (2,)),
    }


def _tensors(
    file: SafetensorsFile,
    chosen: Mapping[str, str],
    method: Nf4 | Int8,
    device: torch.device | str,
    alternation: Alternation | None,
) -> Iterator[tuple[str, Tensor]]:
    sizes = {key: info.nbytes for key, info in file.tensors.items()}
    for key, tensor in bytes_progress(file.read(), sizes, desc="quantising"):
        if key not in chosen:
            yield key, tensor
            continue
        name, quantize = chosen[key], quantize_plainly if alternation is None else alternation.quantize
        packed = quantize(name, tensor.to(device), method)
        if not packed.scale.isfinite().all():
            raise UserError(
                f"{file.path}: {key} holds NaN or infinity, so the checkpoint is broken; make or download it again"
            )
        layer = key.removesuffix(".weight")
        yield key, packed.weight
        if isinstance(method, Int8):
            yield layer + SCALE, packed.scale.unsqueeze(-1)
            continue
        yield layer + SCALE, packed.scale.to(_scale_dtype(tensor.dtype, name, alternation)).unsqueeze(-1)
        yield layer + SHAPE, torch.tensor(tensor.shape)
