"""Build the transformer of a checkpoint and fill it without ever holding the file in memory."""

from __future__ import annotations

from collections.abc import Sequence
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


def load_transformer(
    checkpoint: Checkpoint,
    *,
    mode: Mode,
    dtype: torch.dtype,
    device: torch.device | str,
) -> LTX2Transformer:
    """Load the frozen transformer, or the stream of it that ``mode`` asks for.

    Only that stream's tensors are read, in the order of the file, each straight to its place: host memory
    holds little more than what stays there.

    Raises:
        UserError: before anything is read, when the tensors are not exactly those of the configuration.
    """
    shapes = {key: tuple(info.shape) for key, info in checkpoint.tensors.items()}
    config = TransformerConfig.from_metadata(checkpoint.config.get("transformer"), shapes)
    model = build_transformer(config, mode)
    keys = {name: key for name, key in transformer_keys(shapes).items() if in_mode(name, mode)}
    _check_tensors(model, {name: shapes[key] for name, key in keys.items()}, source=str(checkpoint.path))

    names = {key: name for name, key in keys.items()}
    sizes = {key: checkpoint.tensors[key].nbytes for key in names}
    tensors = checkpoint.read(list(names), device=device, dtype=dtype)
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
