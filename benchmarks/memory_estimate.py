"""The memory that LoRA training of a released model is estimated to take; needs neither a GPU nor a checkpoint.

The same arithmetic that every run does before it loads anything, for the layout of a release in bf16, FP8 and NF4 with
more and more blocks swapped. These are estimates, not measurements.

With --measure, the estimate of a mid-size random model against the bytes that its training step allocates on a CPU,
counted one by one.

    python benchmarks/memory_estimate.py
    python benchmarks/memory_estimate.py --measure
    python benchmarks/memory_estimate.py --version 2.0 --mode video --frames 121 --rank 16 --swap 0 47
"""

from __future__ import annotations

import argparse
import gc
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "models"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "memory"))

from ltx2_tiny import config_of
from measured_step import CASES, measure

from musubi_tuner.assembly.memory_request import by_block, linear_layers, lora_layers, weights_of
from musubi_tuner.common.safetensors_io import TensorInfo
from musubi_tuner.common.tables import format_table
from musubi_tuner.config.memory import MemorySettings
from musubi_tuner.dataset.buckets import SPATIAL_STRIDE
from musubi_tuner.diffusion.tokens import AUDIO_LATENTS_PER_SECOND, VIDEO_TIME_STRIDE
from musubi_tuner.memory.activations import BatchShape, Numbers
from musubi_tuner.memory.estimate import Request, Trained, estimate, optimizer_state_bytes
from musubi_tuner.models.ltx2.load import build_transformer
from musubi_tuner.models.ltx2.quantize import Quantization
from musubi_tuner.networks.lora_ltx2 import planned_ranks
from musubi_tuner.quantization.stored import Stored

MIB, GIB = 2**20, 2**30
BASES = {"bf16": None, "fp8": Quantization("fp8", requantise=True), "nf4": Quantization("nf4")}


def batch_of(args: argparse.Namespace) -> BatchShape:
    latent_frames = (args.frames - 1) // VIDEO_TIME_STRIDE + 1
    video = latent_frames * (args.width // SPATIAL_STRIDE) * (args.height // SPATIAL_STRIDE)
    audio = int(args.frames * AUDIO_LATENTS_PER_SECOND / args.fps) if args.mode == "av" else 0
    return BatchShape(args.batch, args.batch * video, args.batch * audio, args.text)


def compare() -> None:
    """Estimate and count for every case, with a model of 6 blocks of width 768 / 384."""
    torch.set_num_threads(1)
    rows = []
    for name, case in CASES.items():
        measured, found = measure(replace(case, layers=6, heads=8, head_dim=96, rank=16))
        rows.append([name, f"{measured / MIB:.1f}", f"{found.device / MIB:.1f}", f"{found.device / measured - 1:+.1%}"])
        print(*rows[-1], sep=", ", file=sys.stderr, flush=True)
        gc.collect()
    print(format_table(["training step", "allocated MiB", "estimated MiB", "off by"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", choices=["2.0", "2.3"], default="2.3")
    parser.add_argument("--mode", choices=["video", "av"], default="av")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--frames", type=int, default=49)
    parser.add_argument("--fps", type=float, default=25.0)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--text", type=int, default=1024, help="text tokens")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--preset", default="t2v")
    parser.add_argument("--optimizer", default="AdamW")
    parser.add_argument("--swap", type=int, nargs="+", default=[0, 12, 24, 47])
    parser.add_argument("--no_checkpointing", action="store_true")
    parser.add_argument("--offload", action="store_true", help="inputs of blocks in host memory")
    parser.add_argument("--measure", action="store_true", help="measure a mid-size model instead")
    args = parser.parse_args()
    if args.measure:
        compare()
        return

    config = config_of(args.version)
    model = build_transformer(config, args.mode)
    infos = {n: TensorInfo(torch.bfloat16, tuple(p.shape), 0, 2 * p.numel()) for n, p in model.named_parameters()}
    names = linear_layers(infos, args.mode)
    ranks = planned_ranks(names, args.rank, {"lora_target_preset": args.preset})
    adapted = by_block(lora_layers(ranks, config), config)
    rows = []
    for base, quantization in BASES.items():
        weights = weights_of(infos, Stored("dense"), args.mode, torch.bfloat16, quantization)
        for swapped in args.swap:
            found = estimate(
                Request(
                    config=config,
                    weights=weights,
                    trained=Trained(adapted, optimizer_state_bytes(args.optimizer)),
                    batch=batch_of(args),
                    numbers=Numbers(2, fused_norms=True),
                    settings=MemorySettings(
                        checkpointing=not args.no_checkpointing,
                        offload_inputs=args.offload,
                        blocks_to_swap=swapped,
                        pin_swapped=True,
                    ),
                )
            )
            rows.append([base, swapped, *(f"{x / GIB:.1f}" for x in (found.device, found.uncertainty, found.host))])
    headers = ["weights", "blocks swapped", "GPU GiB", "+-", "host GiB"]
    title = f"Estimated, not measured: LTX-{args.version} {args.mode}, {batch_of(args)}"
    print(format_table(headers, rows, title=title))


if __name__ == "__main__":
    main()
