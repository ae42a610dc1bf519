"""The memory that a run will take: told before anything is loaded, held against what is free, and told again when it
was not enough.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from musubi_tuner.assembly.base import Base
from musubi_tuner.assembly.memory_request import (
    base_weights,
    by_block,
    layer_names,
    lora_layers,
    possible_bases,
    shapes_of,
)
from musubi_tuner.common.devices import free_host_memory, is_out_of_memory, peak_memory
from musubi_tuner.common.dtypes import parse_dtype
from musubi_tuner.common.errors import UserError
from musubi_tuner.common.tables import format_bytes, format_table
from musubi_tuner.config.model import Mode
from musubi_tuner.config.network import LYCORIS
from musubi_tuner.config.training import TrainNetworkConfig
from musubi_tuner.dataset.sampling import BatchPlan, BatchSpec
from musubi_tuner.memory.activations import Adapted, BatchShape, Numbers
from musubi_tuner.memory.estimate import Estimate, Request, Trained, estimate, optimizer_state_bytes
from musubi_tuner.memory.proposals import Limits, PossibleBases, Proposal, propose, smallest
from musubi_tuner.models.checkpoint import Checkpoint, Component
from musubi_tuner.models.ltx2.config import TransformerConfig
from musubi_tuner.models.ltx2.load import transformer_config
from musubi_tuner.networks.files.lora_reader import LoraReader
from musubi_tuner.networks.lora_ltx2 import planned_ranks
from musubi_tuner.networks.network_args import parse_network_args
from musubi_tuner.networks.resolve import resolve_network_module

from .fused_backward import PARTS
from .optimizers import optimizer_class, parse_key_values
from .outlook import batch_size
from .previews import wants_previews
from .setup import layers_read, made_with, network_options

logger = logging.getLogger(__name__)

_AFTER_A_FAILURE = 0.85  # of what did not fit
_DECODERS: dict[Component, Mode] = {"video_vae_decoder": "audio", "audio_vae": "video", "vocoder": "video"}


@dataclass(frozen=True)
class MemoryOutlook:
    """An estimate beside what is free.

    Attributes:
        bases: ways to hold the base weights, for proposals.
    """

    request: Request
    estimate: Estimate
    limits: Limits
    bases: PossibleBases
    device: torch.device

    def table(self) -> str:
        """What takes how much when most is taken, and what is free."""
        columns = ["at the peak", str(self.device), *(["host memory"] if self.estimate.on_gpu else [])]
        rows = []
        for item in self.estimate.items:
            sizes = [item.device, item.host] if self.estimate.on_gpu else [item.device + item.host]
            rows.append([item.name, *(format_bytes(size) if size else "" for size in sizes)])
        sums = [self.estimate.device, self.estimate.host] if self.estimate.on_gpu else [self.estimate.device]
        free = [self.limits.device, self.limits.host]
        rows.append(["sum", *map(format_bytes, sums)])
        rows.append(["may be off by", format_bytes(self.estimate.uncertainty), ""][: len(columns)])
        rows.append(["free now", *map(format_bytes, free[: len(sums)])])
        return format_table(columns, rows, title="Memory, estimated from sizes")

    def check(self, *, ignore: bool) -> None:
        """Log the table, and warn where it will be tight.

        Raises:
            UserError: even less than what is estimated does not fit, and ``ignore`` is not asked for.
        """
        logger.info("%s", self.table())
        if self.limits.hold(self.estimate):
            return
        text = f"{self._lack()}; {self._advice(self.limits)}"
        if self._is_hopeless() and not ignore:
            raise UserError(f"{text}\n--ignore_memory_estimate starts the run all the same")
        logger.warning("%s", text)

    def peak(self) -> str:
        """What was taken at the most, beside the estimate."""
        found, expected = format_bytes(peak_memory(self.device)), format_bytes(self.estimate.device)
        if self.estimate.on_gpu:
            return f"{found}, estimated {expected}"
        return f"{found} of the process, estimated {expected} besides Python and PyTorch"

    def after_a_failure(self) -> str:
        """What should fit where the run as it is did not."""
        least = min(self.limits.device, self.estimate.device)
        return self._advice(Limits(round(_AFTER_A_FAILURE * least), self.limits.host))

    def _lack(self) -> str:
        where = f"on {self.device}" if self.estimate.on_gpu else "of memory"
        found = f"this run takes about {format_bytes(self.estimate.device)} {where}, "
        found += f"where {format_bytes(self.limits.device)} are free"
        if self.estimate.on_gpu and self.estimate.host > self.limits.host:
            found += f", and {format_bytes(self.estimate.host)} of host memory, where "
            found += f"{format_bytes(self.limits.host)} are free"
        return found

    def _is_hopeless(self) -> bool:
        certain = self.estimate.device - self.estimate.uncertainty
        return certain > self.limits.device or self.estimate.host - self.estimate.uncertainty > self.limits.host

    def _advice(self, limits: Limits) -> str:
        found = propose(self.request, self.bases, limits)
        if found:
            lines = "\n".join(f"  {proposal}   ({_sizes(proposal)})" for proposal in found)
            return f"what fits, the fastest first:\n{lines}"
        least = smallest(self.request, self.bases)
        flags = f"with {least} it takes about {_sizes(least)}" if least.flags else "no flag makes it smaller"
        return (
            f"{flags}, which does not fit either; use batch_size = 1, fewer target_frames or a lower resolution, a "
            "smaller --network_dim, --optimizer_type AdamW8bit, or --ltx2_mode video where the sound is not needed"
        )


@contextmanager
def told_with(outlook: MemoryOutlook) -> Iterator[None]:
    """Make one message of a lack of memory.

    Raises:
        UserError: memory was lacking in the block.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        expected = format_bytes(outlook.estimate.device)
        raise UserError(
            f"out of memory on {outlook.device}: {str(error).partition('.')[0]}. The estimate was {expected}, and "
            f"{format_bytes(outlook.limits.device)} were free; {outlook.after_a_failure()}"
        ) from None


def memory_outlook(config: TrainNetworkConfig, base: Base, plan: BatchPlan) -> MemoryOutlook:
    """Estimate a run from headers and flags."""
    model, names = transformer_config(base.checkpoint), layer_names(base)
    on_gpu = base.device.type == "cuda"
    halved = config.precision.full_fp16 or config.precision.full_bf16
    numbers = Numbers(base.dtype.itemsize, base.dtype.itemsize if halved else 4, fused_norms=on_gpu)
    request = Request(
        config=model,
        weights=base_weights(base),
        trained=_trained(config, names, model, numbers),
        batch=_largest_batch(config, plan, model),
        numbers=numbers,
        settings=config.memory.settings,
        decoders=_decoder_bytes(config, base.checkpoint),
        on_gpu=on_gpu,
    )
    bases = possible_bases(base)
    if layers_read(config, names):
        bases = {name: held for name, held in bases.items() if name == "dense"}
    return MemoryOutlook(request, estimate(request), _limits(config, base.device), bases, base.device)


def _adapted(config: TrainNetworkConfig, names: list[str], model: TransformerConfig) -> dict[str, Adapted]:
    """What the network trains, by the paths of the layers."""
    network = config.network
    if network.network_module == LYCORIS:
        shapes, bridge = shapes_of(names, model), resolve_network_module(LYCORIS)
        if network.dim_from_weights:
            sizes = bridge.sizes_of_file(network.network_weights, shapes)
        else:
            sizes = bridge.planned_sizes(shapes, network.network_dim, network.network_alpha, made_with(config))
        return {path: Adapted(*size) for path, size in sizes.items()}
    if network.dim_from_weights:
        infos = {name: info for name, info in LoraReader(network.network_weights).infos.items() if name in names}
        shapes = shapes_of(infos, model)
        return {name: Adapted.by_lora(info.rank, shapes[name], lengths=info.dora) for name, info in infos.items()}
    options = network_options(config)
    ranks = planned_ranks(names, network.network_dim, options)
    return lora_layers(ranks, model, lengths=parse_network_args(options).use_dora)


def _trained(config: TrainNetworkConfig, names: list[str], model: TransformerConfig, numbers: Numbers) -> Trained:
    options = parse_key_values(config.optimizer.optimizer_args, "--optimizer_args")
    state = optimizer_state_bytes(
        optimizer_class(config.optimizer.optimizer_type).__name__,
        trained=numbers.trained,
        momentum=bool(options.get("momentum")),
    )
    return Trained(
        blocks=by_block(_adapted(config, names, model), model),
        state_bytes=state,
        accumulating=config.optimizer.gradient_accumulation_steps > 1,
        averaged=config.network.ema_decay is not None,
        corrects=config.calibration.loftq_init,
        gradient_parts=PARTS if config.optimizer.fused_backward_pass else 1,
    )


def _largest_batch(config: TrainNetworkConfig, plan: BatchPlan, model: TransformerConfig) -> BatchShape:
    """The batch of the first epoch whose hidden states are the largest."""
    silence = config.audio_loss.audio_silence_regularizer
    shapes = [_shape(plan, spec, silence=silence) for spec in plan.for_epoch(0)]
    return max(shapes, key=lambda shape: shape.video * model.width + shape.audio * model.audio_width)


def _shape(plan: BatchPlan, spec: BatchSpec, *, silence: bool) -> BatchShape:
    size = batch_size(plan, spec, silence=silence)
    items = plan.training_set.datasets[spec.dataset].items
    text = max(items[position].text_tokens for position, _ in spec.samples)
    return BatchShape(len(spec.samples), size.video, size.audio, text)


def _decoder_bytes(config: TrainNetworkConfig, checkpoint: Checkpoint) -> int:
    """Of the decoders that stay in host memory after the first previews."""
    if not wants_previews(config):
        return 0
    size = parse_dtype(config.precision.vae_dtype).itemsize
    wanted = [part for part, unless in _DECODERS.items() if config.checkpoint.ltx2_mode != unless]
    keys = {
        key: 4 if part == "vocoder" else size for part in wanted for key in checkpoint.component_keys(part).values()
    }
    return sum(torch.Size(checkpoint.tensors[key].shape).numel() * size for key, size in keys.items())


def _limits(config: TrainNetworkConfig, device: torch.device) -> Limits:
    # Each process of a machine has its own model in host memory.
    host = free_host_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type != "cuda":
        return Limits(host, host)
    free, total = torch.cuda.mem_get_info(device)
    share = config.cuda.cuda_memory_fraction
    return Limits(free if share is None else min(free, round(share * total)), host)


def _sizes(proposal: Proposal) -> str:
    text = format_bytes(proposal.estimate.device)
    return f"{text}, host memory {format_bytes(proposal.estimate.host)}" if proposal.estimate.on_gpu else text
