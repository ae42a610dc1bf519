"""The optimizer's step within the backward pass: weights move as soon as their gradients are there, which then go.

Gradients never exist all at once, but in parts: a part is stepped when it holds a thirty-second of them. So the host
asks the device only so often whether they are finite, and memory is that of one part. Everything else is that of a step
after the backward pass, bit for bit, but for two things that need all gradients: their common norm cannot be limited
(that of each weight is), and what was stepped before a gradient turned out not to be finite stays stepped.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from musubi_tuner.common.errors import UserError

from .gradients import clip_each, norm_report

logger = logging.getLogger(__name__)

PARTS = 32  # of all gradients


class FusedBackward:
    """Steps an optimizer while a loss is differentiated. One backward pass is one step.

    Args:
        max_norm: limit of the norm of each weight's gradient; 0 for none.
        groups: parts of the parameters, by name, to report the norms of.
        part_bytes: gradients that are stepped together; by default a thirty-second of all.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        max_norm: float = 0.0,
        groups: Mapping[str, Sequence[Parameter]] | None = None,
        part_bytes: int | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._max_norm = max_norm
        self._groups = groups or {}
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        total = sum(p.numel() * p.element_size() for p in self._parameters)
        self._part_bytes = total // PARTS if part_bytes is None else part_bytes
        self._hooks = [p.register_post_accumulate_grad_hook(self._arrived) for p in self._parameters]
        self._running = False
        self._start()

    def close(self) -> None:
        """Leave the parameters to others."""
        for hook in self._hooks:
            hook.remove()

    def _start(self) -> None:
        self._begun = self._broken = False
        self._norms: dict[Parameter, Tensor] = {}
        self._num_stepped = 0
        self._settings: list[dict[str, Any]] | None = None  # of the groups, when the step began
        self._pending: list[Parameter] = []
        self._pending_bytes = 0

    def backward(self, loss: Tensor) -> None:
        """Differentiate and step. A loss that is not finite does nothing.

        Raises:
            RuntimeError: for a second loss of a step.
        """
        if self._begun:
            raise RuntimeError("with the optimizer's step in it, one backward pass is one step")
        self._begun = True
        if not loss.isfinite():
            return
        self._running = True
        try:
            loss.backward()
            self._step_part()
        finally:
            self._running = False

    @property
    def steps_before_fault(self) -> str:
        """How far a step got whose gradients were not finite, as text; empty where nothing had moved."""
        if not (self._broken and self._num_stepped):
            return ""
        return f"; {self._num_stepped} of {len(self._parameters)} weights had moved before that, by finite gradients"

    def norms(self) -> dict[str, Tensor]:
        """Norms of the gradients before they were limited, as of :func:`.gradients.clip_gradients`."""
        return norm_report({p: self._norms[p] for p in self._parameters if p in self._norms}, self._groups)

    def end_step(self) -> bool:
        """Get ready for the next step; returns whether this one moved anything."""
        moved = self._num_stepped > 0
        self._start()
        return moved

    def _arrived(self, parameter: Parameter) -> None:
        if not self._running:
            return
        self._pending.append(parameter)
        self._pending_bytes += parameter.numel() * parameter.element_size()
        if self._pending_bytes >= self._part_bytes:
            self._step_part()

    @torch.no_grad()
    def _step_part(self) -> None:
        """Step what has a gradient, unless one so far was not finite, and free these gradients."""
        pending, self._pending, self._pending_bytes = self._pending, [], 0
        if pending and not self._broken:
            norms = torch._foreach_norm([p.grad for p in pending])
            self._norms.update(zip(pending, norms, strict=True))
            self._broken = not bool(torch.stack(norms).isfinite().all())
            if not self._broken:
                clip_each(pending, norms, self._max_norm)
                self._step_optimizer()
                self._num_stepped += len(pending)
        for parameter in pending:
            parameter.grad = None

    def _step_optimizer(self) -> None:
        """Optimizers pass by what has no gradient. What they count by group has to count a step once."""
        groups = self._optimizer.param_groups
        if self._settings is None:
            self._settings = [copy.deepcopy({k: v for k, v in g.items() if k != "params"}) for g in groups]
        else:
            for group, settings in zip(groups, self._settings, strict=True):
                weights = group["params"]
                group.clear()  # some optimizers begin to count in their first step
                group.update(copy.deepcopy(settings), params=weights)
        self._optimizer.step()


def check_steps_in_parts(
    make: Callable[[list[Parameter]], torch.optim.Optimizer], name: str, device: torch.device
) -> None:
    """Try out whether an optimizer gives the same weights when it is stepped in parts.

    Args:
        make: an optimizer of parameters.
        name: the optimizer's, for the message.

    Raises:
        UserError: it does not, since it looks at all weights at once.
    """
    whole, parts = (_tried(make, device, part_bytes=size) for size in (1 << 40, 0))
    if not all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True)):
        raise UserError(
            f"--fused_backward_pass: {name} takes all gradients into account for each weight and cannot step them one "
            "after the other; leave it out, or use another --optimizer_type such as AdamW or Adafactor"
        )


def _tried(
    make: Callable[[list[Parameter]], torch.optim.Optimizer], device: torch.device, *, part_bytes: int
) -> list[Tensor]:
    """Four small weights after three steps."""
    draw = torch.Generator().manual_seed(0)
    # Large enough for optimizers that keep small states in 32 bit.
    weights = [Parameter(torch.randn(96, 64, generator=draw).to(device)) for _ in range(4)]
    targets = [torch.randn(96, 64, generator=draw).to(device) for _ in weights]
    fused = FusedBackward(make(weights), part_bytes=part_bytes)
    for _ in range(3):
        fused.backward(sum((w - t).pow(4).sum() for w, t in zip(weights, targets, strict=True)))
        fused.end_step()
    fused.close()
    return [w.detach() for w in weights]
