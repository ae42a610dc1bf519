import threading
import time
from dataclasses import fields, is_dataclass
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
from cache_files import one_dataset, write_item
from torch import Tensor

from musubi_tuner.common.errors import UserError
from musubi_tuner.dataset import loader as loader_module
from musubi_tuner.dataset.batch import Batch
from musubi_tuner.dataset.collate import load_batch
from musubi_tuner.dataset.frame_store import BlockPool
from musubi_tuner.dataset.items import CachedDataset, CachedItem, TrainingSet
from musubi_tuner.dataset.loader import BatchLoader
from musubi_tuner.dataset.sampling import BatchPlan, BatchSpec


def _item(name: str, **options) -> CachedItem:
    return CachedItem(name, Path(name), Path(name), **{"grid": (2, 1, 2), "text_tokens": 6, "fps": 25.0, **options})


def _samples(plan: BatchPlan, epoch: int) -> list[tuple[int, int, int]]:
    return sorted((spec.dataset, *sample) for spec in plan.for_epoch(epoch) for sample in spec.samples)


def test_an_epoch_holds_every_sample_once() -> None:
    items = [_item(f"{i:02d}", grid=(1 + i % 2, 1, 2)) for i in range(11)]
    plan = BatchPlan(one_dataset(items, batch_size=3, num_repeats=2), seed=1)
    specs = plan.for_epoch(4)
    assert _samples(plan, 4) == [(0, i, r) for i in range(11) for r in range(2)]
    assert len(specs) == len(plan) == 4 + 4  # ceil(12 / 3) + ceil(10 / 3)
    assert all(len({items[i].grid for i, _ in spec.samples}) == 1 for spec in specs)


def test_plans_depend_on_seed_and_epoch_alone() -> None:
    training_set = one_dataset([_item(f"{i:02d}") for i in range(20)], batch_size=2)
    plan = BatchPlan(training_set, seed=1)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second = plan.for_epoch(1), plan.for_epoch(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert first != second
    assert BatchPlan(training_set, seed=1).for_epoch(1) == first == plan.for_epoch(1)
    assert BatchPlan(training_set, seed=2).for_epoch(1) != first


def test_validation_keeps_the_order_of_the_files() -> None:
    plan = BatchPlan(one_dataset([_item(f"{i}") for i in range(5)], batch_size=2), seed=1, shuffle=False)
    assert [spec.samples for spec in plan.for_epoch(3)] == [((0, 0), (1, 0)), ((2, 0), (3, 0)), ((4, 0),)]


def test_datasets_are_mixed() -> None:
    datasets = tuple(CachedDataset(i, "video", tuple(_item(f"{i}{j}") for j in range(10))) for i in range(2))
    order = [spec.dataset for spec in BatchPlan(TrainingSet("av", datasets), seed=0).for_epoch(1)]
    assert order not in ([0] * 10 + [1] * 10, [1] * 10 + [0] * 10)


@pytest.mark.parametrize(("separate", "mixed"), [(False, True), (True, False)])
def test_separate_audio_buckets(separate: bool, mixed: bool) -> None:
    items = [_item(f"{i}", audio_steps=10 * (i % 2)) for i in range(8)]
    plan = BatchPlan(one_dataset(items, batch_size=8, separate_audio_buckets=separate), seed=0)
    kinds = [{items[i].audio_steps > 0 for i, _ in spec.samples} for spec in plan.for_epoch(1)]
    assert any(len(kind) == 2 for kind in kinds) == mixed


@pytest.mark.parametrize(
    ("strategy", "buckets"), [("pad", [50, 50, 100, 100, 150]), ("truncate", [50, 50, 50, 100, 100])]
)
def test_audio_datasets_are_bucketed_by_length(strategy: str, buckets: list[int]) -> None:
    items = [_item(f"{t}", grid=(1, 1, 1), audio_steps=t) for t in (24, 74, 75, 100, 125)]
    plan = BatchPlan(one_dataset(items, "audio", batch_size=9, audio_strategy=strategy, audio_step=50), seed=0)
    groups = sorted(sorted(i for i, _ in spec.samples) for spec in plan.for_epoch(1))
    assert groups == sorted([i for i, b in enumerate(buckets) if b == bucket] for bucket in set(buckets))
    fixed = {spec.audio_steps for spec in plan.for_epoch(1)}
    assert fixed == ({None} if strategy == "pad" else {50, 100})


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    directory = tmp_path_factory.mktemp("cache")
    items = [
        write_item(directory, f"{i:02d}", grid=(1 + i % 2, 1, 1), audio_steps=i % 3, value=float(i)) for i in range(10)
    ]
    return one_dataset(items, batch_size=2)


def leaves(value: object) -> list[object]:
    """What nested dataclasses hold."""
    if is_dataclass(value):
        return [leaf for f in fields(value) for leaf in leaves(getattr(value, f.name))]
    return [value]


def _content(batch) -> tuple:
    sound = None if batch.audio is None else (batch.audio.lengths.tolist(), batch.audio.latents.sum().item())
    return batch.keys, batch.video.latents.flatten(1).mean(1).tolist(), sound


def test_workers_change_neither_order_nor_content(cached: TrainingSet) -> None:
    plan = BatchPlan(cached, seed=3)
    before = torch.get_rng_state()
    alone = [_content(b) for b in BatchLoader(plan).epoch(1)]
    loader = BatchLoader(plan, workers=2)
    assert [_content(b) for b in loader.epoch(1)] == alone
    second = [_content(b) for b in loader.epoch(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert second == [_content(b) for b in BatchLoader(plan).epoch(2)]
    assert second != alone
    assert len(alone) == loader.batches_per_epoch()


def test_resuming_within_an_epoch_reads_only_what_is_left(cached: TrainingSet, monkeypatch) -> None:
    loader = BatchLoader(BatchPlan(cached, seed=3))
    whole = [_content(b) for b in loader.epoch(5)]
    read = []

    def reading(training_set: TrainingSet, spec: BatchSpec, pool: BlockPool) -> Batch:
        read.append(spec)
        return load_batch(training_set, spec, pool)

    monkeypatch.setattr(loader_module, "load_batch", reading)
    assert [_content(b) for b in loader.epoch(5, start=4)] == whole[4:]
    assert len(read) == len(whole) - 4
    assert list(loader.epoch(5, start=len(whole))) == []


@pytest.mark.parametrize("world_size", [1, 2, 4, 5, 6])
def test_processes_share_an_epoch_without_duplicates_or_gaps(cached: TrainingSet, world_size: int) -> None:
    loader = BatchLoader(BatchPlan(cached, seed=3))
    whole = [b.keys for b in loader.epoch(1)]
    shares = [[b.keys for b in loader.epoch(1, rank=r, world_size=world_size)] for r in range(world_size)]
    assert [keys for turn in zip_longest(*shares) for keys in turn if keys is not None] == whole
    assert max(map(len, shares)) == loader.batches_per_epoch(world_size) <= min(map(len, shares)) + 1
    rest = [b.keys for b in loader.epoch(1, start=1, rank=world_size - 1, world_size=world_size)]
    assert rest == shares[-1][1:]


def test_fewer_batches_than_processes_are_refused(cached: TrainingSet) -> None:
    with pytest.raises(UserError, match="6 batches an epoch, fewer than the 16 processes"):
        BatchLoader(BatchPlan(cached, seed=3)).batches_per_epoch(16)


@pytest.mark.parametrize(
    ("asked", "cpus", "given"),
    [(8, 2, 2), (8, 64, 6), (3, 64, 3), (0, 64, 0), (8, None, 1)],
    ids=["CPUs", "batches", "flag", "none", "CPUs unknown"],
)
def test_number_of_workers(cached: TrainingSet, monkeypatch, asked: int, cpus: int | None, given: int) -> None:
    monkeypatch.setattr("musubi_tuner.dataset.loader.os.cpu_count", lambda: cpus)
    plan = BatchPlan(cached, seed=3)
    assert len(plan) == 6
    assert BatchLoader(plan, workers=asked).workers == given


def test_workers_read_two_batches_each_ahead_and_end_with_the_epoch(cached: TrainingSet, monkeypatch) -> None:
    begun = []

    def reading(training_set: TrainingSet, spec: BatchSpec, pool: BlockPool) -> Batch:
        begun.append(spec)
        return load_batch(training_set, spec, pool)

    def readers() -> int:
        return sum(thread.name.startswith("read-ahead") for thread in threading.enumerate())

    monkeypatch.setattr(loader_module, "load_batch", reading)
    batches = BatchLoader(BatchPlan(cached, seed=3), workers=2).epoch(0)
    next(batches)
    deadline = time.monotonic() + 5
    while len(begun) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.01)
    assert len(begun) == 4
    assert readers() == 2
    batches.close()
    assert readers() == 0


def test_batches_in_use_are_not_overwritten_by_later_ones(cached: TrainingSet) -> None:
    """Their memory is used again once nobody refers to them."""
    plan = BatchPlan(cached, seed=3)
    loader = BatchLoader(plan, workers=2)
    kept = [batch for epoch in range(3) for batch in loader.epoch(epoch)]
    fresh = [batch for epoch in range(3) for batch in BatchLoader(plan).epoch(epoch)]
    assert [_content(b) for b in kept] == [_content(b) for b in fresh]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_vanished_cache_is_one_clear_message(tmp_path: Path, workers: int) -> None:
    item = write_item(tmp_path, "gone")
    item.text.unlink()
    with pytest.raises(UserError) as error:
        list(BatchLoader(BatchPlan(one_dataset([item]), seed=0), workers=workers).epoch(1))
    assert "gone_ltx2_te.safetensors does not exist" in str(error.value)
    assert "Traceback" not in str(error.value)


def test_for_a_gpu_every_tensor_is_in_page_locked_memory(cached: TrainingSet, monkeypatch) -> None:
    """As far as it shows where there is no GPU: each tensor is pinned once, and nothing else changes."""
    pinned = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(loader_module, "bind_thread", lambda device: None)
    plan = BatchPlan(cached, seed=3)
    batches = list(BatchLoader(plan, workers=1, device=torch.device("cuda")).epoch(1))
    assert [_content(b) for b in batches] == [_content(b) for b in BatchLoader(plan).epoch(1)]
    pointers = {tensor.data_ptr() for tensor in pinned}
    for batch in batches:
        tensors = [t for t in leaves(batch) if isinstance(t, Tensor)]
        assert len(tensors) >= 3
        assert {t.data_ptr() for t in tensors} <= pointers
