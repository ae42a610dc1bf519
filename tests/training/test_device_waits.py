"""How often the loop waits for its device, seen on the meta device: nothing but shapes, so whatever is read back or
copied with a halt must ask, and is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from unittest.mock import patch

import pytest
import torch
from ltx2_tiny import tiny_config, tiny_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from musubi_tuner.common.av import AV
from musubi_tuner.conditioning.reference import AudioReferenceRules
from musubi_tuner.dataset.batch import AudioLatents, Batch, SampleKey, TextEmbeds, VideoLatents
from musubi_tuner.diffusion import noising
from musubi_tuner.diffusion.balance import BalanceSettings
from musubi_tuner.diffusion.timesteps import NoiseLevelSampler
from musubi_tuner.networks.lora_ltx2 import create_network
from musubi_tuner.training import pace
from musubi_tuner.training.audio_watch import AudioWatch
from musubi_tuner.training.lr_plan import FactorPlan
from musubi_tuner.training.lr_schedulers import ScheduleSettings
from musubi_tuner.training.optimizers import create_optimizer
from musubi_tuner.training.state import Progress
from musubi_tuner.training.step import TaskSettings
from musubi_tuner.training.trainer import LoopSettings, Trainer

META = torch.device("meta")
CHANNELS = {"in_channels": 128, "out_channels": 128, "audio_in_channels": 128, "audio_out_channels": 128}
MAKE_TENSOR = torch.tensor
aten = torch.ops.aten


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for the device, and answers with ones what has no data to read."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], Tensor) else None
        on_device = first is not None and first.device == META
        packet = function.overloadpacket
        if packet is aten._to_copy and first.device != torch.device(kwargs.get("device", first.device)):
            if on_device:
                self.counts["read"] += 1
                return torch.ones(first.shape, dtype=kwargs.get("dtype") or first.dtype)
            self.counts["blocking copy"] += not kwargs.get("non_blocking", False)
            converts = kwargs.get("dtype") not in (None, first.dtype)
            self.counts["copy through pageable memory"] += converts
        elif packet is aten.copy_ and args[1].device != first.device:
            self.counts["read" if args[1].device == META else "blocking copy"] += 1
        elif packet is aten._local_scalar_dense and on_device:
            self.counts["read"] += 1
            return 1.0 if first.is_floating_point() else 1
        elif packet is aten._unique2 and on_device:
            self.counts["count of levels"] += 1
            return first.new_empty(2), first.new_empty(first.shape, dtype=torch.int64), first.new_empty(0)
        elif packet in (aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero) and on_device:
            self.counts[str(packet)] += 1
        return function(*args, **kwargs)

    def tensor(self, *args, **kwargs) -> Tensor:
        """``torch.tensor``, which copies without asking a dispatch mode."""
        device = kwargs.get("device")
        self.counts["blocking copy"] += device is not None and torch.device(device) == META
        return MAKE_TENSOR(*args, **kwargs)

    def found(self) -> dict[str, int]:
        return {name: count for name, count in self.counts.items() if count}


class AtOnce:
    """Works in the thread that submits: a dispatch mode sees nothing of what other threads do."""

    def __init__(self, *_, initializer: Callable[[], None], **__) -> None:
        initializer()

    def submit(self, function: Callable, *args) -> Future:
        done: Future = Future()
        done.set_result(function(*args))
        return done

    def shutdown(self, **_) -> None:
        pass


@dataclass
class Loader:
    batches: list[Batch]

    def batches_per_epoch(self, world_size: int = 1) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, start: int = 0, rank: int = 0, world_size: int = 1):
        yield from self.batches[start:]


class Seen(Exception):
    """What a test wanted to see has happened."""


@dataclass
class PerStep:
    """The waits of each step; ends the run with the second, which has prepared the third one's first batch by then."""

    waits: Waits
    steps: list[dict[str, int]] = field(default_factory=list)

    def on_start(self, progress) -> None:
        pass

    def on_step(self, report, progress) -> None:
        self.steps.append(self.waits.found())
        self.waits.counts.clear()
        if len(self.steps) == 2:
            raise Seen

    def on_epoch_end(self, epoch, progress) -> None:
        pass

    def on_end(self, progress) -> None:
        pass


def batch_of(*lengths: int, **options) -> Batch:
    """Samples of three latent frames with ``lengths`` steps of sound."""
    size = len(lengths)
    return Batch(
        video=VideoLatents(torch.randn(size, 128, 3, 2, 2).bfloat16(), torch.full((size,), 25.0)),
        audio=AudioLatents(torch.randn(size, 8, max(lengths), 16).bfloat16(), torch.tensor(lengths)),
        text=TextEmbeds(torch.randn(size, 5, 32), torch.randn(size, 5, 24), torch.ones(size, 5, dtype=torch.bool)),
        keys=tuple(SampleKey(f"clip_{index}") for index in range(size)),
        **options,
    )


def waits_of_a_step(batches: list[Batch], *, optimizer: str = "AdamW", **options) -> dict[str, int]:
    """What the second of three optimizer steps waits for; each is all of ``batches``."""
    transformer = tiny_model(tiny_config("2.3", **CHANNELS), dtype=torch.bfloat16).to(META)
    network = create_network(1.0, 4, 4, transformer, dropout=0.1)
    network.apply_to(transformer)
    network.to(META).train()
    parameters: list[nn.Parameter] = list(network.parameters())
    made = create_optimizer(optimizer, [{"params": parameters, "lr": 1e-3}], ["foreach=True"])
    task = TaskSettings(
        NoiseLevelSampler(), seed=0, device=META, dtype=torch.bfloat16, caption_dropout_rate=0.5, **options
    )
    plan = FactorPlan("constant", ScheduleSettings(3), (1e-3,))
    loop = LoopSettings(3, len(batches), max_grad_norm=1.0, lr_plan=plan)
    at_once = patch.object(pace, "ThreadPoolExecutor", AtOnce)
    with Waits() as waits, patch.object(torch, "tensor", waits.tensor), at_once:
        listener = PerStep(waits)
        trainer = Trainer(
            transformer,
            parameters,
            made,
            Loader(batches * 3),
            task,
            loop,
            Progress(seed=0),
            [listener],
            audio_watch=AudioWatch(balance=BalanceSettings("ema_mag")),
            norm_groups={"video": parameters[:4]},
        )
        with pytest.raises(Seen):
            trainer.run()
    return listener.steps[1]


BATCHES = {
    "sounds of two lengths": batch_of(6, 3),
    "a sample without sound": batch_of(6, 0),
    "text with padding": replace(
        batch_of(4), text=TextEmbeds(torch.randn(1, 5, 32), torch.randn(1, 5, 24), torch.arange(5)[None] < 3)
    ),
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_an_optimizer_step_reads_from_its_device_once(batch: Batch, accumulation: int):
    """The losses and norms; neither noise, conditions and text of the next batches nor the model wait."""
    assert waits_of_a_step([batch] * accumulation) == {"read": 1}


def test_a_blocking_copy_in_the_making_of_the_next_view_is_seen(monkeypatch: pytest.MonkeyPatch):
    """It is made ahead, by a thread of its own when training."""
    monkeypatch.setattr(noising, "upload", lambda tensor, device: tensor.to(device))
    assert waits_of_a_step([BATCHES["sounds of two lengths"]])["blocking copy"] > 0


def test_silence_in_place_of_sound_waits_for_nothing():
    assert waits_of_a_step([batch_of(6, 0)], silence_weight=0.5) == {"read": 1}


CONDITIONS = {
    "first frame": (batch_of(6, 3), {"first_frame_p": 1.0}),
    "masks": (
        batch_of(6, 3, masks=AV(video=torch.ones(2, 3, 2, 2).tril(), audio=torch.ones(2, 6).tril())),
        {"audio_reference": AudioReferenceRules()},
    ),
    "references": (
        batch_of(
            *(6, 3),
            references=AV(
                video=VideoLatents(torch.randn(2, 128, 3, 2, 2), torch.full((2,), 25.0)),
                audio=AudioLatents(torch.randn(2, 8, 4, 16), torch.tensor([4, 2])),
            ),
        ),
        {"audio_reference": AudioReferenceRules(True, True, True)},
    ),
}


@pytest.mark.parametrize(("batch", "options"), CONDITIONS.values(), ids=CONDITIONS)
def test_conditions_add_the_count_of_their_levels_only(batch: Batch, options: dict):
    """Where tokens of a sample have levels of their own, the model counts the distinct ones before it starts."""
    waits = waits_of_a_step([batch, batch], **options)
    assert waits.pop("count of levels") in (2, 4), "once a forward for each modality that has a condition"
    assert waits == {"read": 1}
