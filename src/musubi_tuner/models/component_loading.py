"""Fill a module from a checkpoint: read only its keys, never allocate it twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from musubi_tuner.common.errors import UserError
from musubi_tuner.common.progress import bytes_progress

from .checkpoint import Checkpoint

M = TypeVar("M", bound=nn.Module)
C = TypeVar("C", bound="Component")


class Component:
    """A frozen module behind an interface of this project's own."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    @property
    def device(self) -> torch.device:
        return next(self._module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self._module.parameters()).dtype

    def to(self: C, device: torch.device | str) -> C:
        """Move the weights; dtypes stay."""
        self._module.to(device)
        return self


def build_empty(factory: Callable[[], M]) -> M:
    """Call ``factory`` with parameters on the meta device.

    Buffers are real: several are computed when the module is built and are in no file (rotary frequencies,
    resampling filters).
    """
    with init_empty_weights(include_buffers=False):
        return factory()


def fill(
    module: M,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    source: str,
    device: torch.device | str = "cpu",
) -> M:
    """Assign ``tensors`` to a module from :func:`build_empty` and make it ready for inference.

    Raises:
        UserError: keys are missing or unexpected, or shapes differ; ``source`` opens the message.
    """
    state = dict(tensors)
    expected = module.state_dict()
    _check_keys(state, expected, source)
    module.load_state_dict(state, strict=True, assign=True)
    module.to(device)
    module.eval().requires_grad_(False)
    left = [name for name, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta]
    if left:
        raise AssertionError(f"{source}: not loaded: {', '.join(left[:5])}")
    return module


def read_renamed(
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    desc: str,
) -> Iterator[tuple[str, Tensor]]:
    """Read the file keys ``names.values()`` and yield them under the module names ``names.keys()``."""
    module_name = {key: name for name, key in names.items()}
    sizes = {key: checkpoint.tensors[key].nbytes for key in module_name}
    tensors = checkpoint.read(module_name, device=device, dtype=dtype)
    for key, tensor in bytes_progress(tensors, sizes, desc=desc):
        yield module_name[key], tensor


def _check_keys(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    problems = []
    if missing := [name for name in expected if name not in state]:
        problems.append(f"{len(missing)} missing ({_some(missing)})")
    if unexpected := [name for name in state if name not in expected]:
        problems.append(f"{len(unexpected)} not known ({_some(unexpected)})")
    wrong = [
        f"{name} {list(state[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if wrong:
        problems.append(f"{len(wrong)} of another shape ({_some(wrong)})")
    if problems:
        raise UserError(
            f"{source}: its tensors do not fit its configuration: {'; '.join(problems)}; "
            "the file is damaged or of an unsupported version"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
