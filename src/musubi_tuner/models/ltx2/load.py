"""Build the transformer of a checkpoint and fill it without ever holding the file in memory."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from musubi_tuner.common.errors import UserError
from musubi_tuner.common.progress import bytes_progress

from .config import Mode, TransformerConfig
from .keys import in_mode, transformer_keys
from .transformer import LTX2Transformer

if TYPE_CHECKING:
    from musubi_tuner.models.checkpoint import Checkpoint

_LISTED = 5


def build_transformer(config: TransformerConfig, mode: Mode) -> LTX2Transformer:
    """The transformer without memory behind its parameters (device ``meta``), none of them trainable."""
    with torch.device("meta"):
        model = LTX2Transformer(config, mode)
    return model.requires_grad_(False)


def transformer_config(checkpoint: Checkpoint) -> TransformerConfig:
    """The configuration of a checkpoint's transformer, from its metadata and shapes."""
    return TransformerConfig.from_metadata(checkpoint.config.get("transformer"), _shapes(checkpoint))


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {key: tuple(info.shape) for key, info in checkpoint.tensors.items()}


def load_transformer(
    checkpoint: Checkpoint,
    *,
    mode: Mode,
    dtype: torch.dtype,
    device: torch.device | str,
    host_blocks: Collection[int] = (),
) -> LTX2Transformer:
    """Load the frozen transformer, or the stream of it that ``mode`` asks for, to ``device``.

    Only that stream's tensors are read, in the order of the file, each straight to its place: host memory
    holds little more than what stays there, which are the blocks at the positions ``host_blocks``.

    Raises:
        UserError: before anything is read, when the tensors are not exactly those of the configuration.
    """
    shapes = _shapes(checkpoint)
    model = build_transformer(transformer_config(checkpoint), mode)
    keys = {name: key for name, key in transformer_keys(shapes).items() if in_mode(name, mode)}
    _check_tensors(model, {name: shapes[key] for name, key in keys.items()}, source=str(checkpoint.path))

    names = {key: name for name, key in keys.items()}
    sizes = {key: checkpoint.tensors[key].nbytes for key in names}
    host_prefixes = tuple(f"transformer_blocks.{position}." for position in host_blocks)
    on_host = {key: name.startswith(host_prefixes) for key, name in names.items()}
    tensors = chain(
        checkpoint.read([key for key in names if not on_host[key]], device=device, dtype=dtype),
        checkpoint.read([key for key in names if on_host[key]], device="cpu", dtype=dtype),
    )
    for key, tensor in bytes_progress(tensors, sizes, desc="transformer"):
        assign_parameter(model, names[key], tensor)
    assert_complete(model)
    return model


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
