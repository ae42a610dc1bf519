"""Several processes: how they may be launched, and what they exchange.

The LoRA runs inside the base model's forward, so a DDP wrapper would never see a forward of its own module;
gradients are averaged here instead, once per optimizer step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from musubi_tuner.common.errors import UserError

# What accelerate launch sets for configurations that split the model.
_SPLITTING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}


def check_launch(environment: Mapping[str, str]) -> None:
    """Raise UserError where accelerate is configured to split the model over processes."""
    for variable, name in _SPLITTING.items():
        if environment.get(variable, "").lower() in ("true", "1", "yes", "on"):
            raise UserError(
                f"accelerate is set up for {name}, which this trainer does not support: each process holds the whole "
                "frozen model and its own batches. Run accelerate config again with MULTI_GPU and without it, or "
                "launch with accelerate launch --multi_gpu; for less memory use --gradient_checkpointing"
            )


def average_gradients(parameters: Sequence[Parameter]) -> None:
    """Average gradients over all processes, in place.

    Ranks may differ in which parameters got a gradient (a batch without audio leaves audio modules out): a
    parameter with a gradient on any rank counts as zero on the others, one without any stays ``None``.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    device = parameters[0].device
    has_gradient = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=device)
    dist.all_reduce(has_gradient, op=dist.ReduceOp.MAX)
    used = [p for p, flag in zip(parameters, has_gradient.tolist(), strict=True) if flag]
    if not used:
        return
    for p in used:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.reshape(-1).float() for p in used])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, mean in zip(used, flat.split([p.numel() for p in used]), strict=True):
        p.grad.copy_(mean.view_as(p))


def sum_over_processes(values: Tensor, device: torch.device) -> Tensor:
    """Sum of a small tensor on the CPU, of the same shape on every process; it travels by way of ``device``."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values
    values = values.to(device, copy=True)
    dist.all_reduce(values)
    return values.cpu()
