"""What each way of saving memory saves, counted: weights on the device, and the most that a training step allocates.

Runs on a CPU, where every allocation is counted by PyTorch's profiler; "device" and "host" are then two roles of the
same memory, and the times say what recomputing costs, not what copies to a GPU cost. With --device cuda the
allocator's own peak is taken.

    python benchmarks/memory.py
    python benchmarks/memory.py --size tiny
"""

from __future__ import annotations

import argparse
import gc
import platform
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "models"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "memory"))

from allocations import allocated_peak
from ltx2_tiny import config_of, tiny_config, tiny_inputs, tiny_model

from musubi_tuner.assembly.transformer import attach_to_blocks
from musubi_tuner.common.tables import format_table
from musubi_tuner.config.memory import MemorySettings
from musubi_tuner.networks.lora_ltx2 import create_network

CHECKPOINTING = MemorySettings(checkpointing=True)


@dataclass(frozen=True)
class Size:
    layers: int
    head_dim: int
    video_tokens: int
    audio_tokens: int
    part: int  # tokens or queries of a part


SIZES = {"tiny": Size(4, 16, 256, 32, 64), "mid": Size(6, 24, 512, 49, 128)}


def combinations(size: Size) -> dict[str, MemorySettings]:
    half, most = size.layers // 2, size.layers - 1
    parts = {"chunk_feed_forward": "all", "chunk_tokens": size.part}
    split = {"split_attention": "all", "split_mode": "query", "split_queries": size.part}
    return {
        "nothing": MemorySettings(),
        f"swap {half}": MemorySettings(blocks_to_swap=half),
        f"swap {most}": MemorySettings(blocks_to_swap=most),
        f"checkpointing of {half}": replace(CHECKPOINTING, blocks_to_checkpoint=half),
        "checkpointing": CHECKPOINTING,
        "checkpointing, FFN in parts": replace(CHECKPOINTING, **parts),
        "checkpointing, FFN and attention in parts": replace(CHECKPOINTING, **parts, **split),
        "checkpointing, offload": replace(CHECKPOINTING, offload_inputs=True),
        f"checkpointing, swap {half}": replace(CHECKPOINTING, blocks_to_swap=half),
        f"checkpointing, swap {most}": replace(CHECKPOINTING, blocks_to_swap=most),
        f"all: offload, parts, swap {most}": replace(
            CHECKPOINTING, offload_inputs=True, blocks_to_swap=most, **parts, **split
        ),
    }


def build(size: Size, settings: MemorySettings, device: torch.device, dtype: torch.dtype):
    """The step, and what is swapped."""
    widths = {
        "attention_head_dim": size.head_dim,
        "audio_attention_head_dim": size.head_dim // 2,
        "cross_attention_dim": 32 * size.head_dim,
        "audio_cross_attention_dim": 16 * size.head_dim,
    }
    mid = size.head_dim > 16
    config = config_of("2.3", num_layers=size.layers, **widths) if mid else tiny_config("2.3", num_layers=size.layers)
    model = tiny_model(config, dtype=dtype)
    torch.manual_seed(0)
    network = create_network(1.0, 16, 16, model)
    network.apply_to(model)
    network.to(device)
    swap = attach_to_blocks(model, settings, None, device=device)
    model.to(device)
    inputs = tiny_inputs(
        config, video_tokens=size.video_tokens, audio_tokens=size.audio_tokens, batch=1, dtype=dtype
    ).map(lambda s: replace(s, **{k: v.to(device) for k, v in vars(s).items() if isinstance(v, torch.Tensor)}))

    def step() -> None:
        out = model(inputs)
        sum(x.float().square().mean() for _, x in out.items()).backward()
        for parameter in network.parameters():
            parameter.grad = None

    return model, step, swap


def peak_of(step, device: torch.device) -> int:
    """Bytes that a step allocates above what was there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    return allocated_peak(step)


def measure(size: Size, settings: MemorySettings, device: torch.device, dtype: torch.dtype) -> tuple[float, ...]:
    """MiB of weights on the device, of a step's peak, and seconds of a step."""
    model, step, swap = build(size, settings, device, dtype)
    step()  # fills buffers that later steps use again
    gc.collect()
    started = time.perf_counter()
    step()
    seconds = time.perf_counter() - started
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if swap is not None:
        weights += swap.device_bytes - swap.host_bytes
    return weights / 2**20, peak_of(step, device) / 2**20, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size, device = SIZES[args.size], torch.device(args.device)
    rows = []
    for name, settings in combinations(size).items():
        weights, peak, seconds = measure(size, settings, device, getattr(torch, args.dtype))
        rows.append([name, f"{weights:.1f}", f"{peak:.1f}", f"{weights + peak:.1f}", f"{seconds:.2f}"])
        print(*rows[-1], sep=", ", file=sys.stderr, flush=True)
        gc.collect()
    print(
        f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {args.device}, {args.dtype}, {size}"
    )
    headers = ["blocks", "weights MiB", "peak of a step MiB", "sum MiB", "s/step"]
    print(format_table(headers, rows, title="Forward and backward of a LoRA step"))


if __name__ == "__main__":
    main()
