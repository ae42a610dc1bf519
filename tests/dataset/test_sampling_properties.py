"""The order of batches over random datasets: who comes when, on which process, and how often."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections import Counter
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from musubi_tuner.dataset.audio_mixing import AudioProbability, AudioQuota
from musubi_tuner.dataset.items import CachedDataset, CachedItem, TrainingSet
from musubi_tuner.dataset.loader import BatchLoader
from musubi_tuner.dataset.sampling import BatchPlan, BatchSpec, bucket_key

fast = settings(max_examples=50, derandomize=True, deadline=None, database=None)


def make_item(name: str, grid=(1, 1, 1), audio_steps: int = 0, text_tokens: int = 6) -> CachedItem:
    return CachedItem(name, Path(name), Path(name), grid, text_tokens, 25.0, audio_steps=audio_steps)


@st.composite
def datasets(draw: st.DrawFn, index: int, kind: str) -> CachedDataset:
    grids = {"image": [(1, 2, 2), (1, 1, 4)], "video": [(1, 2, 2), (3, 2, 2), (3, 1, 4)], "audio": [(1, 1, 1)]}[kind]
    sound = {
        "image": st.just(0),
        "video": st.sampled_from([0, 0, 26, 51]),
        "audio": st.integers(1, 160),
    }[kind]
    shapes = draw(st.lists(st.tuples(st.sampled_from(grids), sound, st.sampled_from([6, 8])), min_size=1, max_size=14))
    return CachedDataset(
        index=index,
        kind=kind,
        items=tuple(make_item(f"{i}", *shape) for i, shape in enumerate(shapes)),
        batch_size=draw(st.integers(1, 4)),
        num_repeats=draw(st.integers(1, 3)),
        separate_audio_buckets=draw(st.booleans()),
        audio_strategy=draw(st.sampled_from(["pad", "truncate"])),
        audio_step=draw(st.sampled_from([1, 25, 50])),
    )


@st.composite
def training_sets(draw: st.DrawFn) -> TrainingSet:
    mode = draw(st.sampled_from(["av", "audio"]))
    kinds = st.just("audio") if mode == "audio" else st.sampled_from(["image", "video"])
    chosen = draw(st.lists(kinds, min_size=1, max_size=3))
    # Positions and indices differ: a dataset keeps its index in the configuration.
    return TrainingSet(mode, tuple(draw(datasets(2 * i + 1, kind)) for i, kind in enumerate(chosen)))


@st.composite
def mixings(draw: st.DrawFn) -> AudioQuota | AudioProbability | None:
    if draw(st.booleans()):
        window = draw(st.integers(1, 6))
        return AudioQuota(draw(st.integers(1, window)), window)
    return draw(st.one_of(st.none(), st.floats(0, 1).map(AudioProbability)))


plans = st.builds(BatchPlan, training_sets(), st.integers(0, 2**32), mixing=mixings())
epochs = st.integers(0, 50)
pools = st.tuples(st.integers(0, 30), st.integers(0, 30))


def samples(specs: list[BatchSpec]) -> Counter[tuple[int, int, int]]:
    return Counter((spec.dataset, *sample) for spec in specs for sample in spec.samples)


def many_clips(mixing=None, seed: int = 0, **options) -> BatchPlan:
    """60 clips, a quarter of them with sound."""
    items = tuple(make_item(f"{i}", audio_steps=26 * (i % 4 == 0)) for i in range(60))
    return BatchPlan(TrainingSet("av", (CachedDataset(0, "video", items, **options),)), seed, mixing=mixing)


# --- every plan ---------------------------------------------------------------------------------------------


@fast
@given(plans, epochs)
def test_an_epoch_holds_every_repeat_of_every_item_once(plan: BatchPlan, epoch: int) -> None:
    specs = plan.for_epoch(epoch)
    assert len(specs) == len(plan)
    assert samples(specs) == {
        (d, i, r): 1
        for d, dataset in enumerate(plan.training_set.datasets)
        for i in range(len(dataset.items))
        for r in range(dataset.num_repeats)
    }


@fast
@given(plans, epochs)
def test_the_items_of_a_batch_can_be_stacked(plan: BatchPlan, epoch: int) -> None:
    for spec in plan.for_epoch(epoch):
        dataset = plan.training_set.datasets[spec.dataset]
        items = [dataset.items[i] for i, _ in spec.samples]
        assert 1 <= len(items) <= dataset.batch_size
        assert len({(item.grid, item.text_tokens) for item in items}) == 1
        assert len({bucket_key(dataset, item) for item in items}) == 1
        if dataset.separate_audio_buckets:
            assert len({item.audio_steps > 0 for item in items}) == 1
        if dataset.kind == "audio" and dataset.audio_strategy == "truncate":
            lengths = [item.audio_steps for item in items]
            assert spec.audio_steps % dataset.audio_step == 0
            assert spec.audio_steps == dataset.audio_step or spec.audio_steps <= min(lengths)
            assert max(lengths) < spec.audio_steps + dataset.audio_step
        else:
            assert spec.audio_steps is None


@fast
@given(plans, epochs)
def test_only_the_last_batch_of_a_bucket_is_smaller(plan: BatchPlan, epoch: int) -> None:
    sizes: dict[tuple, list[int]] = {}
    for spec in plan.for_epoch(epoch):
        dataset = plan.training_set.datasets[spec.dataset]
        key = (spec.dataset, bucket_key(dataset, dataset.items[spec.samples[0][0]]))
        sizes.setdefault(key, []).append(len(spec.samples))
    for (position, _), counts in sizes.items():
        batch_size = plan.training_set.datasets[position].batch_size
        assert sum(count < batch_size for count in counts) <= 1


@fast
@given(plans, epochs, st.integers(0, 2**32))
def test_a_plan_is_a_function_of_seed_and_epoch(plan: BatchPlan, epoch: int, other: int) -> None:
    first = plan.for_epoch(epoch)
    plan.for_epoch(other)  # another epoch in between, as after a resume
    again = BatchPlan(plan.training_set, plan.seed, mixing=plan.mixing)
    assert plan.for_epoch(epoch) == first == again.for_epoch(epoch)


@fast
@given(st.integers(0, 2**32), epochs, mixings())
def test_epochs_and_seeds_differ(seed: int, epoch: int, mixing) -> None:
    plan = many_clips(mixing, seed, batch_size=2)
    assert plan.for_epoch(epoch) != plan.for_epoch(epoch + 1)
    assert plan.for_epoch(epoch) != many_clips(mixing, seed + 1, batch_size=2).for_epoch(epoch)
    partners = [{frozenset(i for i, _ in spec.samples) for spec in plan.for_epoch(e)} for e in (epoch, epoch + 1)]
    assert partners[0] != partners[1]  # not the order alone, the batches are other ones


@fast
@given(plans, epochs)
def test_global_random_state_is_neither_read_nor_written(plan: BatchPlan, epoch: int) -> None:
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    first = plan.for_epoch(epoch)
    assert states() == before
    saved = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(epoch)
        np.random.seed(epoch)
        torch.manual_seed(epoch)
        assert plan.for_epoch(epoch) == first
    finally:
        random.setstate(saved[0])
        np.random.set_state(saved[1])
        torch.set_rng_state(saved[2])


@fast
@given(training_sets(), st.integers(0, 2**32), epochs, mixings())
def test_validation_keeps_the_order_of_the_files(data: TrainingSet, seed: int, epoch: int, mixing) -> None:
    specs = BatchPlan(data, seed, shuffle=False, mixing=mixing).for_epoch(epoch)
    assert [spec.dataset for spec in specs] == sorted(spec.dataset for spec in specs)
    for position, dataset in enumerate(data.datasets):
        buckets: dict[object, list[tuple[int, int]]] = {}
        for spec in specs:
            if spec.dataset == position:
                buckets.setdefault(bucket_key(dataset, dataset.items[spec.samples[0][0]]), []).extend(spec.samples)
        assert all(order == sorted(order) for order in buckets.values())
        firsts = [order[0] for order in buckets.values()]
        assert firsts == sorted(firsts)
        if len(buckets) == 1:
            (order,) = buckets.values()
            assert order == [(i, r) for i in range(len(dataset.items)) for r in range(dataset.num_repeats)]


_FRESH = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
from dataset.test_sampling_properties import some_plans
print(json.dumps(some_plans()))
"""


def some_plans() -> list:
    """Plans of all samplers, in terms that JSON keeps."""
    chosen = [None, AudioQuota(1, 4), AudioProbability(0.5)]
    plans = [many_clips(mixing, seed=5, batch_size=3, num_repeats=2) for mixing in chosen]
    return [[[list(map(list, spec.samples)) for spec in plan.for_epoch(e)] for e in (0, 7)] for plan in plans]


def test_a_fresh_process_makes_the_same_plan() -> None:
    folder = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", _FRESH, json.dumps([str(folder), *filter(None, sys.path)])],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == some_plans()


# --- processes and resuming ---------------------------------------------------------------------------------


class Loader(BatchLoader):
    """Gives the specs of a process in place of what they load."""

    def specs(self, epoch: int, **place: int) -> list[BatchSpec]:
        return list(self.epoch(epoch, **place))


@pytest.fixture(autouse=True, scope="module")
def loads_nothing():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("musubi_tuner.dataset.loader.load_batch", lambda training_set, spec, pool: spec)
        yield


@fast
@given(plans, epochs, st.integers(1, 5))
def test_processes_are_disjoint_and_together_everything(plan: BatchPlan, epoch: int, world_size: int) -> None:
    loader = Loader(plan)
    shares = [loader.specs(epoch, rank=rank, world_size=world_size) for rank in range(world_size)]
    dealt = [spec for turn in zip_longest(*shares) for spec in turn if spec is not None]
    assert dealt == plan.for_epoch(epoch)
    assert sum(map(len, shares)) == len(plan)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    if len(plan) >= world_size:
        assert loader.batches_per_epoch(world_size) == max(map(len, shares))


@fast
@given(plans, epochs, st.integers(1, 3), st.integers(0, 2), st.integers(0, 40))
def test_resuming_is_skipping(plan: BatchPlan, epoch: int, world_size: int, rank: int, start: int) -> None:
    place = {"rank": rank % world_size, "world_size": world_size}
    assert Loader(plan).specs(epoch, start=start, **place) == Loader(plan).specs(epoch, **place)[start:]


@fast
@given(plans, epochs, st.integers(1, 3), st.integers(1, 3))
def test_a_step_trains_on_consecutive_batches(plan: BatchPlan, epoch: int, world_size: int, accumulation: int) -> None:
    """The window that the quota is promised for."""
    loader = Loader(plan)
    shares = [iter(loader.specs(epoch, rank=rank, world_size=world_size)) for rank in range(world_size)]
    order, size = plan.for_epoch(epoch), world_size * accumulation
    for first in range(0, len(order), size):
        step = [spec for share in shares for spec in islice(share, accumulation)]
        assert sorted(step, key=repr) == sorted(order[first : first + size], key=repr)


# --- batches with sound -------------------------------------------------------------------------------------


@fast
@given(pools, st.integers(1, 8).flatmap(lambda w: st.tuples(st.integers(1, w), st.just(w))), st.integers(0, 2**32))
def test_every_window_holds_its_quota_while_sound_lasts(pools, quota, seed: int) -> None:
    audio, others = [("audio", i) for i in range(pools[0])], [("other", i) for i in range(pools[1])]
    number, window = quota
    order = AudioQuota(number, window).order(audio, others, torch.Generator().manual_seed(seed))
    assert sorted(order) == sorted(audio + others)
    left = len(audio)
    for first in range(0, len(order), window):
        part = order[first : first + window]
        found = sum(kind == "audio" for kind, _ in part)
        assert found >= min(number, len(part), left)
        left -= found


@fast
@given(plans, epochs)
def test_the_quota_holds_for_the_batches_of_a_plan(plan: BatchPlan, epoch: int) -> None:
    if not isinstance(plan.mixing, AudioQuota):
        plan = BatchPlan(plan.training_set, plan.seed, mixing=AudioQuota(2, 3))
    order, window = plan.for_epoch(epoch), plan.mixing.window
    has_sound = [
        any(plan.training_set.datasets[spec.dataset].items[i].audio_steps > 0 for i, _ in spec.samples)
        for spec in order
    ]
    for first in range(0, len(order), window):
        part = has_sound[first : first + window]
        assert sum(part) >= min(plan.mixing.batches, len(part), sum(has_sound[first:]))


def test_sound_beyond_the_quota_is_spread_over_the_epoch() -> None:
    """The quota is the least that a step gets, not the most."""
    firsts = [
        sum(kind == "audio" for kind, _ in _order(AudioQuota(1, 4), audio=200, others=200, seed=s)[:200])
        for s in range(10)
    ]
    # Half of the sound, 100, is expected there; were the rest held back, 50.
    assert 90 < np.mean(firsts) < 110


def test_places_within_a_window_are_drawn() -> None:
    places = Counter(
        place
        for seed in range(200)
        for place, (kind, _) in enumerate(_order(AudioQuota(1, 4), audio=1, others=3, seed=seed))
        if kind == "audio"
    )
    assert set(places) == {0, 1, 2, 3}
    assert min(places.values()) > 25  # 50 +- 6


@fast
@given(pools, st.floats(0, 1), st.integers(0, 2**32))
def test_drawing_by_probability_gives_every_batch_once(pools, probability: float, seed: int) -> None:
    order = _order(AudioProbability(probability), audio=pools[0], others=pools[1], seed=seed)
    audio, others = ([i for kind, i in order if kind == wanted] for wanted in ("audio", "other"))
    # Each pool is used in its own, shuffled order.
    assert (audio, others) == (list(range(pools[0])), list(range(pools[1])))


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_probability_holds_while_there_are_both_kinds(probability: float) -> None:
    draws = []
    for seed in range(20):
        order = [kind == "audio" for kind, _ in _order(AudioProbability(probability), audio=300, others=300, seed=seed)]
        draws += order[: _both_left(order)]
    if probability in (0, 1):
        assert set(draws) == {probability == 1}
    deviation = math.sqrt(probability * (1 - probability) / len(draws))
    assert abs(np.mean(draws) - probability) <= 4 * deviation


def _both_left(order: list[bool]) -> int:
    """How many were drawn while there were both kinds: the batches before the last run of one kind, and one of them
    where that used up the other pool is already in."""
    last_run = next((n for n, kind in enumerate(reversed(order)) if kind != order[-1]), len(order))
    return len(order) - last_run


def _order(mixing, *, audio: int, others: int, seed: int) -> list[tuple[str, int]]:
    return mixing.order(
        [("audio", i) for i in range(audio)],
        [("other", i) for i in range(others)],
        torch.Generator().manual_seed(seed),
    )


@fast
@given(plans, epochs)
def test_sound_is_counted_in_batches_and_samples(plan: BatchPlan, epoch: int) -> None:
    found = plan.count_sound(epoch)
    assert found.batches == len(plan)
    assert found.samples == sum(len(d.items) * d.num_repeats for d in plan.training_set.datasets)
    with_sound = [sum(item.audio_steps > 0 for item in d.items) * d.num_repeats for d in plan.training_set.datasets]
    assert found.audio_samples == sum(with_sound)
    most = max(d.batch_size for d in plan.training_set.datasets)
    assert math.ceil(found.audio_samples / most) <= found.audio_batches <= min(found.batches, found.audio_samples)


def test_a_batch_counts_when_one_of_its_items_has_sound() -> None:
    items = (make_item("silent"), make_item("sounding", audio_steps=26))
    mixed = TrainingSet("av", (CachedDataset(0, "video", items, batch_size=2),))
    separate = TrainingSet("av", (CachedDataset(0, "video", items, batch_size=2, separate_audio_buckets=True),))
    counts = [BatchPlan(data, 0).count_sound(0) for data in (mixed, separate)]
    assert [(c.audio_batches, c.batches, c.audio_samples, c.samples) for c in counts] == [(1, 1, 1, 2), (1, 2, 1, 2)]
