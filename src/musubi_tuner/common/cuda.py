"""Settings of CUDA that hold for the whole process."""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger(__name__)


def configure_cuda(*, allow_tf32: bool, cudnn_benchmark: bool, memory_fraction: float | None) -> None:
    """Apply what was asked for; without CUDA nothing is done and a warning is logged."""
    if not (allow_tf32 or cudnn_benchmark or memory_fraction is not None):
        return
    if not torch.cuda.is_available():
        logger.warning("no CUDA device: the flags --cuda_* have no effect")
        return
    if allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    if cudnn_benchmark:
        torch.backends.cudnn.benchmark = True
    if memory_fraction is not None:
        torch.cuda.set_per_process_memory_fraction(memory_fraction)
