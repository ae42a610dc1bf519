"""The demo: the public scripts, run as a user would, then proofs and a report."""

from __future__ import annotations

import logging
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from musubi_tuner import __version__
from musubi_tuner.common.errors import UserError
from musubi_tuner.common.tables import format_table
from musubi_tuner.dataset.discovery import discover
from musubi_tuner.dataset.loader import BatchLoader
from musubi_tuner.dataset.sampling import BatchPlan
from musubi_tuner.dataset.schema import load_dataset_config
from musubi_tuner.generation.prompts import load_prompts
from musubi_tuner.models.checkpoint import Checkpoint

from .assets import Assets, write_assets
from .checks import Probe, check_formats_agree, check_lora, check_merged, check_outputs
from .report import Check, Curve, Report, Sample, Step, write_report

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[3]  # of the repository; the scripts a user calls lie there
NAME = "demo_lora"
FRAMES, WIDTH, HEIGHT = 17, 192, 128
LEARNING_RATE, RANK, SEED = 2e-3, 16, 42
# All that accelerate would otherwise warn about having to assume.
_LAUNCH = (
    *("--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
    *("--num_cpu_threads_per_process", "2"),
)
_CLOCK_SECONDS = 2.0  # what the time stamps of a file system may lag behind the clock


@dataclass(frozen=True)
class Command:
    """A step as it is shown and as it is run."""

    title: str
    script: str
    arguments: tuple[str, ...]
    launched: bool = False  # through accelerate launch

    @property
    def shown(self) -> str:
        start = " ".join(["accelerate launch", *_LAUNCH]) if self.launched else "python"
        script = self.script if Path.cwd() == ROOT else str(ROOT / self.script)
        quoted = (f'"{a}"' if " " in a else a for a in (script, *self.arguments))
        return f"{start} {' '.join(quoted)}"

    @property
    def argv(self) -> list[str]:
        launch = ["-m", "accelerate.commands.launch", *_LAUNCH] if self.launched else []
        return [sys.executable, *launch, str(ROOT / self.script), *self.arguments]


def run_demo(output_dir: Path, *, version: str, mode: str, steps: int, assets_only: bool = False) -> int:
    """Run everything; returns 1 when a check failed.

    Raises:
        UserError: a step failed, or the scripts are not where a checkout has them.
    """
    logger.info("writing the tiny LTX-%s model, a tiny Gemma and the clips to %s", version, output_dir)
    assets = write_assets(output_dir, version)
    if assets_only:
        return 0
    if not (ROOT / "ltx2_train_network.py").exists():
        raise UserError(f"{ROOT} has no ltx2_train_network.py; run the demo from a checkout (pip install -e .)")
    started = time.time()
    commands = demo_commands(assets, output_dir, version=version, mode=mode, steps=steps)
    done = [_run(command) for command in commands]
    generated = _results(output_dir / "generated", started)
    checks = _prove(assets, output_dir, generated, mode=mode, steps=steps)
    samples = {
        "Training clips": _clips(output_dir / "videos"),
        "Previews during training": _previews(_results(output_dir / "lora" / "sample", started)),
        "Generated with the merged LoRA": [Sample(p, f"prompt {i}") for i, p in enumerate(generated)],
    }
    page = output_dir / "report.html"
    write_report(_report(output_dir, checks, samples, done, version=version, mode=mode, steps=steps), page)
    logger.info(
        format_table(
            ["check", "result", "detail"],
            [[c.name, "pass" if c.passed else "FAIL", c.detail] for c in checks],
            title="What the demo proved",
        )
    )
    logger.info("report: %s", page)
    return 0 if all(c.passed for c in checks) else 1


def demo_commands(assets: Assets, output_dir: Path, *, version: str, mode: str, steps: int) -> list[Command]:
    """The path of a user: cache, cache text, train with previews, merge, generate."""
    model = ("--ltx2_checkpoint", str(assets.checkpoint), "--ltx2_mode", mode)
    data = ("--dataset_config", str(_dataset(assets, mode)))
    prompts = ("--sample_prompts", str(assets.prompts))
    size = ("--height", str(HEIGHT), "--width", str(WIDTH), "--sample_num_frames", str(FRAMES))
    half, last, merged = _lora_files(output_dir, steps)
    samples = (*prompts, "--sample_merge_audio", *size)
    return [
        Command("1. Cache latents", "ltx2_cache_latents.py", (*data, *model, "--vae_dtype", "fp32")),
        Command(
            "2. Cache text embeddings",
            "ltx2_cache_text_encoder_outputs.py",
            (*data, *model, "--gemma_root", str(assets.gemma), "--precache_sample_prompts", *prompts),
        ),
        Command(
            "3. Train, with previews",
            "ltx2_train_network.py",
            (
                *(*data, *model, "--ltx_version", version, "--ltx_version_check_mode", "error"),
                *("--mixed_precision", "no", "--sdpa", "--gradient_checkpointing", "--vae_dtype", "fp32"),
                *(
                    "--network_module",
                    "networks.lora_ltx2",
                    "--network_dim",
                    str(RANK),
                    "--network_alpha",
                    str(RANK),
                ),
                *(
                    "--lora_target_preset",
                    "audio" if mode == "audio" else "full",
                    "--learning_rate",
                    str(LEARNING_RATE),
                ),
                *("--lr_scheduler", "cosine", "--lr_warmup_steps", "10", "--max_train_steps", str(steps)),
                *("--seed", str(SEED), "--max_data_loader_n_workers", "0", "--save_state_on_train_end"),
                *("--timestep_sampling", "shifted_logit_normal", "--logging_dir", str(output_dir / "logs")),
                *("--save_every_n_steps", str(steps // 2), "--sample_every_n_steps", str(steps // 2)),
                *(*samples, "--sample_at_first", "--use_precached_sample_prompts"),
                *(["--ltx2_audio_only_model"] if mode == "audio" else []),
                *("--output_dir", str(output_dir / "lora"), "--output_name", NAME),
            ),
            launched=True,
        ),
        Command(
            "4. Merge two LoRAs",
            "ltx2_merge_lora.py",
            (
                *("--lora_weight", str(half), str(last), "--lora_multiplier", "0.5", "0.5"),
                *("--save_merged_lora", str(merged)),
            ),
        ),
        Command(
            "5. Generate with the merged LoRA",
            "ltx2_generate_video.py",
            (
                *(*model, "--gemma_root", str(assets.gemma), "--lora_weight", str(merged), *samples),
                *("--mixed_precision", "no", "--vae_dtype", "fp32", "--seed", str(SEED)),
                *("--output_dir", str(output_dir / "generated"), "--output_name", "demo"),
            ),
        ),
    ]


def _dataset(assets: Assets, mode: str) -> Path:
    return assets.audio_dataset if mode == "audio" else assets.dataset


def _lora_files(output_dir: Path, steps: int) -> tuple[Path, Path, Path]:
    folder = output_dir / "lora"
    return (
        folder / f"{NAME}-step{steps // 2:08d}.safetensors",
        folder / f"{NAME}.safetensors",
        folder / "merged.safetensors",
    )


def _run(command: Command) -> Step:
    logger.info("%s\n  %s", command.title, command.shown)
    started = time.perf_counter()
    environment = {**os.environ, "PYTHONUTF8": "1", "TOKENIZERS_PARALLELISM": "false"}
    status = subprocess.run(command.argv, env=environment, check=False).returncode
    if status:
        raise UserError(f"{command.script} ended with status {status}; its message is above")
    return Step(command.title, command.shown, time.perf_counter() - started)


def _prove(assets: Assets, output_dir: Path, generated: Sequence[Path], *, mode: str, steps: int) -> list[Check]:
    half, last, merged = _lora_files(output_dir, steps)
    training_set = discover(load_dataset_config(_dataset(assets, mode)), mode)
    probe = Probe.make(Checkpoint.open(assets.checkpoint), BatchLoader(BatchPlan(training_set, SEED)), mode)
    comfy = last.with_name(f"{NAME}.comfy.safetensors")
    return [
        *check_lora(probe, last),
        check_formats_agree(probe, last, comfy),
        check_merged(probe, merged, [(half, 0.5), (last, 0.5)]),
        *check_outputs(
            generated,
            count=len(load_prompts(assets.prompts)),
            frames=0 if mode == "audio" else FRAMES,
            sound=mode != "video",
        ),
    ]


def _results(folder: Path, since: float) -> list[Path]:
    """The files of this run: videos with sound, else videos, else sounds."""
    found = [p for p in sorted(folder.glob("*.*")) if p.stat().st_mtime >= since - _CLOCK_SECONDS]
    videos = [p for p in found if p.suffix == ".mp4"]
    return [p for p in videos if p.stem.endswith("_av")] or videos or [p for p in found if p.suffix == ".wav"]


def _clips(folder: Path) -> list[Sample]:
    clips = sorted(folder.glob("*.mp4"))
    return [Sample(p, p.with_suffix(".txt").read_text(encoding="utf-8").strip()) for p in clips]


def _report(
    output_dir: Path,
    checks: Sequence[Check],
    samples: Mapping[str, Sequence[Sample]],
    done: Sequence[Step],
    *,
    version: str,
    mode: str,
    steps: int,
) -> Report:
    seconds = sum(s.seconds for s in done)
    return Report(
        title=f"LTX-{version} demo, mode {mode}",
        summary=(
            "A tiny random model in the official layout took the whole path on real clips: it shows that every step "
            f"works, not what LTX-2 looks like. {len(done)} commands in {seconds:.0f} s."
        ),
        checks=checks,
        curves=_loss_curves(output_dir / "logs"),
        samples=samples,
        settings={
            "version": version,
            "mode": mode,
            "steps": steps,
            "rank": RANK,
            "learning rate": LEARNING_RATE,
            "resolution": f"{WIDTH}x{HEIGHT}, {FRAMES} frames",
            "seed": SEED,
            "trainer": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "system": platform.system(),
        },
        steps=done,
    )


def _previews(paths: Sequence[Path]) -> list[Sample]:
    """In order of training: ``demo_lora_000075_01_<time>_<seed>`` is step 75, prompt 1; ``e000000`` came before it."""
    found = []
    for path in paths:
        match = re.search(r"_(e?)(\d{6})_(\d\d)_\d{14}", path.stem)
        position, index = (int(match[2]), int(match[3])) if match else (0, 0)
        moment = "before training" if match and match[1] else f"step {position}"
        found.append((position, index, Sample(path, f"{moment}, prompt {index}")))
    return [sample for _, _, sample in sorted(found, key=lambda entry: entry[:2])]


def _loss_curves(logs: Path) -> dict[str, list[Curve]]:
    """Scalars of the newest TensorBoard run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    newest = max(folder for folder in logs.iterdir() if folder.is_dir())
    merged: dict[str, list[tuple[int, float]]] = {}
    for folder in sorted({file.parent for file in newest.rglob("events.out.tfevents.*")}):
        events = EventAccumulator(str(folder))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            merged.setdefault(tag, []).extend((e.step, e.value) for e in events.Scalars(tag))
    names = {"loss/average": "average", "loss/video": "video", "loss/audio": "audio"}
    return {
        "Training loss": [Curve(label, merged[tag]) for tag, label in names.items() if tag in merged],
        "Learning rate": [Curve("unet", merged["lr/unet"])] if "lr/unet" in merged else [],
    }
