"""A LoRA training step of a random model on the CPU: what it allocates, and what the estimate says."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import dataclass, replace

import torch
from allocations import allocated_peak
from ltx2_tiny import config_of, tiny_inputs, tiny_model
from torch._subclasses import FakeTensor

from musubi_tuner.assembly.memory_request import by_block, linear_layers, lora_layers, shapes_of, weights_of
from musubi_tuner.assembly.transformer import attach_to_blocks
from musubi_tuner.common.av import AV
from musubi_tuner.common.safetensors_io import TensorInfo
from musubi_tuner.config.memory import MemorySettings
from musubi_tuner.memory.activations import Adapted, BatchShape, Numbers
from musubi_tuner.memory.estimate import Estimate, Request, Trained, estimate, optimizer_state_bytes
from musubi_tuner.models.ltx2.quantize import Quantization, is_target
from musubi_tuner.models.ltx2.transformer import LTX2Transformer
from musubi_tuner.networks.adapter_network import AdapterNetwork
from musubi_tuner.networks.lora_ltx2 import create_network, planned_ranks
from musubi_tuner.networks.lycoris import bridge as lycoris_bridge
from musubi_tuner.quantization.linear import pack_linear
from musubi_tuner.quantization.stored import Stored
from musubi_tuner.training.fused_backward import PARTS, FusedBackward

TEXT = 7  # tokens that tiny_inputs makes


@dataclass(frozen=True)
class Case:
    """A model, a batch and how memory is saved."""

    settings: MemorySettings = MemorySettings()
    mode: str = "av"
    version: str = "2.3"
    preset: str = "t2v"
    base: str | None = None  # fp8, int8, nf4
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    layers: int = 3
    heads: int = 4
    head_dim: int = 32
    video_tokens: int = 512
    audio_tokens: int = 96
    rank: int = 8
    dora: bool = False
    lycoris: dict | None = None  # options of a LyCORIS network instead of a LoRA
    fused: bool = False  # the optimizer steps within the backward pass

    @property
    def config(self):
        heads, dim = self.heads, self.head_dim
        return config_of(
            self.version,
            num_layers=self.layers,
            **{"num_attention_heads": heads, "attention_head_dim": dim, "cross_attention_dim": heads * dim},
            **{"audio_num_attention_heads": heads, "audio_attention_head_dim": dim // 2},
            audio_cross_attention_dim=heads * dim // 2,
        )

    @property
    def quantization(self) -> Quantization | None:
        return None if self.base is None else Quantization(self.base, requantise=self.base == "fp8")


def request_of(case: Case, model: LTX2Transformer) -> Request:
    """From names and shapes alone."""
    infos = {name: TensorInfo(p.dtype, tuple(p.shape), 0, p.nbytes) for name, p in model.named_parameters()}
    return Request(
        config=case.config,
        weights=weights_of(infos, Stored("dense"), case.mode, case.dtype, case.quantization),
        trained=Trained(
            by_block(planned_layers(case, linear_layers(infos, case.mode)), case.config),
            optimizer_state_bytes("AdamW"),
            gradient_parts=PARTS if case.fused else 1,
        ),
        batch=BatchShape(
            case.batch,
            0 if case.mode == "audio" else case.batch * case.video_tokens,
            0 if case.mode == "video" else case.batch * case.audio_tokens,
            TEXT,
        ),
        numbers=Numbers(case.dtype.itemsize),
        settings=case.settings,
        on_gpu=False,
    )


def planned_layers(case: Case, names: list[str]) -> dict[str, Adapted]:
    if case.lycoris is None:
        ranks = planned_ranks(names, case.rank, {"lora_target_preset": case.preset})
        return lora_layers(ranks, case.config, lengths=case.dora)
    arguments = {"lora_target_preset": case.preset, **case.lycoris}
    sizes = lycoris_bridge.planned_sizes(shapes_of(names, case.config), case.rank, case.rank, arguments)
    return {path: Adapted(*size) for path, size in sizes.items()}


def make_network(case: Case, model: LTX2Transformer) -> AdapterNetwork:
    arguments = {"lora_target_preset": case.preset}
    if case.lycoris is not None:
        return lycoris_bridge.create_network(1.0, case.rank, case.rank, model, **arguments, **case.lycoris)
    return create_network(1.0, case.rank, case.rank, model, **arguments, use_dora=case.dora)


def measure(case: Case) -> tuple[int, Estimate]:
    """The most bytes that training holds at a time, what stays between steps included; and the estimate."""
    torch.manual_seed(0)
    before = live_storages()
    model = tiny_model(case.config, case.mode, dtype=case.dtype)
    expected = estimate(request_of(case, model))
    if case.base is not None:
        quantise(model, case.quantization)
    network = make_network(case, model)
    network.apply_to(model)
    attach_to_blocks(model, case.settings, None, device=torch.device("cpu"))
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    fused = FusedBackward(optimizer) if case.fused else None
    inputs = tiny_inputs(
        case.config,
        video_tokens=case.video_tokens,
        audio_tokens=case.audio_tokens,
        batch=case.batch,
        dtype=case.dtype,
    )
    if case.mode != "av":
        inputs = AV(**{case.mode: inputs[case.mode]})

    def step() -> None:
        loss = sum(x.float().square().mean() for _, x in model(inputs).items())
        if fused is not None:
            fused.backward(loss)
            fused.end_step()
            return
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes what later steps use again
    stays = sum((live_storages() - before).values())
    return stays + allocated_peak(step), expected


def quantise(model: LTX2Transformer, request: Quantization) -> None:
    targets = [name for name, _ in model.named_parameters() if is_target(name)]
    for name in targets:
        path = name.removesuffix(".weight")
        pack_linear(model, path, request.method.quantize(model.get_submodule(path).weight.data))


def live_storages() -> Counter:
    """Bytes of the memory behind all tensors, by address."""
    gc.collect()
    # A compiler that ran earlier in this process may have left tensors without memory.
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and not issubclass(type(x), FakeTensor)]
    return Counter({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if not x.is_meta})


CHECKPOINTING = MemorySettings(checkpointing=True)
CASES = {
    "plain": Case(),
    "plain, every layer adapted": Case(preset="full"),
    "plain, fp32": Case(dtype=torch.float32),
    "plain, 2.0": Case(version="2.0"),
    "video": Case(mode="video"),
    "dora": Case(dora=True),
    "dora, every layer adapted, nf4": Case(dora=True, preset="full", base="nf4"),
    "checkpointing, dora, every layer adapted": Case(CHECKPOINTING, dora=True, preset="full"),
    "lokr": Case(lycoris={"algo": "lokr"}, preset="full"),
    "lokr with two factors, checkpointing": Case(CHECKPOINTING, lycoris={"algo": "lokr", "factor": "8"}),
    "lokr with lengths": Case(lycoris={"algo": "lokr", "dora_wd": "True"}, preset="full"),
    "lengths of inputs": Case(lycoris={"algo": "locon", "dora_wd": "True", "wd_on_output": "False"}),
    "loha": Case(lycoris={"algo": "loha"}, preset="full"),
    "ia3": Case(lycoris={"algo": "ia3"}),
    "fused backward": Case(CHECKPOINTING, rank=64, preset="full", video_tokens=96, fused=True),
    "the same, not fused": Case(CHECKPOINTING, rank=64, preset="full", video_tokens=96),
    "audio": Case(mode="audio", audio_tokens=512),
    "batch of 2": Case(batch=2),
    "fp8": Case(base="fp8"),
    "int8": Case(base="int8"),
    "nf4": Case(base="nf4"),
    "checkpointing": Case(CHECKPOINTING),
    "checkpointing, every layer adapted": Case(CHECKPOINTING, preset="full"),
    "checkpointing of 2 blocks": Case(replace(CHECKPOINTING, blocks_to_checkpoint=2)),
    "checkpointing, batch of 2, video": Case(CHECKPOINTING, mode="video", batch=2),
    "checkpointing, feed-forward in parts": Case(replace(CHECKPOINTING, chunk_feed_forward="all", chunk_tokens=128)),
    "checkpointing, inputs in host memory": Case(
        replace(CHECKPOINTING, offload_inputs=True), video_tokens=2304, mode="video", dtype=torch.float32
    ),
    "swap": Case(MemorySettings(blocks_to_swap=2)),
    "checkpointing, swap": Case(replace(CHECKPOINTING, blocks_to_swap=2)),
    "checkpointing, swap, nf4": Case(replace(CHECKPOINTING, blocks_to_swap=2), base="nf4"),
}
