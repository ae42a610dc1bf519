"""Build the transformer of a checkpoint and fill it without ever holding the file in memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from musubi_tuner.common.errors import UserError
from musubi_tuner.common.progress import bytes_progress
from musubi_tuner.quantization.fp8 import quantize_fp8
from musubi_tuner.quantization.linear import pack_linear
from musubi_tuner.quantization.nf4 import find_kernel
from musubi_tuner.quantization.packed import Packed, dequantize
from musubi_tuner.quantization.stored import Stored, scale_matrix

from .config import Mode, TransformerConfig
from .keys import in_mode, transformer_keys
from .quantize import (
    Quantization,
    Quantize,
    WeightPlan,
    check_quantization,
    plan_weights,
    quantize_plainly,
    stored_transformer,
)
from .transformer import LTX2Transformer

if TYPE_CHECKING:
    from musubi_tuner.models.checkpoint import Checkpoint

_LISTED = 5

# What becomes of a weight [N, K], by the parameter's name; dtype and device stay.
Edits = Mapping[str, Callable[[Tensor], Tensor]]


def build_transformer(config: TransformerConfig, mode: Mode) -> LTX2Transformer:
    """The transformer without memory behind its parameters (device ``meta``), none of them trainable."""
    with torch.device("meta"):
        model = LTX2Transformer(config, mode)
    return model.requires_grad_(False)


def transformer_config(checkpoint: Checkpoint) -> TransformerConfig:
    """The configuration of a checkpoint's transformer, from its metadata and shapes."""
    shapes = _shapes(checkpoint, stored_transformer(checkpoint))
    return TransformerConfig.from_metadata(checkpoint.config.get("transformer"), shapes)


def _shapes(checkpoint: Checkpoint, stored: Stored) -> dict[str, tuple[int, ...]]:
    """Shapes of the file's tensors by key; of packed weights those that they stand for."""
    keys = transformer_keys(checkpoint.tensors)
    shapes = {key: stored.shape(name, checkpoint.tensors[key]) for name, key in keys.items()}
    return {key: shapes.get(key, tuple(info.shape)) for key, info in checkpoint.tensors.items()}


def transformer_shapes(checkpoint: Checkpoint, mode: Mode) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters that a mode loads, by name, from the header alone."""
    stored = stored_transformer(checkpoint)
    shapes, keys = _shapes(checkpoint, stored), transformer_keys(checkpoint.tensors)
    return {n: shapes[key] for n, key in keys.items() if in_mode(n, mode) and n not in stored.companions}


def load_transformer(
    checkpoint: Checkpoint,
    *,
    mode: Mode,
    dtype: torch.dtype,
    device: torch.device | str,
    quantization: Quantization | None = None,
    host_blocks: Collection[int] = (),
    quantize: Quantize = quantize_plainly,
    edits: Edits | None = None,
) -> LTX2Transformer:
    """Load the frozen transformer, or the stream of it that ``mode`` asks for, to ``device``.

    Only that stream's tensors are read, in the order of the file, each straight to its place: host memory
    holds little more than what stays there, which are the blocks at the positions ``host_blocks``. With
    ``quantization`` each weight is quantised before the next is read, by ``quantize``. ``edits`` change weights before
    that; FP8 weights of the file are made dense for it, and FP8 again.

    Raises:
        UserError: before anything is read, when the tensors are not exactly those of the configuration, or are
            quantised in another way than asked for, or are to be edited and NF4 or int8 already.
    """
    stored = check_quantization(checkpoint, quantization)
    keys = transformer_keys(checkpoint.tensors)
    shapes = _shapes(checkpoint, stored)
    config = TransformerConfig.from_metadata(checkpoint.config.get("transformer"), shapes)
    model = build_transformer(config, mode)
    keys = {name: key for name, key in keys.items() if in_mode(name, mode)}
    parameters = {name: key for name, key in keys.items() if name not in stored.companions}
    _check_tensors(model, {name: shapes[key] for name, key in parameters.items()}, source=str(checkpoint.path))

    infos = {name: checkpoint.tensors[key] for name, key in parameters.items()}
    plan = plan_weights(stored, infos, quantization, checkpoint.path.name)
    edits = edits or {}
    if edits:
        check_editable(checkpoint)
    if torch.device(device).type == "cuda" and quantization is not None and quantization.kind == "nf4":
        find_kernel()
    tensors = _read(
        checkpoint,
        keys,
        parameters,
        plan,
        dtype=dtype,
        device=device,
        quantization=quantization,
        quantize=quantize,
        edits=edits,
    )
    sizes = {name: info.nbytes for name, info in infos.items()}
    on_host = tuple(f"transformer_blocks.{position}." for position in host_blocks)
    for name, tensor in bytes_progress(tensors, sizes, desc="transformer"):
        if name.startswith(on_host):  # by way of the device, which is faster at casting and quantising
            tensor = tensor.to("cpu")
        if isinstance(tensor, Packed):
            pack_linear(model, name.removesuffix(".weight"), tensor)
        else:
            assign_parameter(model, name, tensor)
    assert_complete(model)
    return model


def check_editable(checkpoint: Checkpoint) -> None:
    """Raise UserError for a checkpoint whose weights cannot be changed while they are loaded."""
    kind = stored_transformer(checkpoint).kind
    if kind in ("int8", "nf4"):
        raise UserError(
            f"{checkpoint.path}: --base_weights cannot be merged into {kind.upper()} weights, where small changes are "
            f"rounded away; use the original file with --{kind}_base, which merges first"
        )


def _read(
    checkpoint: Checkpoint,
    keys: dict[str, str],
    parameters: dict[str, str],
    plan: WeightPlan,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    quantization: Quantization | None,
    quantize: Quantize,
    edits: Edits,
) -> Iterator[tuple[str, Tensor | Packed]]:
    """Every parameter of the model by name: dense in ``dtype`` or packed, on ``device``."""
    names = {key: name for name, key in parameters.items()}

    def read(wanted: Iterable[str], **options: Any) -> Iterator[tuple[str, Tensor]]:
        for key, tensor in checkpoint.read([parameters[name] for name in wanted], device=device, **options):
            yield names[key], tensor

    packed = plan.kept | plan.expanded
    for name, weight in read((n for n in parameters if n not in packed | plan.quantised), dtype=dtype):
        yield name, _edited(name, weight, edits)

    # Scales are a tenth of the weights at most, and stay on the device with them.
    scale_keys = {keys[scale]: name for name, scale in plan.stored.scales.items() if scale and name in parameters}
    scales = {}
    for key, scale in checkpoint.read(scale_keys, device=device, dtype=torch.float32):
        name = scale_keys[key]
        shape = plan.stored.shape(name, checkpoint.tensors[parameters[name]])
        scales[name] = scale_matrix(scale, shape, key)
    for name, weight in read(n for n in parameters if n in packed):
        scale = scales.pop(name, None)
        if name not in plan.kept:
            yield name, _edited(name, _expanded(weight, scale, dtype), edits)
        else:
            held = Packed(weight, weight.new_ones(1, 1, dtype=torch.float32) if scale is None else scale)
            yield name, _edited_fp8(held, edits[name]) if name in edits else held

    if plan.quantised:
        wanted = [parameters[name] for name in plan.quantised]
        for key, weight in checkpoint.read(wanted, device=quantization.device):
            name = names[key]
            yield name, quantize(name, _edited(name, weight, edits), quantization.method_for(name)).to(device)


def _edited(name: str, weight: Tensor, edits: Edits) -> Tensor:
    return edits[name](weight) if name in edits else weight


def _edited_fp8(held: Packed, edit: Callable[[Tensor], Tensor]) -> Packed:
    """Scales of the same kind, made anew."""
    dense = edit(dequantize(held.weight, held.scale, torch.float32))
    return Packed(*quantize_fp8(dense, tuple(held.scale.shape)))


def _expanded(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    if scale is None:
        return weight.to(dtype)
    dense = dequantize(weight.reshape(weight.shape[0], -1), scale, dtype)
    return dense if weight.dim() == 2 else dense.view(weight.shape)


def assign_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make ``tensor`` the frozen parameter called ``name``."""
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path).register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))


def assert_complete(model: nn.Module) -> None:
    """Raise AssertionError when a tensor of the model still has no memory behind it."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    left = [name for name, tensor in tensors if tensor.is_meta]
    assert not left, f"{len(left)} tensors were not loaded, e.g. {left[:_LISTED]}"


def _check_tensors(model: nn.Module, found: dict[str, tuple[int, ...]], *, source: str) -> None:
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    problems = []
    missing = [name for name in expected if name not in found]
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {_listed(missing)}")
    unexpected = [name for name in found if name not in expected]
    if unexpected:
        problems.append(f"{len(unexpected)} tensors have no place in the model: {_listed(unexpected)}")
    wrong = [
        f"{name} is {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if wrong:
        problems.append(f"{len(wrong)} tensors have another shape: {_listed(wrong)}")
    if problems:
        raise UserError(
            f"{source}: the transformer's tensors do not fit its configuration; {'; '.join(problems)}. "
            "Use an official LTX-2 file, or one whose metadata and tensors were kept together"
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
