"""What lies ahead of a run, from its batches and sizes alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from musubi_tuner.common.av import Modality
from musubi_tuner.config.model import Mode
from musubi_tuner.dataset.items import MODALITIES, CachedItem
from musubi_tuner.dataset.sampling import BatchPlan, BatchSpec
from musubi_tuner.diffusion.tokens import AUDIO_LATENTS_PER_SECOND, VIDEO_TIME_STRIDE
from musubi_tuner.networks.targets import modality_of

T = TypeVar("T")


@dataclass(frozen=True)
class Trained:
    """Modules and parameters that an optimizer moves."""

    modules: int
    params: int


@dataclass(frozen=True)
class BatchSize:
    """Tokens of one batch."""

    video: int
    audio: int

    @property
    def total(self) -> int:
        return self.video + self.audio


def by_stream(names: Iterable[str], values: Iterable[T]) -> dict[str, list[T]]:
    """``values`` of the streams ``video``, ``audio`` and ``cross`` (attention between them), without empty ones.

    ``names`` are those of the parameters, ``<module>.<parameter>``.
    """
    found: dict[str, list[T]] = {"video": [], "audio": [], "cross": []}
    for name, value in zip(names, values, strict=True):
        found[modality_of(name)].append(value)
    return {stream: values for stream, values in found.items() if values}


def trained_by_stream(names: Sequence[str], parameters: Iterable[torch.nn.Parameter]) -> dict[str, Trained]:
    """How much is trained in each stream."""
    modules = by_stream(names, (name.partition(".")[0] for name in names))
    params = by_stream(names, (parameter.numel() for parameter in parameters))
    return {stream: Trained(len(set(modules[stream])), sum(params[stream])) for stream in modules}


def batch_size(plan: BatchPlan, spec: BatchSpec, *, silence: bool = False) -> BatchSize:
    """Tokens of a batch with its references, as the model gets them; with ``silence`` clips without sound get it."""
    mode = plan.training_set.mode
    dataset = plan.training_set.datasets[spec.dataset]
    items = [dataset.items[position] for position, _ in spec.samples]
    grids = [] if mode == "audio" else [item.grid for item in items]
    grids += [item.reference_grid for item in items if item.reference_grid is not None]
    steps = max(_audio_steps(item, mode, silence) for item in items)
    if spec.audio_steps is not None:
        steps = min(steps, spec.audio_steps)
    steps += max(item.reference_audio_steps for item in items)
    return BatchSize(sum(map(math.prod, grids)), steps * len(items))


def _audio_steps(item: CachedItem, mode: Mode, silence: bool) -> int:
    if mode == "video" or item.audio_steps or not silence:
        return item.audio_steps if mode != "video" else 0
    frames = (item.grid[0] - 1) * VIDEO_TIME_STRIDE + 1
    return max(int(frames * AUDIO_LATENTS_PER_SECOND / item.fps), 1)


def tokens_per_step(sizes: Sequence[BatchSize], window: int) -> list[int]:
    """Tokens of each optimizer step of an epoch, in which ``window`` batches are one step."""
    return [sum(size.total for size in sizes[i : i + window]) for i in range(0, len(sizes), window)]


def modality_warnings(
    mode: Mode,
    trained: Mapping[str, Trained],
    *,
    learning: Sequence[Modality],
    weights: Mapping[str, Sequence[float]],
    has_sound: bool,
    silence: bool,
    audio_lr: float | None,
) -> list[str]:
    """What the mode promises and the run does not do.

    Args:
        trained: by stream.
        learning: modalities whose modules are to be trained.
        weights: the loss weights of the datasets by modality.
    """
    found = []
    for wanted in MODALITIES[mode]:
        if wanted in learning and wanted not in trained:
            found.append(
                f"mode {mode}, but no {wanted} module is trained; see --lora_target_preset, include_patterns and the "
                "learning rates"
            )
        if not any(weights[wanted]):
            found.append(
                f"mode {mode}, but every {wanted} loss weight is 0: nothing is learned of the {wanted}; see "
                f"--{wanted}_loss_weight and {wanted}_loss_weight of the datasets"
            )
    if mode == "av" and not has_sound:
        instead = "it is trained on silence only" if silence else "its modules learn nothing"
        found.append(f"mode av, but no cached item has sound: of the audio stream {instead}")
    if audio_lr is not None and not {"audio", "cross"} & trained.keys():
        found.append(f"--audio_lr {audio_lr:g} has no effect: no module of the sound is trained")
    return found
