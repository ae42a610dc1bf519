"""What the demo proves about its own results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import torch
from torch import Tensor

from musubi_tuner.common.av import AV
from musubi_tuner.dataset.loader import BatchLoader
from musubi_tuner.diffusion.losses import total
from musubi_tuner.diffusion.timesteps import NoiseLevelSampler, default_shifted_logit_mode
from musubi_tuner.models.checkpoint import Checkpoint
from musubi_tuner.models.ltx2.load import load_transformer
from musubi_tuner.models.ltx2.transformer import LTX2Transformer
from musubi_tuner.networks.files.lora_reader import load_lora
from musubi_tuner.networks.lora_ltx2 import create_network_from_weights
from musubi_tuner.training.step import TaskSettings, TrainingView, prepare_view, view_losses

from .report import Check

_NOISE_SEED = 1234  # not the training run's: the model has not seen these draws
_DRAWS = 6  # noise draws of every item


@dataclass(frozen=True)
class Probe:
    """The transformer and some batches at fixed noise, to measure LoRA files with."""

    transformer: LTX2Transformer
    views: Sequence[TrainingView]
    settings: TaskSettings

    @staticmethod
    def make(checkpoint: Checkpoint, loader: BatchLoader, mode: str) -> Probe:
        transformer = load_transformer(checkpoint, mode=mode, dtype=torch.float32, device="cpu")
        sampler = NoiseLevelSampler(shifted_logit_mode=default_shifted_logit_mode(checkpoint.version))
        settings = TaskSettings(sampler, seed=_NOISE_SEED, device=torch.device("cpu"), dtype=torch.float32)
        blocks = len(transformer.transformer_blocks)
        views = [
            prepare_view(batch, settings, epoch=draw, num_blocks=blocks)
            for draw in range(_DRAWS)
            for batch in loader.epoch(0)
        ]
        return Probe(transformer, views, settings)

    @torch.no_grad()
    def loss(self) -> float:
        """Mean loss over the fixed draws with whatever is attached to the transformer."""
        losses = [total(view_losses(self.transformer, view, self.settings)) for view in self.views]
        return torch.stack(losses).mean().item()

    @torch.no_grad()
    def prediction(self) -> AV[Tensor]:
        view = self.views[0]
        return self.transformer(view.inputs, view.perturbations)


def check_lora(probe: Probe, file: Path) -> list[Check]:
    """The file reloads completely, lowers the loss, and does nothing at multiplier 0."""
    base_loss, base = probe.loss(), probe.prediction()
    network = create_network_from_weights(1.0, file, probe.transformer)
    network.apply_to(probe.transformer)
    network.eval()
    try:
        trained_loss = probe.loss()
        with network.gain(0.0):
            off = probe.prediction()
    finally:
        network.detach()
    modules = len(load_lora(file).modules)
    fall = 1 - trained_loss / base_loss
    return [
        Check(
            f"{file.name} reloads with every key matched",
            len(network.modules_by_name) == modules,
            f"{len(network.modules_by_name)} of {modules} modules",
        ),
        Check("multiplier 0 equals the base model", _equal(off, base), "compared bit for bit"),
        Check(
            "the loss on fixed, unseen noise fell",
            fall > 0.02,
            f"{base_loss:.4f} to {trained_loss:.4f} ({fall:.1%}), {len(probe.views)} batches",
        ),
    ]


def check_formats_agree(probe: Probe, original: Path, comfy: Path) -> Check:
    """The ComfyUI file acts like the original one, up to the rounding of bf16."""
    first, second = (_with_loras(probe, [(file, 1.0)]) for file in (original, comfy))
    error = _relative(first, second)
    return Check("the ComfyUI file acts like the original", error < 1e-2, f"largest relative difference {error:.1e}")


def check_merged(probe: Probe, merged: Path, parts: Sequence[tuple[Path, float]]) -> Check:
    """The merged file acts like its parts attached together."""
    error = _relative(_with_loras(probe, [(merged, 1.0)]), _with_loras(probe, parts))
    names = " + ".join(f"{weight:g} x {path.name}" for path, weight in parts)
    return Check(f"the merged LoRA equals {names}", error < 1e-2, f"largest relative difference {error:.1e}")


def check_outputs(files: Sequence[Path], *, count: int, frames: int, sound: bool) -> list[Check]:
    """There are ``count`` files, each of so many frames (0: sound alone), with sound where there should be some."""
    rendered = Check("every prompt was rendered", len(files) == count, f"{len(files)} of {count}")
    return [rendered, *(_check_output(file, frames, sound) for file in files)]


def _check_output(file: Path, frames: int, sound: bool) -> Check:
    with av.open(str(file)) as container:
        streams = container.streams
        found = sum(isinstance(frame, av.VideoFrame) for frame in container.decode(*streams.video, *streams.audio))
        has_sound = bool(streams.audio)
    good = found == frames and (has_sound or not sound)
    return Check(f"{file.name} plays", good, f"{found} frames, {'with' if has_sound else 'no'} sound")


def _with_loras(probe: Probe, files: Sequence[tuple[Path, float]]) -> AV[Tensor]:
    networks = []
    try:
        for file, multiplier in files:
            network = create_network_from_weights(multiplier, file, probe.transformer)
            network.apply_to(probe.transformer)
            network.eval()
            networks.append(network)
        return probe.prediction()
    finally:
        for network in reversed(networks):
            network.detach()


def _equal(a: AV[Tensor], b: AV[Tensor]) -> bool:
    return all(torch.equal(x, b[name]) for name, x in a.items())


def _relative(a: AV[Tensor], b: AV[Tensor]) -> float:
    return max(((x - b[name]).abs().max() / b[name].abs().max()).item() for name, x in a.items())
