"""Packed batches: nothing is lost on the way, however large they are."""

from __future__ import annotations

import pickle
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
from cache_files import one_dataset, write_item
from torch import Tensor

from musubi_tuner.common.av import AV
from musubi_tuner.dataset import parcel as parcel_module
from musubi_tuner.dataset.batch import AudioLatents, Batch, SampleKey, TextEmbeds, VideoLatents
from musubi_tuner.dataset.loader import BatchLoader
from musubi_tuner.dataset.parcel import pack
from musubi_tuner.dataset.sampling import BatchPlan


def batch() -> Batch:
    """Every field filled, dtypes of 1, 2, 4 and 8 bytes, odd sizes, an empty tensor and one that is no block."""
    g = torch.Generator().manual_seed(0)
    return Batch(
        video=VideoLatents(torch.randn(1, 3, 2, 5, 1, generator=g).bfloat16(), torch.tensor([24.0])),
        audio=AudioLatents(torch.randn(1, 8, 3, 16, generator=g).half(), torch.tensor([3]), torch.tensor([[2, 1, 1]])),
        text=TextEmbeds(
            torch.randn(7, 3, generator=g).t()[None], torch.empty(1, 3, 0), torch.tensor([[True, False, True]])
        ),
        keys=(SampleKey("clip", 1, 2),),
        references=AV(video=VideoLatents(torch.ones(1, 3, 1, 1, 1), torch.tensor([24.0]))),
        masks=AV(audio=torch.rand(1, 3, generator=g)),
        extras={"dino": torch.randn(1, 2, 3, 4, generator=g)},
        loss_weights=AV(video=0.5),
    )


def parts(value: object, name: str = "") -> dict[str, object]:
    """The leaves of nested dataclasses and mappings, by their path."""
    if is_dataclass(value):
        children = {f.name: getattr(value, f.name) for f in fields(value)}
    elif isinstance(value, dict):
        children = value
    else:
        return {name: value}
    return {k: v for key, child in children.items() for k, v in parts(child, f"{name}.{key}").items()}


def assert_same(one: Batch, other: Batch) -> None:
    ones, others = parts(one), parts(other)
    assert ones.keys() == others.keys()
    for name, value in ones.items():
        if isinstance(value, Tensor):
            assert others[name].dtype == value.dtype, name
            assert torch.equal(others[name], value), name
        else:
            assert others[name] == value, name


@pytest.mark.parametrize("small", [2**20, 0], ids=["in the pipe", "in shared memory"])
def test_a_batch_survives_the_way_between_processes(monkeypatch: pytest.MonkeyPatch, small: int):
    monkeypatch.setattr(parcel_module, "_SMALL", small)
    packed = pack(batch())
    assert_same(batch(), packed.unpack())
    assert_same(batch(), pickle.loads(pickle.dumps(packed)).unpack())


def test_a_parcel_is_pinned_as_one_block(monkeypatch: pytest.MonkeyPatch):
    """As the loader's thread for page-locked memory does, for which this machine may have no use."""
    pinned: list[Tensor] = []

    def pin(tensor: Tensor, *device) -> Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    unpacked = pack(batch()).pin_memory().unpack()
    assert_same(batch(), unpacked)
    (block,) = pinned
    storage = block.untyped_storage().data_ptr()
    tensors = [t for t in parts(unpacked).values() if isinstance(t, Tensor)]
    assert {t.untyped_storage().data_ptr() for t in tensors} == {storage}


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_a_loader_for_a_gpu_gives_the_same_batches(tmp_path: Path):
    """Without a GPU nothing is pinned, but batches take the same way."""
    items = [write_item(tmp_path, f"clip{i}", audio_steps=3 + i, value=float(i)) for i in range(3)]
    plan = BatchPlan(one_dataset(items, batch_size=2), seed=0)
    plain = BatchLoader(plan)
    for_gpu = BatchLoader(plan, pin_memory=True)
    pairs = list(zip(plain.epoch(0), for_gpu.epoch(0), strict=True))
    assert len(pairs) == 2
    for one, other in pairs:
        assert_same(one, other)
