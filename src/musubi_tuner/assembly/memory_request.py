"""What the estimate of memory asks of a checkpoint and of the flags; nothing but headers is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from musubi_tuner.common.safetensors_io import TensorInfo
from musubi_tuner.config.model import Mode
from musubi_tuner.memory.activations import Adapted, layer_sizes
from musubi_tuner.memory.estimate import Weights
from musubi_tuner.memory.proposals import PossibleBases
from musubi_tuner.models.ltx2.config import TransformerConfig
from musubi_tuner.models.ltx2.keys import in_mode, transformer_keys
from musubi_tuner.models.ltx2.quantize import Quantization, is_target, stored_transformer
from musubi_tuner.quantization.packed import packed_bytes
from musubi_tuner.quantization.stored import Stored

from .base import Base

_BLOCKS = "transformer_blocks."
_FP32 = 4


def base_weights(base: Base) -> Weights:
    """Bytes of a checkpoint's transformer as :func:`load_transformer` holds it."""
    tensors = base.checkpoint.tensors
    infos = {name: tensors[key] for name, key in transformer_keys(tensors).items()}
    return weights_of(infos, stored_transformer(base.checkpoint), base.streams, base.dtype, base.quantization)


def weights_of(
    infos: Mapping[str, TensorInfo], stored: Stored, mode: Mode, dtype: torch.dtype, quantization: Quantization | None
) -> Weights:
    """The same for the tensors of a transformer by name."""
    blocks: dict[int, int] = {}
    rest = largest = 0
    for name, info in infos.items():
        if name in stored.companions or not in_mode(name, mode):
            continue
        size = _held(name, infos, stored, dtype, quantization)
        dense = torch.Size(stored.shape(name, info)).numel() * dtype.itemsize
        if size != dense:
            largest = max(largest, dense)
        if name.startswith(_BLOCKS):
            position = int(name.split(".", 2)[1])
            blocks[position] = blocks.get(position, 0) + size
        else:
            rest += size
    return Weights(tuple(blocks[position] for position in sorted(blocks)), rest, largest)


def _held(
    name: str,
    infos: Mapping[str, TensorInfo],
    stored: Stored,
    dtype: torch.dtype,
    quantization: Quantization | None,
) -> int:
    info = infos[name]
    shape = stored.shape(name, info)
    if quantization is not None and is_target(name):
        if name in stored.scales:
            scale = stored.scales[name]
            return info.nbytes + _FP32 * (1 if scale is None else torch.Size(infos[scale].shape).numel())
        if stored.kind == "dense" and quantization.method.fits(shape):
            of_inputs = _FP32 * shape[1] if quantization.calibrate else 0
            return packed_bytes(quantization.method, shape) + of_inputs
    return torch.Size(shape).numel() * dtype.itemsize


def possible_bases(base: Base) -> PossibleBases:
    """Ways to hold the base weights that take no more than the run's own."""

    def held(quantization: Quantization) -> Weights:
        return base_weights(replace(base, quantization=quantization))

    stored, quantization = stored_transformer(base.checkpoint), base.quantization
    own = "dense" if quantization is None else quantization.kind
    found = {own: (base_weights(base), ())}
    if own == "dense" and stored.kind != "nf4":
        request = Quantization("fp8", requantise=stored.kind == "dense")
        flags = ("--fp8_base --fp8_scaled",) if request.requantise else ("--fp8_base",)
        found["fp8"] = held(request), flags
    if own != "nf4" and stored.kind == "dense":
        found["nf4"] = held(Quantization("nf4")), _instead_of(quantization)
    return found


def _instead_of(quantization: Quantization | None) -> tuple[str, ...]:
    """Flags that make a base NF4, and take back those of what it was; later ones on a command line win."""
    if quantization is None:
        return ("--nf4_base",)
    return (*(f"--no-{name}" for name in quantization.flags), "--nf4_base")


def layer_names(base: Base) -> list[str]:
    """Dotted paths of the linear layers in the blocks of the transformer that is built."""
    return linear_layers(transformer_keys(base.checkpoint.tensors), base.streams)


def linear_layers(names: Iterable[str], mode: Mode) -> list[str]:
    """The same among the names of a transformer's tensors."""
    paths = (name.removesuffix(".weight") for name in names if name.startswith(_BLOCKS) and name.endswith(".weight"))
    return [path for path in paths if in_mode(path, mode) and not path.endswith("_norm")]


def by_block(adapted: Mapping[str, Adapted], config: TransformerConfig) -> tuple[Mapping[str, Adapted], ...]:
    """Layers by their paths to layers by block and name in it."""
    found: list[dict[str, Adapted]] = [{} for _ in range(config.num_layers)]
    for path, layer in adapted.items():
        position, _, name = path.removeprefix(_BLOCKS).partition(".")
        found[int(position)][name] = layer
    return tuple(found)


def shapes_of(paths: Iterable[str], config: TransformerConfig) -> dict[str, tuple[int, int]]:
    """(N, K) of layers in the blocks, by their paths."""
    sizes = layer_sizes(config)
    return {path: sizes[path.split(".", 2)[2]] for path in paths}


def lora_layers(ranks: Mapping[str, int], config: TransformerConfig, *, lengths: bool = False) -> dict[str, Adapted]:
    """Layers with LoRAs of these ranks; ``lengths``: each row of a weight has one (DoRA)."""
    shapes = shapes_of(ranks, config)
    return {path: Adapted.by_lora(rank, shapes[path], lengths=lengths) for path, rank in ranks.items()}
