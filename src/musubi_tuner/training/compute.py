"""Where and in what precision a run computes."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from musubi_tuner.common.cuda import configure_cuda
from musubi_tuner.common.errors import UserError
from musubi_tuner.config.training import TrainNetworkConfig

from .state import Progress
from .tracking import log_folder, tracker_names

logger = logging.getLogger(__name__)

# The other processes wait in the next step while the first one renders previews and saves.
_PATIENCE = timedelta(hours=2)
_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Compute:
    """Where and in what dtype the run computes."""

    accelerator: Accelerator
    device: torch.device
    dtype: torch.dtype
    mixed_precision: str


def make_compute(config: TrainNetworkConfig) -> Compute:
    precision = config.precision.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
    if precision is None:
        precision = "bf16" if torch.cuda.is_available() else "no"
        logger.info("--mixed_precision not given: using %s", precision)
    if precision not in _DTYPES:
        raise UserError(f"mixed precision {precision!r}: expected one of {', '.join(_DTYPES)}; use --mixed_precision")
    for name, asked in (("fp16", config.precision.full_fp16), ("bf16", config.precision.full_bf16)):
        if asked and precision != name:
            raise UserError(f"--full_{name} needs --mixed_precision {name}; this run computes with {precision}")
    accelerator = Accelerator(
        mixed_precision="no",  # dtypes are set here, tensor by tensor; autocast would only add casts
        log_with=tracker_names(config.tracking) or None,
        project_dir=log_folder(config.tracking),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_patience(config))],
    )
    cuda = config.cuda
    configure_cuda(
        allow_tf32=cuda.cuda_allow_tf32,
        cudnn_benchmark=cuda.cuda_cudnn_benchmark,
        memory_fraction=cuda.cuda_memory_fraction,
    )
    return Compute(accelerator, accelerator.device, _DTYPES[precision], precision)


def _patience(config: TrainNetworkConfig) -> timedelta:
    minutes = config.processes.ddp_timeout
    return _PATIENCE if minutes is None else timedelta(minutes=minutes)


class _Scaler(torch.amp.GradScaler):
    """Also unscales gradients that are fp16 themselves (``--full_fp16``)."""

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: torch.Tensor, found_inf: torch.Tensor, allow_fp16: bool
    ) -> dict[torch.device, torch.Tensor]:
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)


def make_scaler(compute: Compute, progress: Progress) -> torch.amp.GradScaler | None:
    if compute.mixed_precision != "fp16":
        return None
    scaler = _Scaler(compute.device.type)
    if progress.scaler:
        scaler.load_state_dict(progress.scaler)
    # It makes its scale on first use. A process whose first step has nothing to scale unscales the others' gradients.
    scaler.scale(torch.zeros((), device=compute.device))
    return scaler
