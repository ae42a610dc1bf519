"""Norms and clipping of gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

NORM = "grad_norm"


@torch.no_grad()
def clip_gradients(
    parameters: Sequence[Parameter], groups: Mapping[str, Sequence[Parameter]], max_norm: float
) -> dict[str, Tensor]:
    """Scale all gradients so that their common norm is at most ``max_norm``; 0 leaves them alone.

    The norm of each gradient is taken once, and the host does not wait for the device.

    Args:
        groups: parts of ``parameters``, by name.

    Returns:
        The norms before, ``grad_norm`` of all and ``grad_norm/<name>`` of each group that has a gradient.
    """
    trained = [p for p in parameters if p.grad is not None]
    norms = torch._foreach_norm([p.grad for p in trained]) if trained else []
    found = norm_report(dict(zip(trained, norms, strict=True)), groups)
    if trained and max_norm > 0 and not _is_known_within(found[NORM], max_norm):
        torch.nn.utils.clip_grads_with_norm_(trained, max_norm, found[NORM])
    return found


def norm_report(norms: Mapping[Parameter, Tensor], groups: Mapping[str, Sequence[Parameter]]) -> dict[str, Tensor]:
    """``grad_norm`` of all and ``grad_norm/<name>`` of each group that has a gradient, from the norms of each."""
    if not norms:
        return {NORM: torch.zeros(())}
    found = {NORM: _norm_of([*norms.values()])}
    for name, members in groups.items():
        own = [norms[p] for p in members if p in norms]
        if own:
            found[f"{NORM}/{name}"] = _norm_of(own)
    return found


@torch.no_grad()
def clip_each(parameters: Sequence[Parameter], norms: Sequence[Tensor], max_norm: float) -> None:
    """Scale each gradient by itself so that its norm, given, is at most ``max_norm``; 0 leaves them alone."""
    if max_norm > 0:
        for parameter, norm in zip(parameters, norms, strict=True):
            torch.nn.utils.clip_grads_with_norm_(parameter, max_norm, norm)


def _is_known_within(norm: Tensor, max_norm: float) -> bool:
    # Only of a norm on the CPU: rather than wait for a GPU, multiply by 1.
    return norm.device.type == "cpu" and bool(norm <= max_norm)


def _norm_of(norms: Sequence[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(norms))
