"""Files that cannot be used: each is named once, the rest is cached, and the exit status tells."""

from __future__ import annotations

import logging
import os
import sys
import wave
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_encoders import RECIPE, FakeAudioVAE, FakeTextEncoder, FakeVideoVAE
from media_files import tone, write_sound, write_video
from PIL import Image

from musubi_tuner.caching.latent_outputs import LatentRecipe
from musubi_tuner.caching.latents import RunOptions, cache_latents
from musubi_tuner.caching.text import TextRecipe, cache_text
from musubi_tuner.dataset.clip_sound import AudioSource
from musubi_tuner.dataset.discovery import discover
from musubi_tuner.dataset.entries import DatasetConfig, DatasetEntry
from musubi_tuner.dataset.items import EncoderRecord
from musubi_tuner.dataset.sources import stray_captions
from musubi_tuner.ltx2_cache_latents import main as latents_script
from musubi_tuner.ltx2_cache_text_encoder_outputs import main as text_script

TEXT = TextRecipe("av", EncoderRecord("connectors"), "gemma")
PLAIN = RunOptions(workers=2)


def _caption(media: Path, text: str = "a caption") -> Path:
    media.with_suffix(".txt").write_text(text, encoding="utf-8")
    return media


def _picture(path: Path, width: int = 128, height: int = 64) -> Path:
    Image.fromarray(np.full((height, width, 3), 99, np.uint8)).save(path)
    return path


def _good(folder: Path, kind: str, stem: str = "good") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "video":
        return _caption(write_video(folder / f"{stem}.mp4", 12, sound=tone(0.5)))
    if kind == "image":
        return _caption(_picture(folder / f"{stem}.png"))
    return _caption(write_sound(folder / f"{stem}.wav", tone(1.0)))


def _entry(folder: Path, kind: str = "video", **options) -> DatasetEntry:
    settings = {"resolution": (128, 64), "target_frames": (9,), "cache_directory": folder.parent / "cache"} | options
    return DatasetEntry("datasets[0]", kind, folder, **settings)


def _config(entry: DatasetEntry) -> DatasetConfig:
    return DatasetConfig((entry,), (), Path("data.toml"))


def _cache(entry: DatasetEntry, recipe: LatentRecipe = RECIPE, options: RunOptions = PLAIN):
    recipe = replace(recipe, mode="audio") if entry.kind == "audio" else recipe
    return cache_latents(_config(entry), recipe, video_vae=FakeVideoVAE(), audio_vae=FakeAudioVAE(), options=options)


def _cache_text(entry: DatasetEntry, encoder: FakeTextEncoder | None = None, options: RunOptions = PLAIN):
    return cache_text(_config(entry), TEXT, lambda: encoder or FakeTextEncoder(), options=options)


def _names(entry: DatasetEntry) -> set[str]:
    return {path.name for path in entry.cache_directory.iterdir()}


# --- media that cannot be decoded ---------------------------------------------------------------------------


def _cut(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def _truncated_mp4(folder: Path) -> Path:
    path = write_video(folder / "bad.mp4", 60, size=(320, 192), options={"g": "1"})
    _cut(path, 0.5)  # its index lies at the end
    return path


def _truncated_mkv(folder: Path) -> Path:
    path = write_video(folder / "bad.mkv", 60, size=(320, 192), options={"g": "1"})
    _cut(path, 0.05)
    return path


def _empty(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(b"")
        return folder / name

    return make


def _text_as(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text("this is a text\n" * 50, encoding="utf-8")
        return folder / name

    return make


def _sound_as_video(folder: Path) -> Path:
    return write_sound(folder / "bad.mp4", tone(1.0), codec="aac")


def _video_as_picture(folder: Path) -> Path:
    return write_video(folder / "other.mp4", 9).rename(folder / "bad.png")


def _truncated_png(folder: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 128, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "bad.png")
    _cut(folder / "bad.png", 0.5)
    return folder / "bad.png"


def _sound_without_samples(folder: Path) -> Path:
    with wave.open(str(folder / "bad.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(48_000)
    return folder / "bad.wav"


def _picture_as_sound(folder: Path) -> Path:
    return _picture(folder / "other.png").rename(folder / "bad.mp3")


BAD_FILES = [
    ("video", _truncated_mp4),
    ("video", _truncated_mkv),
    ("video", _empty("bad.mp4")),
    ("video", _text_as("bad.mp4")),
    ("video", _text_as("bad.avi")),
    ("video", _sound_as_video),
    ("image", _empty("bad.png")),
    ("image", _text_as("bad.webp")),
    ("image", _truncated_png),
    ("image", _video_as_picture),
    ("audio", _empty("bad.flac")),
    ("audio", _text_as("bad.wav")),
    ("audio", _sound_without_samples),
    ("audio", _picture_as_sound),
]


@pytest.mark.parametrize(("kind", "make"), BAD_FILES)
def test_a_bad_file_is_named_once_and_the_rest_is_cached(tmp_path: Path, caplog, kind: str, make) -> None:
    folder = tmp_path / "media"
    _good(folder, kind)
    bad = _caption(make(folder))
    _good(folder, kind, "zoo")  # after it in the order of names
    entry = _entry(folder, kind)
    with caplog.at_level(logging.ERROR):
        summary = _cache(entry)
        assert summary.finish(allow_failed=False) == 1
    (failure,) = summary.failures
    assert str(bad) in failure
    assert [line for line in caplog.messages if line.startswith("failed: ")] == [f"failed: {failure}"]
    assert summary.tally("datasets[0]", kind).failed == 1
    assert {name.split("_")[0] for name in _names(entry)} == {"good", "zoo"}
    assert not [name for name in _names(entry) if "partial" in name]
    assert summary.finish(allow_failed=True) == 0


@pytest.mark.skipif(sys.platform == "win32" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="may read all")
def test_a_file_without_the_right_to_read_it(tmp_path: Path) -> None:
    folder = tmp_path / "media"
    _good(folder, "video")
    locked = _good(folder, "video", "locked")
    locked.chmod(0)
    try:
        summary = _cache(_entry(folder))
    finally:
        locked.chmod(0o600)
    (failure,) = summary.failures
    assert "locked.mp4" in failure
    assert "Permission denied" in failure


def test_a_link_that_leads_nowhere_is_named_and_the_rest_is_cached(tmp_path: Path, caplog) -> None:
    folder = tmp_path / "media"
    _good(folder, "video")
    try:
        _caption(folder / "gone.mp4").symlink_to(tmp_path / "elsewhere.mp4")
    except OSError:
        pytest.skip("no right to make links")
    entry = _entry(folder)
    summary = _cache(entry)
    assert summary.finish(allow_failed=False) == 1
    (failure,) = summary.failures
    assert "gone.mp4" in failure
    assert "No such file" in failure
    assert {name.split("_")[0] for name in _names(entry)} == {"good"}
    assert stray_captions(entry) == []


def test_a_video_of_another_container_than_its_name_says_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "media"
    good = _good(folder, "video")
    good.rename(good.with_suffix(".avi"))
    assert _cache(_entry(folder)).finish(allow_failed=False) == 0


# --- pictures of any size -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(101, 77), (33, 500), (1, 1), (129, 65), (4000, 33)])
def test_odd_sizes_are_brought_to_the_resolution(tmp_path: Path, size: tuple[int, int]) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    _caption(_picture(folder / "odd.png", *size))
    entry = _entry(folder, "image")
    assert _cache(entry).finish(allow_failed=False) == 0
    assert _names(entry) == {f"odd_{size[0]:04d}x{size[1]:04d}_ltx2.safetensors"}


def test_a_picture_smaller_than_every_bucket_fails_alone(tmp_path: Path) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    _caption(_picture(folder / "tiny.png", 31, 40))
    _caption(_picture(folder / "odd.png", 101, 77))
    entry = _entry(folder, "image", resolution=(256, 256), enable_bucket=True, bucket_no_upscale=True)
    summary = _cache(entry)
    assert summary.finish(allow_failed=False) == 1
    (failure,) = summary.failures
    assert "tiny.png: 31x40 is smaller than the smallest bucket" in failure
    assert _names(entry) == {"odd_0101x0077_ltx2.safetensors"}


# --- captions -----------------------------------------------------------------------------------------------


def test_items_without_a_caption_are_counted_and_the_status_tells(tmp_path: Path, caplog) -> None:
    folder = tmp_path / "media"
    for name in ("good", "latin", "none"):
        _good(folder, "video", name)
    (folder / "latin.txt").write_bytes("Käse".encode("latin-1"))
    (folder / "none.txt").unlink()
    entry = _entry(folder)
    for summary, modality in ((_cache(entry), "video"), (_cache_text(entry), "text")):
        assert summary.tally("datasets[0]", modality).no_caption == 2
        assert summary.tally("datasets[0]", modality).encoded == 1
        with caplog.at_level(logging.INFO):
            assert summary.finish(allow_failed=False) == 1
            assert summary.finish(allow_failed=True) == 0
    assert "2 items without a caption left out: latin.mp4 (caption file latin.txt is not UTF-8" in caplog.text
    assert {name.split("_")[0] for name in _names(entry)} == {"good"}


def test_a_caption_that_is_cut_off_is_named(tmp_path: Path, caplog) -> None:
    folder = tmp_path / "media"
    _good(folder, "video")
    _caption(folder / "good.mp4", "word " * 10_000)
    _good(folder, "video", "short")
    summary = _cache_text(_entry(folder))
    with caplog.at_level(logging.WARNING):
        assert summary.finish(allow_failed=False) == 0
    assert "1 caption cut off: good.mp4 (the last 9000 tokens)" in caplog.text


# --- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["two words", "Füße 東京", "a[0]b", "100%d done", "x_00000-009", "it's #1; a&b"])
def test_any_name_is_cached_and_found_again(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name / "media"
    media = _good(folder, "video", name)
    entry = _entry(folder)
    assert _cache(entry).finish(allow_failed=False) == 0
    assert _cache_text(entry).finish(allow_failed=False) == 0
    (item,) = discover(_config(entry), "av").items()
    assert item.base == f"{media.stem}_00000-009"
    assert item.audio is not None
    again = _cache(entry, options=RunOptions(skip_existing=True))
    assert (again.tally("datasets[0]", "video").current, again.tally("datasets[0]", "audio").current) == (1, 1)


# --- sound --------------------------------------------------------------------------------------------------


def test_a_wave_file_that_was_cut_off_is_named(tmp_path: Path, caplog) -> None:
    folder = tmp_path / "media"
    path = _good(folder, "audio")
    _cut(path, 0.5)
    with caplog.at_level(logging.WARNING):
        assert _cache(_entry(folder, "audio")).finish(allow_failed=False) == 0
    assert "good.wav: ends at 0.50 s of 1.00 s; the file may be truncated" in caplog.text


def test_the_sound_of_a_clip_that_ends_early_is_told(tmp_path: Path, caplog) -> None:
    folder = tmp_path / "media"
    _good(folder, "video")
    _cut(write_sound(folder / "good.wav", tone(0.36)), 0.5)  # of a clip of 0.36 s
    summary = _cache(_entry(folder), replace(RECIPE, audio_source=AudioSource("audio_files")))
    with caplog.at_level(logging.WARNING):
        assert summary.finish(allow_failed=False) == 0
    assert "1 clip whose sound ends early, silent from there: good_00000-009 (its last 0.18 s)" in caplog.text


def test_a_video_whose_sound_has_no_sample_counts_as_silent(tmp_path: Path) -> None:
    folder = tmp_path / "media"
    _good(folder, "video")
    _sound_without_samples(folder).rename(folder / "good.wav")
    summary = _cache(_entry(folder), replace(RECIPE, audio_source=AudioSource("audio_files")))
    assert summary.finish(allow_failed=False) == 0
    assert summary.tally("datasets[0]", "audio").no_audio == 1
    assert summary.silent == ["good_00000-009 (the audio stream is empty)"]


# --- short videos -------------------------------------------------------------------------------------------


def test_videos_shorter_than_every_clip_are_counted(tmp_path: Path, caplog) -> None:
    folder = tmp_path / "media"
    _good(folder, "video")
    _caption(write_video(folder / "brief.mp4", 5))
    summary = _cache(_entry(folder))
    assert summary.tally("datasets[0]", "video").too_short == 1
    with caplog.at_level(logging.WARNING):
        assert summary.finish(allow_failed=False) == 0
    assert "1 video shorter than every clip: brief.mp4" in caplog.text


# --- --strict -----------------------------------------------------------------------------------------------


def test_a_strict_run_ends_at_the_first_failure(tmp_path: Path, caplog) -> None:
    folder = tmp_path / "media"
    for name in ("a", "b", "d", "e"):
        _good(folder, "video", name)
    _caption(_text_as("c.mp4")(folder))
    _caption(_text_as("f.mp4")(folder))
    entry = _entry(folder)
    summary = _cache(entry, options=RunOptions(workers=1, strict=True))
    assert [failure.split(":")[0] for failure in summary.failures] == [str(folder / "c.mp4")]
    assert {name.split("_")[0] for name in _names(entry)} == {"a", "b"}
    with caplog.at_level(logging.ERROR):
        assert summary.finish(allow_failed=False) == 1
    assert "--skip_existing continues from here" in caplog.text


def test_a_strict_run_over_captions_ends_at_the_first_failure(tmp_path: Path) -> None:
    folder = tmp_path / "media"
    for name in ("a", "b", "c"):
        _caption(_good(folder, "image", name), f"caption of {name}")
    encoder = FakeTextEncoder()
    encoder.bad = {"caption of b"}
    entry = _entry(folder, "image", batch_size=3)
    summary = _cache_text(entry, encoder, RunOptions(strict=True))
    assert len(summary.failures) == 1
    assert _names(entry) == {"a_ltx2_te.safetensors"}


# --- refused before any work --------------------------------------------------------------------------------


def _script_files(tmp_path: Path, toml: str) -> list[str]:
    """Flags with a configuration and a checkpoint that would fail as soon as it is opened."""
    (tmp_path / "data.toml").write_text(toml, encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"")
    return ["--dataset_config", str(tmp_path / "data.toml"), "--ltx2_checkpoint", str(tmp_path / "model.safetensors")]


_PLAIN_TOML = '[[datasets]]\nimage_directory = "media"\ncache_directory = "cache"\nresolution = 64\n'
CONFIGURATIONS = [
    (_PLAIN_TOML + _PLAIN_TOML, "datasets[1].cache_directory: is also that of datasets[0]"),
    (
        _PLAIN_TOML + _PLAIN_TOML.replace("[[datasets", "[[validation_datasets"),
        "validation_datasets[0].cache_directory: is also that of datasets[0]",
    ),
    (_PLAIN_TOML, "one.jpg and one.png would share a cache file"),
]


@pytest.mark.parametrize(("toml", "message"), CONFIGURATIONS)
@pytest.mark.parametrize("script", [latents_script, text_script])
def test_what_the_configuration_shows_is_refused_before_any_work(
    tmp_path: Path, capsys, script, toml: str, message: str
) -> None:
    folder = tmp_path / "media"
    _good(folder, "image", "one")
    if "one.jpg" in message:
        _picture(folder / "one.jpg")
    flags = _script_files(tmp_path, toml)
    with pytest.raises(SystemExit) as stop:
        script([*flags, *(["--gemma_root", str(tmp_path)] if script is text_script else [])])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("flag", ["--strict", "--strict_captions"])
@pytest.mark.parametrize("script", [latents_script, text_script])
def test_strict_captions_are_refused_before_any_work_with_up_to_20_names(
    tmp_path: Path, capsys, script, flag: str
) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    for index in range(23):
        _picture(folder / f"{index:02d}.png")
    flags = [*_script_files(tmp_path, _PLAIN_TOML), flag]
    with pytest.raises(SystemExit) as stop:
        script([*flags, *(["--gemma_root", str(tmp_path)] if script is text_script else [])])
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert "23 items lack a caption" in shown
    assert shown.count("no caption file") == 20
    assert "and 3 more" in shown
    assert not (tmp_path / "cache").exists()


def test_strict_and_allow_failed_exclude_each_other(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        latents_script([*_script_files(tmp_path, _PLAIN_TOML), "--strict", "--allow_failed"])
    assert "--strict and --allow_failed exclude each other" in capsys.readouterr().err


def test_captions_without_media_hint_at_another_extension(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "media"
    _good(folder, "image")
    for name in ("clip.mts", "clip.txt"):
        (folder / name).write_bytes(b"x")
    with pytest.raises(SystemExit):
        latents_script(_script_files(tmp_path, _PLAIN_TOML))
    assert "captions without a file that is used: clip.txt" in capsys.readouterr().err


def test_the_caption_field_of_the_command_line_is_the_default_of_lists(tmp_path: Path, capsys) -> None:
    _good(tmp_path, "image", "one")
    (tmp_path / "list.jsonl").write_text('{"image_path": "one.png", "text": "a"}\n', encoding="utf-8")
    listed = '[[datasets]]\nimage_jsonl_file = "list.jsonl"\ncache_directory = "cache"\nresolution = 64\n'
    flags = ["--debug_mode", "console", "--dataset_config"]
    (tmp_path / "a.toml").write_text(listed, encoding="utf-8")
    latents_script([*flags, str(tmp_path / "a.toml"), "--caption_field", "text"])
    (tmp_path / "b.toml").write_text(listed + 'caption_field = "text"\n', encoding="utf-8")
    latents_script([*flags, str(tmp_path / "b.toml"), "--caption_field", "other"])
    with pytest.raises(SystemExit):
        latents_script([*flags, str(tmp_path / "a.toml")])
    assert "caption is missing" in capsys.readouterr().err
