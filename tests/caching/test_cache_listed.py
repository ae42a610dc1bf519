"""Caching of media that a JSONL file lists."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_encoders import RECIPE, FakeAudioVAE, FakeTextEncoder, FakeVideoVAE
from media_files import index_frame, tone, write_sound, write_video
from PIL import Image

from musubi_tuner.caching.latent_outputs import LatentRecipe
from musubi_tuner.caching.latents import cache_latents
from musubi_tuner.caching.pipeline import RunOptions
from musubi_tuner.caching.text import TextRecipe, cache_text
from musubi_tuner.common.safetensors_io import SafetensorsFile
from musubi_tuner.dataset.discovery import discover
from musubi_tuner.dataset.entries import DatasetConfig, DatasetEntry
from musubi_tuner.dataset.items import EncoderRecord

TEXT = TextRecipe("av", EncoderRecord("connectors id"), "gemma id")
PLAIN = RunOptions(workers=2)
SKIP = RunOptions(skip_existing=True, workers=2)


@pytest.fixture
def media(tmp_path: Path) -> Path:
    folder = tmp_path / "mein Ordner é"
    folder.mkdir()
    for name, sound in (("ein Zug", tone(1.2)), ("Straße", None), ("unlisted", None)):
        write_video(folder / f"{name}.mp4", 30, sound=sound)
        (folder / f"{name}.txt").write_text(f"caption {name}", encoding="utf-8")
    return folder


def _list(folder: Path, *lines: dict, kind: str = "video", **options) -> DatasetEntry:
    file = folder.parent / "list.jsonl"
    text = "\n".join(json.dumps({"caption": f"caption {Path(x[f'{kind}_path']).stem}"} | x) for x in lines)
    file.write_text(text, encoding="utf-8")
    return _entry(file, kind=kind, listed=True, cache="listed", **options)


def _entry(source: Path, cache: str, **options) -> DatasetEntry:
    defaults = {"kind": "video", "resolution": (128, 64), "target_frames": (17,), "batch_size": 2}
    return DatasetEntry("datasets[0]", source=source, cache_directory=source.parent / cache, **(defaults | options))


def _config(entry: DatasetEntry) -> DatasetConfig:
    return DatasetConfig((entry,), (), Path("data.toml"))


def _latents(entry: DatasetEntry, recipe: LatentRecipe = RECIPE, options: RunOptions = PLAIN):
    return cache_latents(_config(entry), recipe, options=options, video_vae=FakeVideoVAE(), audio_vae=FakeAudioVAE())


def _text(entry: DatasetEntry, options: RunOptions = PLAIN):
    return cache_text(_config(entry), TEXT, FakeTextEncoder, options=options)


def _counts(summary, modality: str) -> tuple[int, int, int, int]:
    tally = summary.tally("datasets[0]", modality)
    return tally.encoded, tally.current, tally.failed, tally.no_audio


def _names(entry: DatasetEntry) -> list[str]:
    return sorted(path.name for path in entry.cache_directory.iterdir())


def _relative(*names: str) -> list[dict]:
    return [{"video_path": f"mein Ordner é/{name}.mp4"} for name in names]


def test_a_list_gives_the_caches_of_the_directory(media: Path) -> None:
    (media / "unlisted.mp4").unlink()
    directory = _entry(media, "direct")
    listed = _list(media, *_relative("Straße", "ein Zug"))
    for entry in (directory, listed):
        assert _latents(entry).finish(allow_failed=False) == 0
        assert _text(entry).finish(allow_failed=False) == 0
    assert _names(directory) == _names(listed)
    for name in _names(directory):
        one, other = (SafetensorsFile(entry.cache_directory / name) for entry in (directory, listed))
        assert one.metadata["cache_key"] == other.metadata["cache_key"]
        tensors = dict(one.read())
        assert all(torch.equal(tensors[key], value) for key, value in other.read())


def test_only_listed_items_are_cached_and_found(media: Path, caplog) -> None:
    entry = _list(media, *_relative("Straße", "ein Zug"))
    _latents(entry)
    _text(entry)
    shorter = _list(media, *_relative("ein Zug"))
    (dataset,) = discover(_config(shorter), "av").datasets
    assert [item.base for item in dataset.items] == ["ein Zug_00000-017"]
    assert "caches of no item of this dataset are ignored: Straße_00000-017" in caplog.text
    _latents(shorter)
    _text(shorter)
    assert _names(shorter) == [
        "ein Zug_00000-017_0128x0064_ltx2.safetensors",
        "ein Zug_00000-017_0128x0064_ltx2_audio.safetensors",
        "ein Zug_ltx2_te.safetensors",
    ]


def test_training_needs_the_list_but_not_its_media(media: Path) -> None:
    entry = _list(media, *_relative("ein Zug"))
    _latents(entry)
    _text(entry)
    (media / "ein Zug.mp4").unlink()
    assert len(discover(_config(entry), "av")) == 1
    entry.source.unlink()
    assert len(discover(_config(entry), "av")) == 1, "without the list every cache counts"


def test_a_new_caption_is_encoded_again(media: Path) -> None:
    _text(_list(media, *_relative("ein Zug", "Straße")))
    changed = _list(media, {"video_path": "mein Ordner é/ein Zug.mp4", "caption": "new"}, *_relative("Straße"))
    assert _counts(_text(changed, SKIP), "text")[:2] == (1, 1)
    file = SafetensorsFile(changed.cache_directory / "ein Zug_ltx2_te.safetensors")
    assert (file.metadata["caption1"], file.metadata["source_name"]) == ("new", "list.jsonl")


@pytest.mark.parametrize("options", [PLAIN, SKIP], ids=["all", "skip"])
def test_listed_files_that_are_missing_fail_and_the_rest_goes_on(media: Path, options: RunOptions) -> None:
    lines = [*_relative("ein Zug", "Straße", "gone")]
    lines[1]["audio_path"] = "mein Ordner é/Straße.wav"
    sound = write_sound(media / "Straße.wav", tone(1.2))
    entry = _list(media, *lines)
    _latents(entry)
    sound.unlink()
    before = _names(entry)
    summary = _latents(entry, options=options)
    assert summary.finish(allow_failed=False) == 1
    sound_problem, video_problem = summary.failures
    assert sound_problem.endswith("Straße.wav: does not exist (audio_path of list.jsonl:2); correct or remove the line")
    assert video_problem.endswith("gone.mp4: does not exist (video_path of list.jsonl:3); correct or remove the line")
    assert _names(entry) == before, "nothing is deleted after failures"
    # Mode video needs no sound.
    summary = _latents(entry, replace(RECIPE, mode="video"), options)
    assert len(summary.failures) == 1


def test_a_listed_sound_file_wins_over_the_video(media: Path) -> None:
    write_sound(media / "loud.wav", tone(1.2) * 2)
    entry = _list(media, {"video_path": "mein Ordner é/ein Zug.mp4", "audio_path": "mein Ordner é/loud.wav"})
    _latents(_list(media, *_relative("ein Zug")))
    path = entry.cache_directory / "ein Zug_00000-017_0128x0064_ltx2_audio.safetensors"
    own = dict(SafetensorsFile(path).read())["audio_latents_18x16x8_float32"]
    entry = _list(media, {"video_path": "mein Ordner é/ein Zug.mp4", "audio_path": "mein Ordner é/loud.wav"})
    summary = _latents(entry, options=SKIP)
    assert _counts(summary, "video")[:2] == (0, 1)
    assert _counts(summary, "audio")[:2] == (1, 0)
    file = SafetensorsFile(path)
    torch.testing.assert_close(dict(file.read())["audio_latents_18x16x8_float32"], 2 * own, rtol=0.01, atol=0)
    assert file.metadata["source_name"] == "loud.wav"
    assert _counts(_latents(entry, options=SKIP), "audio")[:2] == (0, 1)
    os.utime(media / "loud.wav", ns=(1, 1))
    assert _counts(_latents(entry, options=SKIP), "audio")[:2] == (1, 0)


def test_listed_sound_of_the_video_s_own_name(media: Path) -> None:
    """A file of the same name and another date is not taken for another state of the video."""
    (media / "sound").mkdir()
    write_video(media / "sound" / "Straße.mp4", 30, sound=tone(1.2))
    os.utime(media / "sound" / "Straße.mp4", ns=(1, 1))
    entry = _list(media, {"video_path": "mein Ordner é/Straße.mp4", "audio_path": "mein Ordner é/sound/Straße.mp4"})
    _latents(entry)
    _text(entry)
    training_set = discover(_config(entry), "av")
    assert training_set.problems == ()
    assert next(training_set.items()).audio_steps == 18


def test_images_and_sounds(media: Path) -> None:
    Image.fromarray(np.full((64, 128, 3), 128, np.uint8)).save(media / "a photo.png")
    images = _list(media, {"image_path": "mein Ordner é/a photo.png"}, kind="image")
    assert _latents(images).finish(allow_failed=False) == 0
    assert _names(images) == ["a photo_0128x0064_ltx2.safetensors"]
    write_sound(media / "ton.wav", tone(1.0))
    sounds = _list(media, {"audio_path": "mein Ordner é/ton.wav"}, kind="audio")
    assert _latents(sounds, replace(RECIPE, mode="audio", video_vae=None)).finish(allow_failed=False) == 0
    assert _names(sounds) == ["ton_0128x0064_ltx2.safetensors", "ton_0128x0064_ltx2_audio.safetensors"]


def test_a_directory_of_images_beside_videos(media: Path) -> None:
    folder = media / "frames"
    folder.mkdir()
    for index in range(20):
        Image.fromarray(index_frame(index)).save(folder / f"{index:02d}.png")
    sound = {"audio_path": "mein Ordner é/ton.wav"}
    write_sound(media / "ton.wav", tone(1.2))
    entry = _list(media, {"video_path": "mein Ordner é/frames"} | sound, *_relative("ein Zug"))
    assert _latents(entry).finish(allow_failed=False) == 0
    _text(entry)
    assert _names(entry)[3:] == [
        "frames_00000-017_0128x0064_ltx2.safetensors",
        "frames_00000-017_0128x0064_ltx2_audio.safetensors",
        "frames_ltx2_te.safetensors",
    ]
    assert _counts(_latents(entry, options=SKIP), "video")[:2] == (0, 2)
    (folder / "05.png").rename(folder / "99.png")
    assert _counts(_latents(entry, options=SKIP), "video")[:2] == (1, 1)
    training_set = discover(_config(entry), "av")
    assert sorted(item.base for item in training_set.items() if item.audio_steps) == [
        "ein Zug_00000-017",
        "frames_00000-017",
    ]


def test_folders_are_refused_where_files_are_expected(media: Path) -> None:
    summary = _latents(_list(media, {"image_path": "mein Ordner é"}, kind="image"))
    assert "is not a file (image_path of list.jsonl:1)" in summary.failures[0]
    summary = _latents(_list(media, {"video_path": "mein Ordner é/ein Zug.mp4", "audio_path": "."}))
    assert "is not a file (audio_path of list.jsonl:1)" in summary.failures[0]
