"""Files that were removed, replaced or damaged after they were cached: training does not go on with what they were."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_encoders import RECIPE, FakeAudioVAE, FakeVideoVAE
from media_files import tone, write_sound, write_video
from PIL import Image

from musubi_tuner.caching.latents import cache_latents
from musubi_tuner.caching.pipeline import RunOptions, Summary, prepare_directories
from musubi_tuner.common.av import AV
from musubi_tuner.common.errors import ConfigErrors
from musubi_tuner.dataset.cache import write_text
from musubi_tuner.dataset.discovery import discover
from musubi_tuner.dataset.entries import DatasetConfig, DatasetEntry
from musubi_tuner.dataset.fingerprint import EncoderIds, RepairCommands, check_caches
from musubi_tuner.dataset.items import TrainingSet

COMMANDS = RepairCommands(Path("data.toml"), Path("ltx2.safetensors"), "av")


@dataclass(frozen=True)
class Role:
    """One kind of file beside clips a and b."""

    what: str  # in messages
    path: str
    write: Callable[[Path, int], None]  # version 1, 2, ...: files of different sizes
    gone: str = "any more for a_00000-009"


def _noise(path: Path, version: int) -> None:
    noise = np.random.default_rng(version).integers(0, 255, (64, 128), dtype=np.uint8)
    noise[: 16 * version] = 255  # compresses, so that sizes differ
    Image.fromarray(noise).save(path)


def _clip(path: Path, version: int) -> None:
    write_video(path, 16 + 2 * version, sound=tone(1.0))


ROLES = [
    Role("video", "videos/a.mp4", _clip),
    Role("reference", "references/a.png", _noise),
    Role("reference sound", "sounds/a.wav", lambda path, version: write_sound(path, tone(0.5 + 0.25 * version))),
    Role("mask", "masks/a.png", _noise),
    Role(
        "mask",
        "audio_masks/a.txt",
        lambda path, version: path.write_text("0 0.2\n" + "0.4 0.6\n" * version, encoding="utf-8"),
    ),
]


@pytest.fixture
def entry(tmp_path: Path) -> DatasetEntry:
    for folder in ("videos", "references", "sounds", "masks", "audio_masks"):
        (tmp_path / folder).mkdir()
    for stem in "ab":
        for role in ROLES:
            path = tmp_path / role.path
            role.write(path.with_stem(stem), 1)
        (tmp_path / "videos" / f"{stem}.txt").write_text(stem, encoding="utf-8")
    return DatasetEntry(
        label="datasets[0]",
        kind="video",
        source=tmp_path / "videos",
        cache_directory=tmp_path / "cache",
        resolution=(128, 64),
        target_frames=(9,),
        reference_directory=tmp_path / "references",
        reference_cache_directory=tmp_path / "cached_references",
        reference_audio_directory=tmp_path / "sounds",
        reference_audio_cache_directory=tmp_path / "cached_sounds",
        mask_directory=tmp_path / "masks",
        audio_mask_directory=tmp_path / "audio_masks",
    )


def cache(entry: DatasetEntry, **options) -> Summary:
    config = DatasetConfig((entry,), (), Path("data.toml"))
    prepare_directories(config)
    for stem in "ab":
        embeds = AV(torch.ones(4, 8), torch.ones(4, 8))
        path = entry.cache_directory / f"{stem}_ltx2_te.safetensors"
        write_text(path, embeds, torch.ones(4), {}, caption=stem)
    return cache_latents(
        config, RECIPE, video_vae=FakeVideoVAE(), audio_vae=FakeAudioVAE(), options=RunOptions(workers=1, **options)
    )


def find(entry: DatasetEntry) -> TrainingSet:
    return discover(DatasetConfig((entry,), (), Path("data.toml")), "av", references=("video", "audio"))


def check(training_set: TrainingSet) -> None:
    check_caches(training_set, encoders=EncoderIds(), commands=COMMANDS)


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.path)
def test_another_file_is_refused_until_it_is_cached(entry: DatasetEntry, role: Role) -> None:
    assert cache(entry).finish(allow_failed=False) == 0
    check(find(entry))
    role.write(entry.source.parent / role.path, 3)
    with pytest.raises(ConfigErrors) as error:
        check(find(entry))
    assert f"a_00000-009: the {role.what} is another file than when it was cached; run: python" in str(error.value)
    assert "b_00000-009" not in str(error.value)
    assert "--skip_existing" in str(error.value)
    assert cache(entry, skip_existing=True).finish(allow_failed=False) == 0
    check(find(entry))


@pytest.mark.parametrize("role", ROLES[1:], ids=lambda role: role.path)
def test_a_file_that_is_gone_takes_its_clip_out(entry: DatasetEntry, role: Role, caplog) -> None:
    cache(entry)
    (entry.source.parent / role.path).unlink()
    with caplog.at_level(logging.WARNING):
        training_set = find(entry)
    assert [item.base for item in training_set.items()] == ["b_00000-009"]
    assert f"no {role.what} any more for a_00000-009; left out" in caplog.text
    assert cache(entry, skip_existing=True).finish(allow_failed=False) == 1, "the caching script tells of it, too"
    assert [item.base for item in find(entry).items()] == ["b_00000-009"]


@pytest.mark.parametrize("role", ROLES[:4], ids=lambda role: role.path)
def test_a_damaged_file_is_not_covered_by_its_old_cache(entry: DatasetEntry, role: Role) -> None:
    cache(entry)
    path = entry.source.parent / role.path
    path.write_bytes(path.read_bytes()[:40])
    summary = cache(entry, skip_existing=True)
    assert summary.finish(allow_failed=False) == 1
    assert any("a." in failure for failure in summary.failures)
    with pytest.raises(ConfigErrors, match=f"a_00000-009: the {role.what} is another file"):
        check(find(entry))


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.path)
def test_another_date_alone_is_told_of(entry: DatasetEntry, role: Role, caplog) -> None:
    cache(entry)
    path = entry.source.parent / role.path
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 10**9))
    with caplog.at_level(logging.WARNING):
        training_set = find(entry)
    check(training_set)
    assert len(training_set) == 2
    assert "another date, but the same size, as when they were cached: a." in caplog.text


def test_directories_that_are_not_here_are_not_missed(entry: DatasetEntry) -> None:
    cache(entry)
    for name in ("references", "sounds", "masks", "audio_masks"):
        (entry.source.parent / name).rename(entry.source.parent / f"{name} elsewhere")
    training_set = find(entry)
    check(training_set)
    assert len(training_set) == 2


def test_a_reference_that_a_run_does_not_use_may_change(entry: DatasetEntry, caplog) -> None:
    cache(entry)
    (entry.source.parent / "references" / "a.png").unlink()
    training_set = discover(DatasetConfig((entry,), (), Path("data.toml")), "av", references=())
    check(training_set)
    assert len(training_set) == 2
