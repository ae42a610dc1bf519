"""What the training loop costs around the model: time of a step outside forward, backward and optimizer.

The real script trains a small transformer on cache files as a user would run it; timers lie around the parts of its
loop. In the same run, and in turn with it, a bare loop takes steps with the same model, parameters and optimizer class
on batches that are ready in memory: forward, loss, backward, optimizer, one number read. So "bare" is what the model
alone costs.

    python benchmarks/loop_overhead.py                       # CPU, one thread, about 50 ms a step
    python benchmarks/loop_overhead.py --tokens 420 --workers 0
    python benchmarks/loop_overhead.py --device cuda         # host times: the device works behind them

Shares are taken in the quietest quarter of the steps: other programs disturb long steps most. The first step of
an epoch, in which workers start, has a row of its own.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "models"))

import torch
import tqdm
from ltx2_tiny import config_of, tiny_model, tiny_section

from musubi_tuner import ltx2_train_network
from musubi_tuner.common.av import AV
from musubi_tuner.common.safetensors_io import save_safetensors
from musubi_tuner.common.tables import format_table
from musubi_tuner.dataset.cache import CacheName, write_audio, write_latents, write_text
from musubi_tuner.diffusion.losses import total
from musubi_tuner.training import trainer as trainer_module
from musubi_tuner.training.optimizers import create_optimizer
from musubi_tuner.training.pace import Lookahead
from musubi_tuner.training.step import TrainingView, prepare_view, view_losses
from musubi_tuner.training.trainer import Trainer

MODEL = ("transformer", "losses", "backward", "optimizer")
TEXT_TOKENS = 128
SIZE = {
    "num_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 48,
    "audio_num_attention_heads": 4,
    "audio_attention_head_dim": 32,
    "in_channels": 128,
    "out_channels": 128,
    "audio_in_channels": 128,
    "audio_out_channels": 128,
    "cross_attention_dim": 192,
    "audio_cross_attention_dim": 128,
}


# --- files --------------------------------------------------------------------------------------------------


def write_files(folder: Path, *, tokens: int, items: int) -> tuple[Path, Path]:
    """A checkpoint of the transformer alone and caches of ``items`` clips; returns it and the dataset's TOML."""
    section = tiny_section("2.3", **SIZE)
    model = tiny_model(config_of("2.3", **SIZE), "av", dtype=torch.bfloat16)
    checkpoint = folder / "model.safetensors"
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in model.state_dict().items()}
    save_safetensors(tensors, checkpoint, {"config": json.dumps({"transformer": section}), "model_version": "2.3.0"})
    videos, cache = folder / "videos", folder / "cache"
    videos.mkdir()
    cache.mkdir()
    for index in range(items):
        (videos / f"clip{index:03}.mp4").touch()
        (videos / f"clip{index:03}.txt").write_text("a clip", encoding="utf-8")
        write_item(cache, f"clip{index:03}", tokens, torch.Generator().manual_seed(index))
    toml = folder / "dataset.toml"
    toml.write_text(
        f'[general]\nresolution = [256, 256]\ncaption_extension = ".txt"\nbatch_size = 1\n\n[[datasets]]\n'
        f'video_directory = "{videos.as_posix()}"\ncache_directory = "{cache.as_posix()}"\ntarget_frames = [49]\n',
        encoding="utf-8",
    )
    return checkpoint, toml


def write_item(cache: Path, stem: str, tokens: int, generator: torch.Generator) -> None:
    """Seven latent frames (49 frames) of ``tokens`` tokens in all, two seconds of sound, and a text."""
    height = 6
    grid = (7, height, tokens // (7 * height))
    size = (grid[2] * 32, grid[1] * 32)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    base = f"{stem}_00000-049"
    write_latents(cache / str(CacheName(base, "latents", size)), random(128, *grid), {}, frame_count=49)
    write_audio(cache / str(CacheName(base, "audio", size)), random(8, 50, 16), {})
    widths = AV(SIZE["cross_attention_dim"], SIZE["audio_cross_attention_dim"])
    embeds = widths.map(lambda width: random(TEXT_TOKENS, width))
    text = cache / str(CacheName(stem, "text"))
    write_text(text, embeds, torch.ones(TEXT_TOKENS), {}, caption=stem, legacy_keys=False)


# --- timers -------------------------------------------------------------------------------------------------


@dataclass
class Stopwatch:
    """Time by part, without the parts within it."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _running: list[tuple[str, float]] = field(default_factory=list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._pause()
        self._running.append((name, time.perf_counter()))
        try:
            yield
        finally:
            self._pause()
            self._running.pop()
            if self._running:
                self._running[-1] = (self._running[-1][0], time.perf_counter())

    def _pause(self) -> None:
        if self._running:
            name, since = self._running[-1]
            self.seconds[name] += time.perf_counter() - since

    def around(self, name: str, function: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return timed

    def take(self) -> dict[str, float]:
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds


@dataclass
class Walls:
    """Seconds of steps, and of their parts."""

    walls: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)

    def add(self, wall: float, parts: dict[str, float]) -> None:
        self.walls.append(wall)
        self.parts.append(parts)

    def extend(self, others: Walls) -> None:
        self.walls += others.walls
        self.parts += others.parts

    def without_first(self) -> Walls:
        return Walls(self.walls[1:], self.parts[1:])

    def quiet(self, among: Sequence[int] | None = None) -> tuple[float, dict[str, float]]:
        """Means over the quietest quarter of the steps ``among`` which."""
        steps = sorted(range(len(self.walls)) if among is None else among, key=lambda i: self.walls[i])
        steps = steps[: max(1, len(steps) // 4)]
        names = {name for i in steps for name in self.parts[i]}
        means = {name: statistics.fmean(self.parts[i].get(name, 0.0) for i in steps) for name in names}
        return statistics.fmean(self.walls[i] for i in steps), means


@dataclass
class Steps(Walls):
    """What the loop did, step by step: a listener of it, the last one."""

    watch: Stopwatch = field(default_factory=Stopwatch)
    starts: list[int] = field(default_factory=list)  # positions of the first steps of an epoch
    _since: float = 0.0
    _new_epoch: bool = True

    def on_start(self, progress: Any) -> None:
        self.watch.take()
        self._since, self._new_epoch = time.perf_counter(), True

    def on_step(self, report: Any, progress: Any) -> None:
        now = time.perf_counter()
        if self._new_epoch:
            self.starts.append(len(self.walls))
        self._new_epoch = progress.batch_in_epoch == 0
        self.add(now - self._since, self.watch.take())
        self._since = time.perf_counter()

    def on_epoch_end(self, epoch: int, progress: Any) -> None:
        pass

    def on_end(self, progress: Any) -> None:
        pass


def time_parts(trainer: Trainer, watch: Stopwatch) -> None:
    """Put timers around the parts of the loop, from outside."""
    transformer, optimizer = trainer.transformer, trainer.optimizer
    transformer.forward = watch.around("transformer", transformer.forward)
    optimizer.step = watch.around("optimizer", optimizer.step)
    optimizer.zero_grad = watch.around("zero_grad", optimizer.zero_grad)
    torch.Tensor.backward = watch.around("backward", torch.Tensor.backward)
    trainer_module.view_losses = watch.around("losses", view_losses)
    trainer._clipped_gradients = watch.around("norms and clipping", trainer._clipped_gradients)
    trainer_module.StepTally = timed_class(trainer_module.StepTally, watch, "collecting and reading losses")
    Lookahead.__next__ = watch.around("waiting for batches and noise", Lookahead.__next__)
    bar = tqdm.tqdm
    bar.set_postfix = watch.around("progress bar", bar.set_postfix)
    bar.update = watch.around("progress bar", bar.update)
    for listener in trainer.listeners:
        name = f"listener {type(listener).__name__}"
        object.__setattr__(listener, "on_step", watch.around(name, listener.on_step))


def timed_class(cls: type, watch: Stopwatch, name: str) -> type:
    methods = {key: watch.around(name, value) for key, value in vars(cls).items() if callable(value)}
    return type(cls.__name__, (cls,), methods)


# --- the two contenders --------------------------------------------------------------------------------------


def bare_loop(trainer: Trainer, views: list[TrainingView], steps: int, watch: Stopwatch) -> Walls:
    """The shortest loop that trains."""
    optimizer = create_optimizer("AdamW", [{"params": trainer.parameters, "lr": 1e-4}])
    optimizer.step = watch.around("optimizer", optimizer.step)
    walls = Walls()
    watch.take()
    started = time.perf_counter()
    for step in range(steps):
        loss = total(trainer_module.view_losses(trainer.transformer, views[step % len(views)], trainer.task))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        walls.add(time.perf_counter() - started, watch.take())
        started = time.perf_counter()
    return walls.without_first()


def compare(trainer: Trainer, rounds: int, steps: int) -> tuple[Steps, Walls]:
    """Rounds of the real loop and the bare one in turn."""
    task, blocks = trainer.task, len(trainer.transformer.transformer_blocks)
    batches = list(trainer.loader.epoch(0))
    views = [prepare_view(batch, task, epoch=0, num_blocks=blocks) for batch in batches[:8]]
    watch = Stopwatch()
    time_parts(trainer, watch)
    bare_loop(trainer, views, 5, watch)
    record = Steps(watch=watch)
    trainer.listeners = [*trainer.listeners, record]
    bare = Walls()
    for _ in range(rounds):
        trainer.loop = replace(trainer.loop, total_steps=trainer.progress.global_step + steps)
        REAL_RUN(trainer)
        bare.extend(bare_loop(trainer, views, steps, watch))
    return record, bare


# --- the report ---------------------------------------------------------------------------------------------


def report(record: Steps, bare: Walls) -> None:
    inner = [i for i in range(len(record.walls)) if i not in record.starts]
    wall, spent = record.quiet(inner)
    bare_wall, bare_spent = bare.quiet()
    model = sum(spent.get(name, 0.0) for name in MODEL)
    spent["everything else"] = wall - sum(spent.values())
    bare_spent["everything else"] = bare_wall - sum(bare_spent.values())
    outside = sorted((name for name in spent if name not in MODEL), key=lambda name: -spent[name])
    rows = [row(name, spent.get(name, 0.0), wall, bare_spent.get(name)) for name in (*MODEL, *outside)]
    bare_model = sum(bare_spent.get(name, 0.0) for name in MODEL)
    rows += [
        row("outside the model", wall - model, wall, bare_wall - bare_model),
        row("whole step", wall, wall, bare_wall),
    ]
    print(
        format_table(
            ["part", "ms", "share", "bare ms"], rows, title=f"one optimizer step, quietest quarter of {len(inner)}"
        )
    )
    every, every_bare = statistics.median(record.walls[i] for i in inner), statistics.median(bare.walls)
    print(
        f"loop / bare: {wall / bare_wall:.3f} in the quietest quarter, {every / every_bare:.3f} by the medians of all"
    )
    first = statistics.median(record.walls[i] for i in record.starts)
    print(f"first step of an epoch: {milliseconds(first)} ms")


def row(name: str, seconds: float, wall: float, bare: float | None) -> list[str]:
    return [name, milliseconds(seconds), f"{seconds / wall:.1%}", "-" if bare is None else milliseconds(bare)]


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.2f}"


REAL_RUN = Trainer.run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tokens", type=int, default=210, help="video tokens, a multiple of 42")
    parser.add_argument("--items", type=int, default=60, help="clips, batches of an epoch")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60, help="of a round")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--tensorboard", action="store_true", help="log to TensorBoard, as --logging_dir does")
    args, further = parser.parse_known_args()
    if args.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint, toml = write_files(folder, tokens=args.tokens, items=args.items)
        flags = [
            *("--dataset_config", str(toml), "--ltx2_checkpoint", str(checkpoint), "--ltx2_mode", "av"),
            *("--mixed_precision", "no" if args.device == "cpu" else "bf16", "--seed", "1", "--max_train_steps", "1"),
            *("--network_dim", "16", "--network_alpha", "16", "--learning_rate", "1e-4"),
            *("--max_data_loader_n_workers", str(args.workers), "--output_dir", str(folder), "--output_name", "x"),
            *(("--logging_dir", str(folder / "logs")) if args.tensorboard else ()),
            *further,
        ]
        measured = []
        Trainer.run = lambda trainer: measured.append(compare(trainer, args.rounds, args.steps))
        ltx2_train_network.main(flags)
    print(f"torch {torch.__version__}, {platform.machine()}, {args.device}, {args.workers} worker(s), flags {further}")
    report(*measured[0])


if __name__ == "__main__":
    main()
