"""Which items form which batch, in which order: a function of the seed and the epoch alone.

Nothing is drawn from, or written to, global random state, and nothing depends on earlier epochs: every process
and every resumed run computes the same plan.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass

import torch

from musubi_tuner.common.seeding import generator

from .audio_mixing import AudioMixing, shuffled
from .buckets import quantize_audio_length
from .items import CachedDataset, CachedItem, TrainingSet


@dataclass(frozen=True)
class BatchSpec:
    """One batch before it is loaded."""

    dataset: int  # position in TrainingSet.datasets
    samples: tuple[tuple[int, int], ...]  # (position of the item, repeat)
    audio_steps: int | None = None  # cut or pad the sound to this many latent steps; None = longest of the batch


@dataclass(frozen=True)
class _Bucket:
    """Samples of one dataset that can be stacked."""

    samples: tuple[tuple[int, int], ...]
    audio_steps: int | None


@dataclass(frozen=True)
class SoundCount:
    """How much of an epoch has sound. A batch counts when at least one of its samples has."""

    batches: int
    audio_batches: int
    samples: int
    audio_samples: int


class BatchPlan:
    """The batches of every epoch.

    Args:
        training_set: the items.
        seed: of the run.
        shuffle: ``False`` keeps the order of the files (validation).
        mixing: how batches with sound are spread over a shuffled epoch; ``None`` treats all batches alike.
    """

    def __init__(
        self, training_set: TrainingSet, seed: int, *, shuffle: bool = True, mixing: AudioMixing | None = None
    ) -> None:
        self.training_set = training_set
        self.seed = seed
        self.shuffle = shuffle
        self.mixing = mixing
        self._buckets = [_buckets(dataset) for dataset in training_set.datasets]

    def __len__(self) -> int:
        """Batches of one epoch, the same in each; the last batch of a bucket may be smaller."""
        return sum(
            -(-len(bucket.samples) // dataset.batch_size)
            for dataset, buckets in zip(self.training_set.datasets, self._buckets, strict=True)
            for bucket in buckets
        )

    def for_epoch(self, epoch: int) -> list[BatchSpec]:
        """The batches of ``epoch`` in order."""
        specs: list[BatchSpec] = []
        for position, dataset in enumerate(self.training_set.datasets):
            random = generator(self.seed, "bucket order", dataset.index, epoch)
            for bucket in self._buckets[position]:
                samples = self._shuffled(bucket.samples, random)
                specs += [
                    BatchSpec(position, tuple(samples[first : first + dataset.batch_size]), bucket.audio_steps)
                    for first in range(0, len(samples), dataset.batch_size)
                ]
        specs = self._shuffled(specs, generator(self.seed, "batch order", epoch))
        if self.mixing is None or not self.shuffle:
            return specs
        # Which batches have sound is asked of the batches: without separate buckets the shuffle decides it anew.
        audio = [spec for spec in specs if self.has_sound(spec)]
        others = [spec for spec in specs if not self.has_sound(spec)]
        return self.mixing.order(audio, others, generator(self.seed, "audio mixing", epoch))

    def has_sound(self, spec: BatchSpec) -> bool:
        """Whether at least one item of the batch has sound."""
        items = self.training_set.datasets[spec.dataset].items
        return any(items[position].has_sound for position, _ in spec.samples)

    def count_sound(self, epoch: int) -> SoundCount:
        """How many batches and samples of ``epoch`` have sound."""
        specs = self.for_epoch(epoch)
        datasets = self.training_set.datasets
        samples = [datasets[spec.dataset].items[position] for spec in specs for position, _ in spec.samples]
        return SoundCount(
            batches=len(specs),
            audio_batches=sum(self.has_sound(spec) for spec in specs),
            samples=len(samples),
            audio_samples=sum(item.has_sound for item in samples),
        )

    def _shuffled(self, values: list | tuple, random: torch.Generator) -> list:
        return shuffled(values, random) if self.shuffle else list(values)


def _buckets(dataset: CachedDataset) -> list[_Bucket]:
    """The dataset's samples by what must agree within a batch, in order of first appearance."""
    groups: dict[Hashable, list[tuple[int, int]]] = defaultdict(list)
    for position, item in enumerate(dataset.items):
        groups[bucket_key(dataset, item)] += [(position, repeat) for repeat in range(dataset.num_repeats)]
    return [
        _Bucket(tuple(samples), _fixed_audio_steps(dataset, dataset.items[samples[0][0]]))
        for samples in groups.values()
    ]


def bucket_key(dataset: CachedDataset, item: CachedItem) -> Hashable:
    """Equal for items that may share a batch: the actual shapes, so that stacking cannot fail."""
    return (
        item.grid,
        item.text_tokens,
        item.reference_grid,
        item.reference_audio is None,
        item.has_sound if dataset.separate_audio_buckets else None,
        _audio_bucket(dataset, item) if dataset.kind == "audio" else None,
    )


def _fixed_audio_steps(dataset: CachedDataset, item: CachedItem) -> int | None:
    return _audio_bucket(dataset, item) if dataset.kind == "audio" and dataset.audio_strategy == "truncate" else None


def _audio_bucket(dataset: CachedDataset, item: CachedItem) -> int:
    return quantize_audio_length(item.audio_steps, dataset.audio_step, dataset.audio_strategy)
