import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_encoders import CHANNELS, FakeAudioVAE, FakeVideoVAE
from fake_encoders import RECIPE as AV
from media_files import index_frame, read_index, tone, write_sound, write_video
from PIL import Image

from musubi_tuner.caching.latent_outputs import LatentRecipe
from musubi_tuner.caching.latents import cache_latents
from musubi_tuner.caching.pipeline import RunOptions, prepare_directories
from musubi_tuner.common.errors import UserError
from musubi_tuner.common.safetensors_io import SafetensorsFile
from musubi_tuner.dataset.buckets import audio_latent_length
from musubi_tuner.dataset.cache import read_audio, read_latents
from musubi_tuner.dataset.entries import DatasetConfig, DatasetEntry
from musubi_tuner.dataset.items import EncoderRecord
from musubi_tuner.dataset.references import read_reference

RECIPE = replace(AV, mode="video", audio_vae=None)
PLAIN = RunOptions(workers=2)
SKIP = RunOptions(skip_existing=True, workers=2)


class Recorder(FakeVideoVAE):
    """Keeps the pixels that it is given, uint8 [F, H, W, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[np.ndarray] = []

    def encode(self, pixels):
        self.seen += [((p.permute(1, 2, 3, 0) + 1) * 127.5).round().to(torch.uint8).numpy() for p in pixels]
        return super().encode(pixels)


def _grey(level: int, size: tuple[int, int] = (128, 64)) -> np.ndarray:
    return np.full((size[1], size[0], 3), level, np.uint8)


def _image(path: Path, level: int = 200, size: tuple[int, int] = (128, 64)) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(_grey(level, size)).save(path)
    return path


def _videos(folder: Path, *names: str, frames: int = 20, **options) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        write_video(folder / f"{name}.mp4", frames, **options)
        (folder / f"{name}.txt").write_text(f"caption {name}", encoding="utf-8")
    return folder


def _entry(tmp_path: Path, **options) -> DatasetEntry:
    defaults = {
        **{"kind": "video", "source": tmp_path / "videos", "resolution": (128, 64), "target_frames": (9,)},
        **{"reference_directory": tmp_path / "refs", "reference_cache_directory": tmp_path / "ref_cache"},
    }
    entry = DatasetEntry("datasets[0]", cache_directory=tmp_path / "cache", **(defaults | options))
    for name in ("reference_directory", "reference_audio_directory"):
        if getattr(entry, name) is not None:
            getattr(entry, name).mkdir(exist_ok=True)
    return entry


def _run(entry: DatasetEntry, recipe: LatentRecipe = RECIPE, options: RunOptions = PLAIN, **vaes):
    config = DatasetConfig((entry,), (), Path("data.toml"))
    prepare_directories(config)
    encoders = {"video_vae": FakeVideoVAE(), "audio_vae": FakeAudioVAE()} | vaes
    return cache_latents(config, recipe, options=options, **encoders)


def _counts(summary, role: str) -> tuple[int, int, int]:
    tally = summary.tally("datasets[0]", role)
    return tally.encoded, tally.current, tally.failed


def _names(directory: Path | None) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def _times(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}


# --- names and content --------------------------------------------------------------------------------------


def test_an_image_reference_has_the_name_of_its_target(tmp_path: Path) -> None:
    _videos(tmp_path / "videos", "a")
    entry = _entry(tmp_path, reference_frames=9, reference_downscale=2)
    path = _image(tmp_path / "refs" / "a.png")
    summary = _run(entry)
    assert summary.finish(allow_failed=False) == 0
    assert _counts(summary, "reference") == (1, 0, 0)
    assert _names(entry.reference_cache_directory) == ["a_00000-009_0128x0064_ltx2.safetensors"]
    assert _names(entry.cache_directory) == ["a_00000-009_0128x0064_ltx2.safetensors"]
    file = SafetensorsFile(entry.reference_cache_directory / "a_00000-009_0128x0064_ltx2.safetensors")
    assert {k: i.shape for k, i in file.tensors.items()} == {"latents_2x1x2_float32": (CHANNELS, 2, 1, 2)}
    torch.testing.assert_close(read_latents(file.path), torch.full((CHANNELS, 2, 1, 2), 200 / 127.5 - 1))
    metadata, stat = file.metadata, path.stat()
    assert metadata.pop("settings")
    assert len(metadata.pop("cache_key")) == 64
    assert metadata == {
        **{"architecture": "ltx2_v1", "format_version": "1.0.1", "width": "128", "height": "64", "frame_count": "9"},
        **{"reference_frames": "9", "reference_downscale": "2", "target_fps": "25.0", "bucket": "128x64"},
        **{"source_name": "a.png", "source_size": str(stat.st_size), "source_mtime_ns": str(stat.st_mtime_ns)},
        **{"encoder_id": "video id", "preparation": "2"},
    }


@pytest.mark.parametrize(
    ("fps", "stored", "frames", "shown"),
    [
        (25, 20, 9, list(range(9))),  # longer: cut
        (25, 5, 9, [0, 1, 2, 3, 4, 4, 4, 4, 4]),  # shorter: its last frame is held
        (24, 9, 9, list(range(9))),  # within one frame a second: re-timed
        (50, 30, 9, list(range(0, 18, 2))),  # real time is kept
        (25, 5, 1, [0]),
    ],
)
def test_video_references_follow_the_frame_rate_rule(tmp_path, fps, stored: int, frames: int, shown) -> None:
    path = write_video(tmp_path / "r.mp4", stored, fps=fps)
    pixels = read_reference([path], _entry(tmp_path), frames=frames, size=(128, 64))
    assert [read_index(p) for p in pixels] == shown


def test_a_folder_of_images_is_a_video_reference(tmp_path: Path) -> None:
    folder = tmp_path / "refs" / "a"
    folder.mkdir(parents=True)
    for index in range(4):
        Image.fromarray(index_frame(index)).save(folder / f"{index}.png")
    pixels = read_reference([folder], _entry(tmp_path), frames=9, size=(128, 64))
    assert [read_index(p) for p in pixels] == [0, 1, 2, 3, 3, 3, 3, 3, 3]


def test_several_control_images_get_one_latent_frame_each(tmp_path: Path) -> None:
    media, control = tmp_path / "images", tmp_path / "control"
    _image(media / "a.png")
    (media / "a.txt").write_text("a", encoding="utf-8")
    for number, level in enumerate((50, 100, 150)):
        _image(control / f"a_{number}.png", level)
    entry = _entry(tmp_path, kind="image", source=media, control_directory=control, reference_directory=None)
    vae = Recorder()
    assert _run(entry, video_vae=vae).finish(allow_failed=False) == 0
    assert vae.seen[1][:, 0, 0, 0].tolist() == [50, *[100] * 8, *[150] * 8]
    file = SafetensorsFile(entry.reference_cache_directory / "a_0128x0064_ltx2.safetensors")
    assert next(iter(file.tensors)) == "latents_3x2x4_float32"
    assert (file.metadata["reference_frames"], file.metadata["source_name"]) == ("17", "a_0.png, a_1.png, a_2.png")

    # Exchanging two images keeps sum and latest date of the files, but not the reference.
    first, second = control / "a_0.png", control / "a_1.png"
    first.rename(control / "x.png")
    second.rename(first)
    (control / "x.png").rename(second)
    assert _counts(_run(entry, options=SKIP), "reference") == (1, 0, 0)


@pytest.mark.parametrize("size", [(640, 272), (272, 640)])
@pytest.mark.parametrize("downscale", [1, 2])
def test_sizes_are_those_of_the_bucket_divided(tmp_path: Path, size: tuple[int, int], downscale: int) -> None:
    _videos(tmp_path / "videos", "a", size=size)
    _image(tmp_path / "refs" / "a.png", size=(300, 300))
    entry = _entry(tmp_path, resolution=(384, 256), enable_bucket=True, reference_downscale=downscale)
    _run(entry)
    (name,) = _names(entry.cache_directory)
    target = read_latents(entry.cache_directory / name)
    reference = read_latents(entry.reference_cache_directory / name)
    assert (target.shape[2] < target.shape[3]) == (size[1] < size[0])
    assert [s * downscale for s in reference.shape[2:]] == list(target.shape[2:])


def test_references_are_scaled_to_cover_and_cut_at_the_centre(tmp_path: Path) -> None:
    picture = np.zeros((64, 256, 3), np.uint8)
    picture[:, 64:192] = 255  # the middle half
    path = tmp_path / "wide.png"
    Image.fromarray(picture).save(path)
    pixels = read_reference([path], _entry(tmp_path), frames=1, size=(64, 32))
    assert pixels.shape == (1, 32, 64, 3)
    assert pixels.min() == 255


# --- once, however many clips -------------------------------------------------------------------------------


def _chunks(tmp_path: Path, **options) -> DatasetEntry:
    _videos(tmp_path / "videos", "a", frames=30)
    return _entry(tmp_path, frame_extraction="chunk", batch_size=4, **options)


def test_a_reference_is_decoded_and_encoded_once_for_all_chunks(tmp_path: Path, monkeypatch) -> None:
    entry = _chunks(
        tmp_path, reference_audio_directory=tmp_path / "voices", reference_audio_cache_directory=tmp_path / "v"
    )
    _image(tmp_path / "refs" / "a.png")
    write_sound(tmp_path / "voices" / "a.wav", tone(2.0))
    reads: list[Sequence[Path]] = []

    def read(paths, *args, **kwargs):
        reads.append(paths)
        return read_reference(paths, *args, **kwargs)

    monkeypatch.setattr("musubi_tuner.caching.companion_outputs.read_reference", read)
    video, audio = FakeVideoVAE(), FakeAudioVAE()
    summary = _run(entry, AV, video_vae=video, audio_vae=audio)
    assert len(_names(entry.reference_cache_directory)) == 3
    assert [shape[0] for shape in video.batches] == [3, 1]  # the clips, then their one reference
    assert len(reads) == 1
    assert audio.lengths == [32_000]
    assert _counts(summary, "reference") == _counts(summary, "reference audio") == (3, 0, 0)

    # One of them is lost: nothing else is written again.
    lost = entry.reference_cache_directory / _names(entry.reference_cache_directory)[1]
    before = _times(entry.reference_cache_directory)
    lost.unlink()
    summary = _run(entry, AV, SKIP)
    assert _counts(summary, "reference") == (1, 2, 0)
    after = _times(entry.reference_cache_directory)
    assert {name for name in after if after[name] != before[name]} == {lost.name}


def test_a_reference_that_many_lines_share_is_encoded_once_a_bucket(tmp_path: Path) -> None:
    _videos(tmp_path / "videos", "a", "b")
    _videos(tmp_path / "videos", "tall", size=(64, 128))
    _image(tmp_path / "style.png")
    file = tmp_path / "list.jsonl"
    lines = (
        f'{{"video_path": "videos/{n}.mp4", "caption": "", "reference_path": "style.png"}}' for n in ("a", "b", "tall")
    )
    file.write_text("\n".join(lines), encoding="utf-8")
    entry = _entry(tmp_path, source=file, listed=True, reference_directory=None, enable_bucket=True)
    vae = FakeVideoVAE()
    assert _counts(_run(entry, video_vae=vae), "reference") == (3, 0, 0)
    assert sorted(shape[2] for shape in vae.batches) == [1, 1, 9, 9, 9]


def test_clips_that_begin_later_are_pointed_out(tmp_path: Path, caplog) -> None:
    entry = _chunks(tmp_path)
    (tmp_path / "refs").mkdir(exist_ok=True)
    write_video(tmp_path / "refs" / "a.mp4", 9)
    _run(entry)
    assert "always begins with its video's first frame, also for the 2 clips that begin later" in caplog.text


# --- keeping what is current --------------------------------------------------------------------------------


def test_a_new_reference_leaves_the_targets_alone(tmp_path: Path) -> None:
    _videos(tmp_path / "videos", "a", "b")
    for name in ("a", "b"):
        _image(tmp_path / "refs" / f"{name}.png")
    entry = _entry(tmp_path)
    _run(entry)
    targets, references = _times(entry.cache_directory), _times(entry.reference_cache_directory)
    assert _counts(_run(entry, options=SKIP), "reference") == (0, 2, 0)
    assert _times(entry.reference_cache_directory) == references
    _image(tmp_path / "refs" / "b.png", 10)
    summary = _run(entry, options=SKIP)
    assert _counts(summary, "reference") == (1, 1, 0)
    assert summary.reasons == {"the source file changed": 1}
    assert _times(entry.cache_directory) == targets


def test_current_references_are_not_decoded(tmp_path: Path, monkeypatch) -> None:
    _videos(tmp_path / "videos", "a")
    _image(tmp_path / "refs" / "a.png")
    entry = _entry(tmp_path)
    _run(entry)
    monkeypatch.setattr("musubi_tuner.caching.companion_outputs.read_reference", None)
    assert _run(entry, options=SKIP).finish(allow_failed=False) == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"reference_frames": 9}, "changed: reference_frames"),
        ({"reference_downscale": 2}, "changed: reference_downscale"),
        ({"recipe": replace(RECIPE, video_vae=EncoderRecord("other"))}, "another checkpoint"),
    ],
)
def test_what_changed_is_made_again(tmp_path: Path, change: dict, reason: str) -> None:
    _videos(tmp_path / "videos", "a")
    _image(tmp_path / "refs" / "a.png")
    _run(_entry(tmp_path))
    recipe = change.pop("recipe", RECIPE)
    summary = _run(_entry(tmp_path, **change), recipe, SKIP)
    assert _counts(summary, "reference") == (1, 0, 0)
    assert summary.reasons[reason] >= 1


def test_target_fps_matters_to_videos_only(tmp_path: Path) -> None:
    _videos(tmp_path / "videos", "a", "b")
    _image(tmp_path / "refs" / "a.png")
    write_video(tmp_path / "refs" / "b.mp4", 9)
    _run(_entry(tmp_path))
    assert _counts(_run(_entry(tmp_path, target_fps=24.0), options=SKIP), "reference") == (1, 1, 0)


def test_orphans_of_references_go_with_their_clips(tmp_path: Path) -> None:
    entry = _chunks(tmp_path)
    _image(tmp_path / "refs" / "a.png")
    _run(entry)
    folder = entry.reference_cache_directory
    others = [folder / "notes.safetensors", folder / "a_00000-009_0128x0064_ltx2_audio.safetensors"]
    half = folder / "a_00000-009_0128x0064_ltx2.partial-0123abcd.safetensors"
    for path in (*others, half):
        path.write_bytes(b"x")
    os.utime(half, (1, 1))
    head = replace(entry, frame_extraction="head")
    _run(head, options=RunOptions(keep_cache=True))
    assert len(_names(folder)) == 5
    assert not half.exists()
    _run(head)
    assert _names(folder) == sorted(["a_00000-009_0128x0064_ltx2.safetensors", *(p.name for p in others)])


# --- what goes wrong ----------------------------------------------------------------------------------------


def test_missing_references_are_listed_and_protect_old_files(tmp_path: Path, caplog) -> None:
    _videos(tmp_path / "videos", "a", "b")
    _image(tmp_path / "refs" / "a.png")
    gone = _image(tmp_path / "refs" / "b.png")
    entry = _entry(tmp_path)
    _run(entry)
    gone.unlink()
    with caplog.at_level(logging.ERROR):
        summary = _run(entry)
        assert summary.finish(allow_failed=True) == 0
        assert summary.finish(allow_failed=False) == 1
    assert "missing: datasets[0]: no reference for b.mp4" in caplog.text
    assert len(_names(entry.reference_cache_directory)) == 2


def test_a_damaged_reference_fails_alone(tmp_path: Path) -> None:
    _videos(tmp_path / "videos", "a", "b")
    _image(tmp_path / "refs" / "a.png")
    (tmp_path / "refs" / "b.mp4").write_bytes(b"no video")
    entry = _entry(tmp_path)
    summary = _run(entry)
    assert summary.finish(allow_failed=False) == 1
    assert _counts(summary, "reference") == (1, 0, 1)
    assert _counts(summary, "video") == (2, 0, 0)
    assert _names(entry.reference_cache_directory) == ["a_00000-009_0128x0064_ltx2.safetensors"]
    assert "b.mp4: cannot be decoded" in summary.failures[0]


def test_an_interrupted_run_continues_with_the_references(tmp_path: Path) -> None:
    _videos(tmp_path / "videos", "a", "b")
    for name in ("a", "b"):
        _image(tmp_path / "refs" / f"{name}.png")
    entry = _entry(tmp_path, batch_size=2)

    class Interrupting(FakeVideoVAE):
        def encode(self, pixels):
            if len(self.batches) == 2:  # the targets, one reference
                raise KeyboardInterrupt
            return super().encode(pixels)

    with pytest.raises(KeyboardInterrupt):
        _run(entry, video_vae=Interrupting())
    assert len(_names(entry.reference_cache_directory)) == 1
    summary = _run(entry, options=SKIP)
    assert (_counts(summary, "video"), _counts(summary, "reference")) == ((0, 2, 0), (1, 1, 0))


def test_nan_leaves_no_reference(tmp_path: Path) -> None:
    _videos(tmp_path / "videos", "a")
    entry = _entry(tmp_path)
    _image(tmp_path / "refs" / "a.png")
    _run(replace(entry, reference_cache_directory=None))
    vae = FakeVideoVAE()
    vae.poison = True
    summary = _run(entry, options=SKIP, video_vae=vae)
    assert _counts(summary, "reference") == (0, 0, 1)
    assert _names(entry.reference_cache_directory) == []


def test_a_clip_that_fails_gets_no_reference(tmp_path: Path) -> None:
    videos = _videos(tmp_path / "videos", "a", "bad")
    (videos / "bad.mp4").write_bytes(b"no video")
    for name in ("a", "bad"):
        _image(tmp_path / "refs" / f"{name}.png")
    entry = _entry(tmp_path)
    assert _counts(_run(entry), "reference") == (1, 0, 0)


def test_a_reference_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    entry = _entry(tmp_path, reference_cache_directory=blocked / "cache")
    with pytest.raises(UserError, match="reference_cache_directory: .*file.*cache"):
        prepare_directories(DatasetConfig((entry,), (), Path("data.toml")))


# --- sound --------------------------------------------------------------------------------------------------


def _with_voices(tmp_path: Path, **options) -> DatasetEntry:
    return _entry(
        tmp_path,
        reference_directory=None,
        reference_cache_directory=None,
        reference_audio_directory=tmp_path / "voices",
        reference_audio_cache_directory=tmp_path / "voice_cache",
        **options,
    )


@pytest.mark.parametrize(("limit", "seconds"), [(None, 3.0), (1.0, 1.0), (10.0, 3.0)])
def test_reference_sound_is_encoded_whole(tmp_path: Path, limit: float | None, seconds: float) -> None:
    _videos(tmp_path / "videos", "a", sound=tone(0.8))
    entry = _with_voices(tmp_path)
    write_sound(tmp_path / "voices" / "a.flac", tone(3.0), codec="flac")
    vae = FakeAudioVAE()
    summary = _run(entry, replace(AV, reference_audio_seconds=limit), audio_vae=vae)
    assert summary.finish(allow_failed=False) == 0
    assert _names(entry.reference_audio_cache_directory) == ["a_00000-009_0128x0064_ltx2_audio.safetensors"]
    assert vae.lengths[-1] == seconds * 16_000
    steps = audio_latent_length(round(seconds * 16_000))
    path = entry.reference_audio_cache_directory / "a_00000-009_0128x0064_ltx2_audio.safetensors"
    assert read_audio(path)[0].shape == (8, steps, 16)
    assert SafetensorsFile(path).metadata["encoder_id"] == "audio id"
    again = _run(entry, replace(AV, reference_audio_seconds=0.5), SKIP)
    assert again.reasons == {"changed: max_seconds": 1}


def test_reference_sound_in_mode_audio_and_not_in_mode_video(tmp_path: Path) -> None:
    sounds = tmp_path / "sounds"
    sounds.mkdir()
    write_sound(sounds / "a.wav", tone(1.0))
    (sounds / "a.txt").write_text("a", encoding="utf-8")
    entry = _with_voices(tmp_path, kind="audio", source=sounds, resolution=(768, 512))
    write_sound(tmp_path / "voices" / "A.wav", tone(2.0))
    summary = _run(entry, replace(AV, mode="audio", video_vae=None), video_vae=None)
    assert summary.finish(allow_failed=False) == 0
    names = ["a_0768x0512_ltx2_audio.safetensors"]
    assert _names(entry.reference_audio_cache_directory) == names

    _videos(tmp_path / "videos", "b")
    videos = replace(entry, kind="video", source=tmp_path / "videos", cache_directory=tmp_path / "other")
    assert _run(videos, audio_vae=None).finish(allow_failed=False) == 0
    assert _names(entry.reference_audio_cache_directory) == names


def test_a_reference_without_sound_fails(tmp_path: Path) -> None:
    _videos(tmp_path / "videos", "a", sound=tone(0.8))
    entry = _with_voices(tmp_path)
    write_sound(tmp_path / "voices" / "a.wav", tone(0.01))
    summary = _run(entry, AV)
    assert _counts(summary, "reference audio") == (0, 0, 1)
    assert "ms of sound" in summary.failures[0]
