import logging
import threading
import time
from pathlib import Path

import pytest
import torch
from cache_files import write_item

from musubi_tuner.caching import pipeline
from musubi_tuner.caching.pipeline import (
    Failed,
    Output,
    Summary,
    outdated,
    prepare_directories,
    read_ahead,
    remove_orphans,
)
from musubi_tuner.common.errors import ConfigErrors, UserError
from musubi_tuner.dataset.cache import CacheName, list_caches, write_latents
from musubi_tuner.dataset.entries import DatasetConfig, DatasetEntry


def _collect(items, work, **options):
    return [(item, list(results)) for item, results in read_ahead(items, work, **options)]


def test_results_come_in_order_whatever_the_speed() -> None:
    def work(item):
        time.sleep(0.02 * (item % 3))
        yield from (item * 10, item * 10 + 1)

    for workers in (1, 4):
        assert _collect(range(7), work, workers=workers) == [(i, [i * 10, i * 10 + 1]) for i in range(7)]


def test_an_error_ends_its_item_only() -> None:
    def work(item):
        yield item
        if item == 1:
            raise UserError("broken file")

    results = dict(_collect(range(3), work, workers=2))
    assert results[0] == [0]
    assert results[2] == [2]
    assert results[1][0] == 1
    assert isinstance(results[1][1], Failed)


def test_what_waits_is_bounded() -> None:
    alive, most, lock = 0, 0, threading.Lock()

    def work(item):
        nonlocal alive, most
        for part in range(5):
            with lock:
                alive += 1
                most = max(most, alive)
            yield part

    for _, results in read_ahead(range(12), work, workers=3):
        for _ in results:
            time.sleep(0.002)
            with lock:
                alive -= 1
    assert most <= 3 * 2 + 1  # one in each queue, one in each hand, one with the consumer


def test_leaving_early_stops_the_threads() -> None:
    before = threading.active_count()

    def endless(item):
        while True:
            yield item

    for _, results in read_ahead(range(5), endless, workers=3):
        next(results)
        break
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() == before


def test_a_stalled_file_is_named(monkeypatch, caplog) -> None:
    monkeypatch.setattr(pipeline, "STALL_SECONDS", 0.05)

    def slow(item):
        time.sleep(0.15)
        yield item

    with caplog.at_level(logging.WARNING):
        _collect(["slow.mp4"], slow, workers=1)
    assert "still reading slow.mp4" in caplog.text


def test_a_cache_is_current_by_its_key(tmp_path: Path) -> None:
    path = tmp_path / "a_0064x0032_ltx2.safetensors"
    output = Output(path, {"cache_key": "new", "settings": '{"target_fps": 25.0}', "encoder_id": "e"})
    assert outdated(output) == "missing"
    write_latents(path, torch.zeros(4, 1, 1, 2), output.metadata)
    assert outdated(output) is None
    old = {"cache_key": "old", "settings": '{"target_fps": 24.0}', "encoder_id": "e"}
    write_latents(path, torch.zeros(4, 1, 1, 2), old)
    assert outdated(output) == "changed: target_fps"
    write_latents(path, torch.zeros(4, 1, 1, 2), {**old, "encoder_id": "other"})
    assert outdated(output) == "another checkpoint"
    write_latents(path, torch.zeros(4, 1, 1, 2), {**output.metadata, "cache_key": "old"})
    assert outdated(output) == "the source file changed"
    path.write_bytes(path.read_bytes()[:-4])
    assert outdated(output) == "unreadable"


def test_a_foreign_cache_is_current_if_its_shapes_fit(tmp_path: Path) -> None:
    path = tmp_path / "a_0064x0032_ltx2.safetensors"
    write_latents(path, torch.zeros(4, 1, 1, 2), {})
    assert outdated(Output(path, {"cache_key": "k"}, fits=lambda p: True)) is None
    assert outdated(Output(path, {"cache_key": "k"})) == "made by another program with other shapes"


def test_orphans_go_with_all_their_kinds_and_nothing_else_does(tmp_path: Path) -> None:
    for base in ("a_00000-009", "b_00000-009"):
        write_item(tmp_path, base, stem=base[0], audio_steps=3)
    others = [tmp_path / name for name in ("notes.txt", "model.safetensors", "a.mp4", "ltx2_sample_prompts_cache.pt")]
    for path in others:
        path.write_bytes(b"x")
    kept = [name for name in list_caches(tmp_path) if name.kind == "latents" and name.base.startswith("a")]
    removed = remove_orphans(tmp_path, kept, ("latents", "audio"))
    assert removed == ["b_00000-009_0064x0032_ltx2.safetensors", "b_00000-009_0064x0032_ltx2_audio.safetensors"]
    assert all(path.exists() for path in others)
    assert CacheName("b", "text") in list_caches(tmp_path)


def test_the_summary_decides_the_exit_status(caplog) -> None:
    summary = Summary()
    summary.tally("datasets[0]", "video").encoded += 3
    assert summary.finish(allow_failed=False) == 0
    summary.fail("datasets[0]", "video", "bad.mp4", UserError("cannot be decoded\nsecond line"))
    with caplog.at_level(logging.INFO):
        assert summary.finish(allow_failed=False) == 1
    assert "failed: bad.mp4: cannot be decoded" in caplog.text
    assert "second line" not in caplog.text
    assert summary.finish(allow_failed=True) == 0
    empty = Summary()
    empty.empty.append("datasets[0]")
    assert empty.finish(allow_failed=False) == 1


def test_directories_that_cannot_be_written_are_reported_together_before_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    entries = tuple(
        DatasetEntry(f"datasets[{i}]", "video", tmp_path, tmp_path / name / "cache")
        for i, name in enumerate(("file", "good", "file"))
    )
    with pytest.raises(ConfigErrors, match="cannot be written; choose others") as error:
        prepare_directories(DatasetConfig(entries, (), tmp_path / "data.toml"))
    assert [problem.split(".")[0] for problem in error.value.problems] == ["datasets[0]", "datasets[2]"]
    assert list((tmp_path / "good" / "cache").iterdir()) == []


def test_a_lora_beside_the_caches_is_no_orphan(tmp_path: Path) -> None:
    mine, old = tmp_path / "style_ltx2.safetensors", tmp_path / "a_00000-009_0064x0032_ltx2.safetensors"
    for path in (mine, old):
        path.touch()
    assert remove_orphans(tmp_path, [], ("latents", "audio")) == [old.name]
    assert mine.exists()
