"""One LoRA training step: this trainer against diffusers' transformer with PEFT.

Both get the same weights, inputs, LoRA targets and per-block gradient checkpointing. Each contender lives in a
process of its own; steps alternate between them, so a machine that slows down slows both. Before timing, the
losses of the first step are compared: equal losses show that both do the same work.

    python benchmarks/train_step.py                       # mid-size model, CPU
    python benchmarks/train_step.py --true_size --device cuda

diffusers always runs both streams. In video mode its audio stream gets the same number of tokens as in av mode
(row "diffusers") and, as the cheapest that it accepts, one token (row "diffusers, 1 audio token").
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing as mp
import platform
import statistics
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "models"))

from ltx2_tiny import config_of, diffusers_twin, run_diffusers, tiny_inputs, tiny_model

from musubi_tuner.common.av import AV
from musubi_tuner.common.tables import format_table
from musubi_tuner.memory.checkpointing import checkpoint_blocks
from musubi_tuner.models.ltx2.transformer import LTX2Transformer

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass(frozen=True)
class Setting:
    mode: str
    version: str = "2.3"
    layers: int = 6
    head_dim: int = 32
    video_tokens: int = 1024
    audio_tokens: int = 49
    rank: int = 32
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    threads: int = 2


def base_model(setting: Setting, mode: str) -> LTX2Transformer:
    size = (
        {}
        if setting.layers == 48
        else {
            "num_layers": setting.layers,
            "attention_head_dim": setting.head_dim,
            "audio_attention_head_dim": setting.head_dim // 2,
            "cross_attention_dim": 32 * setting.head_dim,
            "audio_cross_attention_dim": 16 * setting.head_dim,
        }
    )
    config = config_of(setting.version, **size)
    if setting.layers == 48:
        return random_on_device(config, mode, setting)
    model = tiny_model(config, "av", dtype=torch.float32)  # the same weights whatever is kept of them
    if mode != "av":
        kept = LTX2Transformer(config, mode)
        kept.load_state_dict({k: v for k, v in model.state_dict().items() if k in kept.state_dict()})
        model = kept.requires_grad_(False)
    return model.to(setting.device, setting.dtype)


def random_on_device(config, mode: str, setting: Setting) -> LTX2Transformer:
    """The true size, made on the device without a copy in host memory."""
    with torch.device(setting.device):
        torch.set_default_dtype(setting.dtype)
        model = LTX2Transformer(config, mode)
        torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False)


def inputs_of(setting: Setting, config, *, audio_tokens: int | None = None) -> AV:
    made = tiny_inputs(
        config,
        video_tokens=setting.video_tokens,
        audio_tokens=audio_tokens or setting.audio_tokens,
        batch=1,
        dtype=setting.dtype,
    )

    def finish(stream):
        generator = torch.Generator().manual_seed(7)
        context = torch.randn(1, 1024, stream.context.shape[2], generator=generator).to(setting.dtype)
        stream = replace(stream, context=context)
        return replace(
            stream,
            **{k: v.to(setting.device) for k, v in vars(stream).items() if isinstance(v, torch.Tensor)},
        )

    return made.map(finish)


def our_step(setting: Setting):
    from musubi_tuner.networks.lora_ltx2 import create_network

    torch.manual_seed(0)
    model = base_model(setting, setting.mode)
    network = create_network(1.0, setting.rank, setting.rank, model)
    network.apply_to(model)
    network.to(setting.device)
    checkpoint_blocks(model.transformer_blocks)
    inputs = inputs_of(setting, model.config)
    if setting.mode == "video":
        inputs = AV(video=inputs.video)
    return stepper(lambda: model(inputs), list(network.parameters()))


def diffusers_step(setting: Setting, audio_tokens: int | None = None):
    from peft import LoraConfig

    torch.manual_seed(0)
    model = base_model(setting, "av")
    twin = diffusers_twin(model)
    inputs = inputs_of(setting, model.config, audio_tokens=audio_tokens)
    del model
    twin.add_adapter(LoraConfig(r=setting.rank, lora_alpha=setting.rank, target_modules=TARGETS))
    twin.to(setting.device)
    trained = [p for p in twin.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.float()
    twin.enable_gradient_checkpointing()
    twin.train()
    alone = setting.mode == "video"

    def forward() -> AV:
        # fp32 LoRA factors on a half-precision base need autocast in PEFT.
        with torch.autocast(setting.device, setting.dtype, enabled=setting.dtype != torch.float32):
            out = run_diffusers(twin, inputs, isolate_modalities=alone)
        return AV(video=out.video) if alone else out

    return stepper(forward, trained)


def stepper(forward, parameters):
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> float:
        out = forward()
        loss = sum(x.float().square().mean() for _, x in out.items())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


CONTENDERS = {
    "ours": our_step,
    "diffusers": diffusers_step,
    "diffusers, 1 audio token": lambda setting: diffusers_step(setting, audio_tokens=1),
}


def worker(name: str, setting: Setting, pipe) -> None:
    torch.set_num_threads(setting.threads)
    step = CONTENDERS[name](setting)
    cuda = setting.device == "cuda"
    while pipe.recv():
        with contextlib.nullcontext() if cuda else PeakRss() as peak:
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            started = time.perf_counter()
            loss = step()
            seconds = time.perf_counter() - started
        memory = torch.cuda.max_memory_allocated() if cuda else peak.bytes
        pipe.send((seconds, loss, memory))


class PeakRss:
    """The highest resident set while the block runs, sampled every millisecond."""

    bytes = 0

    def __enter__(self) -> PeakRss:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(0.001):
            self.bytes = max(self.bytes, process.memory_info().rss)

    def __exit__(self, *exc) -> None:
        self._stop.set()
        self._thread.join()


def compare(setting: Setting, names: list[str], rounds: int) -> list[list[object]]:
    context = mp.get_context("spawn")
    running = {}
    for name in names:
        ours, theirs = context.Pipe()
        process = context.Process(target=worker, args=(name, setting, theirs), daemon=True)
        process.start()
        running[name] = (process, ours)
    results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    for _ in range(rounds + 1):
        for name, (_, pipe) in running.items():
            pipe.send(True)
            results[name].append(pipe.recv())
    for process, pipe in running.values():
        pipe.send(False)
        process.join()
    check_same_work(setting, {name: r[0][1] for name, r in results.items()})
    rows = []
    for name in names:
        timed = results[name][1:]  # the first step warms up
        seconds = statistics.median(r[0] for r in timed)
        ratio = statistics.median(a[0] / b[0] for a, b in zip(results["ours"][1:], timed, strict=True))
        memory = max(r[2] for r in timed) / 2**20
        rows.append([setting.mode, name, f"{seconds:.3f}", f"{ratio:.2f}", f"{memory:.0f}"])
    return rows


def check_same_work(setting: Setting, losses: dict[str, float]) -> None:
    tolerance = 1e-4 if setting.dtype == torch.float32 else 2e-2
    for name, loss in losses.items():
        if name == "ours" or (setting.mode == "av" and "1 audio token" in name):
            continue
        if abs(loss - losses["ours"]) > tolerance * abs(loss):
            raise SystemExit(f"not the same work: first loss {losses['ours']} (ours), {loss} ({name})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--true_size", action="store_true", help="48 blocks of the released width (GPU)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    rows = []
    for mode in ("av", "video"):
        setting = Setting(mode, dtype=getattr(torch, args.dtype), device=args.device, threads=args.threads)
        names = ["ours", "diffusers"] + (["diffusers, 1 audio token"] if mode == "video" else [])
        if args.true_size:
            setting = replace(setting, layers=48, head_dim=128, video_tokens=2688)
            names = ["ours"]  # two models of this size do not share a card
        rows += compare(setting, names, args.rounds)
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {args.device}, {args.dtype}")
    headers = ["mode", "contender", "s/step", "ours / it", "peak MiB"]
    print(format_table(headers, rows, title="LoRA training step, per-block checkpointing, 1024 text tokens"))


if __name__ == "__main__":
    main()
