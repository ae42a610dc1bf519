"""What a whole training step allocates by optimizer, with its step after the backward pass and within it.

Counted on a CPU by PyTorch's profiler, with a LoRA that is large for its model, as on a small card; blocks are
checkpointed. With --device cuda the allocator's own peak is taken.

    python benchmarks/optimizer_memory.py
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "models"))
sys.path.insert(0, str(Path(__file__).parent))

from ltx2_tiny import config_of, tiny_inputs, tiny_model
from memory import CHECKPOINTING, peak_of

from musubi_tuner.assembly.transformer import attach_to_blocks
from musubi_tuner.common.av import AV
from musubi_tuner.common.tables import format_table
from musubi_tuner.networks.lora_ltx2 import create_network
from musubi_tuner.training.fused_backward import FusedBackward
from musubi_tuner.training.optimizers import create_optimizer

OPTIMIZERS = {
    "AdamW, fused kernel (the default)": ("AdamW", ()),
    "AdamW, foreach": ("AdamW", ("foreach=True",)),
    "AdamW, one weight after the other": ("AdamW", ("foreach=False", "fused=False")),
    "AdamW8bit": ("AdamW8bit", ()),
    "Adafactor": ("Adafactor", ("relative_step=False", "scale_parameter=False")),
    "Lion": ("Lion", ()),
}
MIB = 2**20


def measure(name: str, args: tuple[str, ...], *, within: bool, device: torch.device) -> tuple[float, float, float]:
    """MiB of the LoRA's weights, of the optimizer's state, and of the most that a step allocates besides."""
    widths = {"attention_head_dim": 16, "audio_attention_head_dim": 8}
    config = config_of("2.3", num_layers=6, **widths, cross_attention_dim=512, audio_cross_attention_dim=256)
    model = tiny_model(config, "video")
    torch.manual_seed(0)
    network = create_network(1.0, 256, 256, model, lora_target_preset="full")
    network.apply_to(model)
    attach_to_blocks(model, CHECKPOINTING, None, device=device)
    model.to(device)
    network.to(device)
    inputs = tiny_inputs(config, video_tokens=64, batch=1).video
    inputs = type(inputs)(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in vars(inputs).items()})
    parameters = list(network.parameters())
    optimizer = create_optimizer(name, [{"params": parameters, "lr": 1e-4, "label": "unet"}], args)
    fused = FusedBackward(optimizer) if within else None

    def step() -> None:
        loss = model(AV(video=inputs)).video.square().mean()
        if fused:
            fused.backward(loss)
            fused.end_step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    step()  # makes the state
    gc.collect()
    kept = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    weights = sum(p.numel() * p.element_size() for p in parameters)
    state = sum({t.data_ptr(): t.numel() * t.element_size() for t in kept}.values())
    return weights / MIB, state / MIB, peak_of(step, device) / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for title, (name, args) in OPTIMIZERS.items():
        after, within = (measure(name, args, within=w, device=torch.device(options.device)) for w in (False, True))
        weights, state, peak = after
        rows.append([title, f"{weights:.1f}", f"{state:.1f}", f"{peak:.1f}", f"{within[2]:.1f}"])
        print(*rows[-1], sep=", ", file=sys.stderr, flush=True)
    headers = ["optimizer", "LoRA MiB", "state MiB", "peak of a step MiB", "with --fused_backward_pass MiB"]
    print(f"torch {torch.__version__}, {options.device}, LoRA of rank 256 in float32")
    print(format_table(headers, rows, title="Memory of a training step by optimizer"))


if __name__ == "__main__":
    main()
