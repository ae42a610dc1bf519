import errno
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_encoders import CHANNELS, RECIPE, FakeAudioVAE, FakeVideoVAE
from media_files import tone, write_sound, write_video
from PIL import Image

from musubi_tuner.caching.latent_outputs import LatentRecipe, VirtualGeometry
from musubi_tuner.caching.latents import cache_latents
from musubi_tuner.caching.pipeline import RunOptions, prepare_directories
from musubi_tuner.common.errors import UserError
from musubi_tuner.common.safetensors_io import SafetensorsFile, save_safetensors
from musubi_tuner.dataset.cache import read_audio, read_latents, read_virtual_grid
from musubi_tuner.dataset.clip_sound import AudioSource
from musubi_tuner.dataset.entries import DatasetConfig, DatasetEntry
from musubi_tuner.dataset.items import EncoderRecord

PLAIN = RunOptions(workers=2)
SKIP = RunOptions(skip_existing=True, workers=2)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Two clips with sound and one without, 30 frames each, with captions."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for name, sound in (("a", tone(1.2)), ("b", tone(1.2)), ("mute", None)):
        write_video(folder / f"{name}.mp4", 30, sound=sound)
        (folder / f"{name}.txt").write_text(f"caption {name}", encoding="utf-8")
    return folder


def _entry(source: Path, **options) -> DatasetEntry:
    defaults = {"kind": "video", "resolution": (128, 64), "target_frames": (17,), "batch_size": 2}
    return DatasetEntry("datasets[0]", source=source, cache_directory=source.parent / "cache", **(defaults | options))


def _run(entry: DatasetEntry, recipe: LatentRecipe = RECIPE, options: RunOptions = PLAIN, **vaes):
    config = DatasetConfig((entry,), (), Path("data.toml"))
    encoders = {"video_vae": FakeVideoVAE(), "audio_vae": FakeAudioVAE()} | vaes
    return cache_latents(config, recipe, options=options, **encoders)


def _counts(summary, modality: str) -> tuple[int, int, int, int]:
    tally = summary.tally("datasets[0]", modality)
    return tally.encoded, tally.current, tally.failed, tally.no_audio


def _names(entry: DatasetEntry) -> list[str]:
    return sorted(path.name for path in entry.cache_directory.iterdir())


def test_videos_with_sound(videos: Path, caplog) -> None:
    entry = _entry(videos)
    with caplog.at_level(logging.INFO):
        summary = _run(entry)
        assert summary.finish(allow_failed=False) == 0
    assert _counts(summary, "video") == (3, 0, 0, 0)
    assert _counts(summary, "audio") == (2, 0, 0, 1)
    assert "1 clip without sound: mute_00000-017" in caplog.text
    assert _names(entry) == [
        "a_00000-017_0128x0064_ltx2.safetensors",
        "a_00000-017_0128x0064_ltx2_audio.safetensors",
        "b_00000-017_0128x0064_ltx2.safetensors",
        "b_00000-017_0128x0064_ltx2_audio.safetensors",
        "mute_00000-017_0128x0064_ltx2.safetensors",
    ]
    latents = SafetensorsFile(entry.cache_directory / "a_00000-017_0128x0064_ltx2.safetensors")
    assert {k: i.shape for k, i in latents.tensors.items()} == {"latents_3x2x4_float32": (CHANNELS, 3, 2, 4)}
    metadata = latents.metadata
    stat = (videos / "a.mp4").stat()
    assert metadata.pop("settings")
    assert len(metadata.pop("cache_key")) == 64
    assert metadata == {
        **{"architecture": "ltx2_v1", "format_version": "1.0.1", "width": "128", "height": "64"},
        **{"frame_count": "17", "target_fps": "25.0", "bucket": "128x64", "start_frame": "0"},
        **{"frame_extraction": "head", "preparation": "2"},
        **{"source_name": "a.mp4", "source_size": str(stat.st_size), "source_mtime_ns": str(stat.st_mtime_ns)},
        "encoder_id": "video id",
    }
    audio = SafetensorsFile(entry.cache_directory / "a_00000-017_0128x0064_ltx2_audio.safetensors")
    assert audio.metadata["encoder_id"] == "audio id"
    assert {"target_fps", "bucket", "start_frame", "source_name", "cache_key"} <= set(audio.metadata)
    # 17 frames at 25 fps are 0.68 s: 10 880 samples, 69 mel frames, 18 steps.
    assert read_audio(audio.path)[0].shape == (8, 18, 16)


def test_mode_video_makes_no_audio_and_keeps_that_of_mode_av(videos: Path) -> None:
    entry = _entry(videos)
    _run(entry)
    summary = _run(entry, replace(RECIPE, mode="video"), SKIP, audio_vae=None)
    assert _counts(summary, "video") == (0, 3, 0, 0)
    assert len(_names(entry)) == 5


def test_mode_av_adds_sound_to_latents_of_mode_video(videos: Path) -> None:
    entry = _entry(videos)
    _run(entry, replace(RECIPE, mode="video"), audio_vae=None)
    assert len(_names(entry)) == 3
    vae = FakeVideoVAE()
    summary = _run(entry, RECIPE, SKIP, video_vae=vae)
    assert vae.batches == []
    assert _counts(summary, "video") == (0, 3, 0, 0)
    assert _counts(summary, "audio") == (2, 0, 0, 1)


def test_images_keep_their_size_in_the_name_and_have_no_sound(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(np.full((100, 150, 3), 128, np.uint8)).save(folder / "photo.png")
    (folder / "photo.txt").write_text("a photo", encoding="utf-8")
    entry = _entry(folder, kind="image")
    summary = _run(entry)
    assert summary.finish(allow_failed=False) == 0
    assert _names(entry) == ["photo_0150x0100_ltx2.safetensors"]
    file = SafetensorsFile(entry.cache_directory / "photo_0150x0100_ltx2.safetensors")
    assert file.metadata["bucket"] == "128x64"
    assert "frame_count" not in file.metadata
    assert read_latents(file.path).shape == (CHANNELS, 1, 2, 4)
    assert read_latents(file.path).mean().item() == pytest.approx(128 / 127.5 - 1, abs=1e-3)
    assert _counts(_run(entry, options=SKIP), "image") == (0, 1, 0, 0)


def test_mode_audio_writes_a_placeholder_and_the_sound(tmp_path: Path) -> None:
    folder = tmp_path / "sounds"
    folder.mkdir()
    write_sound(folder / "a.wav", tone(7.3))
    (folder / "a.txt").write_text("a tone", encoding="utf-8")
    entry = _entry(folder, kind="audio", resolution=(768, 512))
    recipe = replace(RECIPE, mode="audio", video_dtype=torch.float16, audio_dtype=torch.float16)
    summary = _run(entry, recipe, video_vae=None)
    assert summary.finish(allow_failed=False) == 0
    assert _counts(summary, "audio") == (1, 0, 0, 0)
    assert _names(entry) == ["a_0768x0512_ltx2.safetensors", "a_0768x0512_ltx2_audio.safetensors"]
    placeholder, sound = (entry.cache_directory / name for name in _names(entry))
    assert read_virtual_grid(placeholder) == (23, 2, 2)
    assert "latents_1x1x1_float16" in SafetensorsFile(placeholder).tensors
    assert list(SafetensorsFile(sound).tensors) == ["audio_lengths_int32", "audio_latents_183x16x8_float16"]
    assert _counts(_run(entry, recipe, SKIP, video_vae=None), "audio") == (0, 1, 0, 0)


@pytest.mark.parametrize(
    ("geometry", "seconds", "grid"),
    [
        (VirtualGeometry(), 7.3, (23, 2, 2)),
        (VirtualGeometry(), 0.01, (1, 2, 2)),
        (VirtualGeometry(sequence_resolution=32), 1.0, (4, 1, 1)),
        (VirtualGeometry(sequence_resolution=0), 1.0, (4, 16, 24)),
        (VirtualGeometry(sequence_resolution=0, target_resolution=256), 1.0, (4, 8, 8)),
        (VirtualGeometry(fps=50), 1.0, (7, 2, 2)),
    ],
)
def test_virtual_geometry(geometry: VirtualGeometry, seconds: float, grid: tuple[int, int, int]) -> None:
    assert geometry.grid(seconds, (768, 512)) == grid


def test_skip_existing_neither_decodes_nor_encodes_what_is_current(videos: Path, monkeypatch) -> None:
    entry = _entry(videos)
    _run(entry)
    monkeypatch.setattr("musubi_tuner.caching.latents.iter_clips", None)
    summary = _run(entry, options=SKIP)
    assert summary.finish(allow_failed=False) == 0
    assert _counts(summary, "video") == (0, 3, 0, 0)
    assert _counts(summary, "audio") == (0, 2, 0, 1)


def test_without_skip_existing_all_is_made_again_and_the_flag_suggested(videos: Path, caplog) -> None:
    entry = _entry(videos)
    _run(entry)
    with caplog.at_level(logging.INFO):
        summary = _run(entry)
        summary.finish(allow_failed=False)
    assert _counts(summary, "video") == (3, 0, 0, 0)
    assert "--skip_existing keeps such files" in caplog.text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"recipe": replace(RECIPE, video_vae=EncoderRecord("other"))}, "another checkpoint"),
        ({"recipe": replace(RECIPE, video_vae=EncoderRecord("video id", "its own"))}, "another checkpoint"),
        ({"recipe": replace(RECIPE, video_dtype=torch.bfloat16)}, "changed: dtype"),
        ({"target_fps": 24.0}, "changed: target_fps"),
        ({"source_fps": 25.0}, "changed: source_fps"),
    ],
)
def test_what_changed_is_made_again_and_said(videos: Path, change: dict, reason: str) -> None:
    _run(_entry(videos))
    recipe = change.pop("recipe", RECIPE)
    summary = _run(_entry(videos, **change), recipe, SKIP)
    assert _counts(summary, "video") == (3, 0, 0, 0)
    assert summary.reasons[reason] >= 3


def test_a_new_resolution_does_not_keep_image_latents(tmp_path: Path) -> None:
    # Image names hold the original size, so the name alone would say nothing.
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(np.zeros((64, 128, 3), np.uint8)).save(folder / "p.png")
    (folder / "p.txt").write_text("p", encoding="utf-8")
    _run(_entry(folder, kind="image"))
    summary = _run(_entry(folder, kind="image", resolution=(64, 64)), RECIPE, SKIP)
    assert _counts(summary, "image") == (1, 0, 0, 0)
    assert summary.reasons == {"changed: bucket": 1}


def test_a_replaced_source_is_made_again(videos: Path) -> None:
    entry = _entry(videos)
    _run(entry)
    write_video(videos / "a.mp4", 40, sound=tone(1.6))
    summary = _run(entry, options=SKIP)
    assert _counts(summary, "video") == (1, 2, 0, 0)
    assert summary.reasons == {"the source file changed": 2}


def test_a_clip_that_lost_its_sound_loses_its_audio_cache(videos: Path) -> None:
    entry = _entry(videos)
    _run(entry)
    write_video(videos / "a.mp4", 30)
    _run(entry, options=SKIP)
    assert "a_00000-017_0128x0064_ltx2_audio.safetensors" not in _names(entry)


def test_one_bad_file_does_not_end_the_run(videos: Path, caplog) -> None:
    (videos / "broken.mp4").write_bytes((videos / "a.mp4").read_bytes()[:700])
    (videos / "broken.txt").write_text("broken", encoding="utf-8")
    entry = _entry(videos)
    with caplog.at_level(logging.WARNING):
        summary = _run(entry)
        assert summary.finish(allow_failed=False) == 1
    assert _counts(summary, "video") == (3, 0, 1, 0)
    assert len(summary.failures) == 1
    assert f"failed: {videos / 'broken.mp4'}: cannot be decoded" in caplog.text
    assert "gave no clip" not in caplog.text  # that is for short videos
    assert not [name for name in _names(entry) if name.startswith("broken")]


def test_a_clip_whose_encoding_fails_is_found_within_its_batch(videos: Path) -> None:
    vae = FakeVideoVAE()
    vae.largest_batch = 1
    summary = _run(_entry(videos), video_vae=vae)
    assert _counts(summary, "video") == (3, 0, 0, 0)
    assert [shape[0] for shape in vae.batches] == [2, 1, 1, 1]


def test_nan_fails_the_item_and_leaves_no_file(videos: Path) -> None:
    vae = FakeVideoVAE()
    vae.poison = True
    summary = _run(_entry(videos), replace(RECIPE, mode="video"), video_vae=vae)
    assert _counts(summary, "video") == (0, 0, 3, 0)
    assert "NaN or infinity" in summary.failures[0]
    assert not list((videos.parent / "cache").glob("*"))


def test_latents_are_not_written_when_the_sound_fails(videos: Path) -> None:
    vae = FakeAudioVAE()
    vae.fails = True
    entry = _entry(videos)
    summary = _run(entry, audio_vae=vae)
    assert _counts(summary, "audio") == (0, 0, 2, 1)
    assert _names(entry) == ["mute_00000-017_0128x0064_ltx2.safetensors"]


def test_an_interrupted_run_continues(videos: Path) -> None:
    entry = _entry(videos, batch_size=1)
    vae = FakeVideoVAE()

    class Interrupting(FakeVideoVAE):
        def encode(self, pixels):
            if self.batches:
                raise KeyboardInterrupt
            return super().encode(pixels)

    with pytest.raises(KeyboardInterrupt):
        _run(entry, video_vae=Interrupting())
    assert "a_00000-017_0128x0064_ltx2.safetensors" in _names(entry)
    assert not [name for name in _names(entry) if "partial" in name]
    summary = _run(entry, options=SKIP, video_vae=vae)
    assert _counts(summary, "video") == (2, 1, 0, 0)
    assert len(vae.batches) == 2


def test_clips_of_equal_shape_are_encoded_together(videos: Path) -> None:
    vae = FakeVideoVAE()
    _run(_entry(videos, batch_size=8, target_frames=(9, 17)), video_vae=vae)
    assert sorted(shape[0] for shape in vae.batches) == [3, 3]
    limited = FakeVideoVAE()
    _run(_entry(videos, batch_size=8), options=RunOptions(batch_size=1), video_vae=limited)
    assert [shape[0] for shape in limited.batches] == [1, 1, 1]


def test_orphans_are_deleted_unless_kept_or_something_failed(videos: Path) -> None:
    entry = _entry(videos, target_frames=(9, 17))
    _run(entry)
    foreign = entry.cache_directory / "notes.safetensors"
    foreign.write_bytes(b"x")
    text = entry.cache_directory / "a_ltx2_te.safetensors"
    text.write_bytes(b"x")
    everything = _names(entry)
    shorter = _entry(videos, target_frames=(9,))

    _run(shorter, options=RunOptions(keep_cache=True))
    assert _names(entry) == everything
    bad = videos / "bad.mp4"
    bad.write_bytes(b"no video")
    bad.with_suffix(".txt").write_text("bad", encoding="utf-8")
    _run(shorter)
    assert _names(entry) == everything
    bad.unlink()
    _run(shorter)
    assert _names(entry) == [name for name in everything if "-017" not in name]
    assert foreign.exists()
    assert text.exists()


def test_short_videos_are_counted_by_length(videos: Path, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        summary = _run(_entry(videos, target_frames=(17, 49)))
        assert summary.finish(allow_failed=False) == 0
    assert "3 of 3 videos gave no clip of 49 frames" in caplog.text
    summary = _run(_entry(videos, target_frames=(49,)))
    assert summary.finish(allow_failed=False) == 1
    assert summary.empty == ["datasets[0]"]


def test_a_missing_caption_is_named_and_protects_old_caches(videos: Path, caplog) -> None:
    entry = _entry(videos)
    _run(entry)
    (videos / "b.txt").unlink()
    with caplog.at_level(logging.WARNING):
        _run(entry)
    assert "b.mp4: no caption file b.txt" in caplog.text
    assert len(_names(entry)) == 5


def test_sound_from_files(videos: Path, tmp_path: Path) -> None:
    sounds = tmp_path / "sounds"
    sounds.mkdir()
    write_sound(sounds / "mute.wav", tone(2.0))
    recipe = replace(RECIPE, audio_source=AudioSource("audio_files", sounds))
    summary = _run(_entry(videos), recipe)
    assert _counts(summary, "audio") == (1, 0, 0, 2)
    summary = _run(_entry(videos), recipe, SKIP)
    assert _counts(summary, "audio") == (0, 1, 0, 2)
    write_sound(sounds / "mute.wav", tone(3.0))
    assert _counts(_run(_entry(videos), recipe, SKIP), "audio") == (1, 0, 0, 2)
    (sounds / "mute.wav").unlink()
    assert _counts(_run(_entry(videos), recipe, SKIP), "audio") == (0, 0, 0, 3)
    assert not [name for name in _names(_entry(videos)) if "audio" in name]


def test_chunks_are_all_cached_and_kept(videos: Path) -> None:
    entry = _entry(videos, frame_extraction="chunk", target_frames=(9,))
    summary = _run(entry)
    assert _counts(summary, "video") == (9, 0, 0, 0)  # 3 of each 30 frames
    assert "a_00018-009_0128x0064_ltx2.safetensors" in _names(entry)
    assert _counts(_run(entry, options=SKIP), "video") == (0, 9, 0, 0)


def test_kept_clips_learn_of_another_extraction(videos: Path, caplog) -> None:
    """Else training could not tell a video that gives one clip from one that lacks its others."""
    _run(_entry(videos))
    chunks = _entry(videos, frame_extraction="chunk")  # one chunk of 17 in 30 frames: nothing to encode
    vae = FakeVideoVAE()
    before = {name: read_latents(chunks.cache_directory / name) for name in _names(chunks) if "audio" not in name}
    assert _counts(_run(chunks, options=SKIP, video_vae=vae), "video") == (0, 3, 0, 0)
    assert vae.batches == []
    for name, latents in before.items():
        file = SafetensorsFile(chunks.cache_directory / name)
        assert file.metadata["frame_extraction"] == "chunk"
        assert file.metadata["frame_count"] == "17"
        assert torch.equal(read_latents(file.path), latents)
    times = [(chunks.cache_directory / name).stat().st_mtime_ns for name in before]
    _run(chunks, options=SKIP)
    assert [(chunks.cache_directory / name).stat().st_mtime_ns for name in before] == times


def test_a_full_disk_ends_the_run_with_one_message(videos: Path, monkeypatch) -> None:
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("musubi_tuner.caching.latents.write_latents", full)
    with pytest.raises(UserError, match="No space left on device; make room .* continue with --skip_existing"):
        _run(_entry(videos))


def test_what_a_killed_run_left_half_written_goes(videos: Path) -> None:
    entry = _entry(videos)
    entry.cache_directory.mkdir()
    leftover = entry.cache_directory / "a_00000-009_0064x0032_ltx2_audio.partial-0123abcd.safetensors"
    text = entry.cache_directory / "a_ltx2_te.partial-0123abcd.safetensors"  # of the other script
    recent = leftover.with_name("a_00000-009_0064x0032_ltx2.partial-4567abcd.safetensors")  # a run at work now
    for path in (leftover, text, recent):
        path.write_bytes(b"half")
    for path in (leftover, text):
        os.utime(path, (1, 1))
    _run(entry)
    assert (leftover.exists(), text.exists(), recent.exists()) == (False, True, True)


def test_two_runs_in_one_folder_at_once_do_not_disturb_each_other(videos: Path) -> None:
    entry = _entry(videos)
    config = DatasetConfig((entry,), (), Path("data.toml"))
    with ThreadPoolExecutor(4) as pool:
        prepared = [pool.submit(prepare_directories, config) for _ in range(40)]
        assert [future.result() for future in prepared] == [None] * 40
        runs = [pool.submit(_run, entry) for _ in range(4)]
        assert [run.result().finish(allow_failed=False) for run in runs] == [0] * 4
    assert not [name for name in _names(entry) if "partial" in name]


def test_caches_of_the_earlier_preparation_are_kept_and_told_of_once(videos: Path, caplog) -> None:
    entry = _entry(videos)
    _run(entry)
    paths = sorted(entry.cache_directory.glob("*_ltx2.safetensors"))
    for path in paths:
        file = SafetensorsFile(path)
        metadata = {key: value for key, value in file.metadata.items() if key != "preparation"}
        assert len(metadata) == len(file.metadata) - 1
        save_safetensors(dict(file.read()), path, metadata)
    dates = [path.stat().st_mtime_ns for path in paths]
    with caplog.at_level(logging.INFO):
        assert _run(entry, options=SKIP).finish(allow_failed=False) == 0
    assert [path.stat().st_mtime_ns for path in paths] == dates
    assert caplog.text.count("kept from an earlier version") == 1
    assert f"{len(paths)} caches kept" in caplog.text or f"{len(paths)} cache kept" in caplog.text
    caplog.clear()
    _run(entry)
    with caplog.at_level(logging.INFO):
        _run(entry, options=SKIP).finish(allow_failed=False)
    assert "earlier version" not in caplog.text


def test_a_video_that_fails_does_not_hide_a_short_one(tmp_path: Path, caplog) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    write_video(folder / "short.mp4", 5)
    good = write_video(folder / "broken.mkv", 60, size=(320, 192), options={"g": "1"})
    data = bytearray(good.read_bytes())
    good.write_bytes(data[: len(data) * 3 // 4])  # the first clips are intact
    for path in (folder / "short.txt", folder / "broken.txt"):
        path.write_text("x", encoding="utf-8")
    entry = DatasetEntry(
        "d", "video", folder, tmp_path / "cache", (64, 32), target_frames=(9,), frame_extraction="chunk"
    )
    with caplog.at_level(logging.WARNING):
        summary = _run(entry)
    assert summary.failures
    assert list(entry.cache_directory.glob("broken_00000-009*"))
    assert "1 of 1 video gave no clip of 9 frames" in caplog.text


def test_enlarged_frames_can_be_written_to(videos: Path, recwarn) -> None:
    # PyTorch warns, with a line of our source, of arrays that cannot.
    _run(_entry(videos, resolution=(256, 128)))
    assert not [w for w in recwarn if "not writable" in str(w.message)]
