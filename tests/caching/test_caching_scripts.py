"""Both scripts on the demo's checkpoint, text encoder and clips, up to the batches of training."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from media_files import tone, write_sound
from PIL import Image

from musubi_tuner.common.errors import ConfigErrors
from musubi_tuner.common.safetensors_io import SafetensorsFile, save_safetensors
from musubi_tuner.dataset.discovery import discover
from musubi_tuner.dataset.files import scan_directory
from musubi_tuner.dataset.fingerprint import EncoderIds, RepairCommands, check_caches
from musubi_tuner.dataset.loader import BatchLoader
from musubi_tuner.dataset.sampling import BatchPlan
from musubi_tuner.dataset.schema import check_mode, load_dataset_config
from musubi_tuner.demo.assets import Assets, asset_paths
from musubi_tuner.ltx2_cache_latents import main as cache_latents
from musubi_tuner.ltx2_cache_text_encoder_outputs import main as cache_text
from musubi_tuner.models.checkpoint import Checkpoint

CLIPS = 3
ONE_VERSION = pytest.mark.parametrize("assets", ["2.3"], indirect=True)  # where they have the code in common


@pytest.fixture(scope="module", params=["2.0", "2.3"])
def assets(request, demo_assets, tmp_path_factory: pytest.TempPathFactory) -> Assets:
    """A copy for this module, which caches into it; with fewer clips, to be quick."""
    folder = tmp_path_factory.mktemp("demo") / request.param
    copy = asset_paths(Path(shutil.copytree(demo_assets(request.param).checkpoint.parent, folder)))
    for clip in sorted(copy.videos.glob("*.mp4"))[CLIPS:]:
        clip.unlink()
    return copy


def _flags(assets: Assets, mode: str, dataset: Path | None = None) -> list[str]:
    return [
        *("--dataset_config", str(dataset or assets.dataset), "--ltx2_checkpoint", str(assets.checkpoint)),
        *("--ltx2_mode", mode, "--device", "cpu"),
    ]


def _latents(assets: Assets, mode: str, *more: str, dataset: Path | None = None) -> None:
    cache_latents([*_flags(assets, mode, dataset), "--vae_dtype", "fp32", "--ltx2_audio_dtype", "fp32", *more])


def _text(assets: Assets, mode: str, *more: str, dataset: Path | None = None) -> None:
    cache_text([*_flags(assets, mode, dataset), "--gemma_root", str(assets.gemma), *more])


def _batches(assets: Assets, mode: str, dataset: Path | None = None) -> list:
    config = load_dataset_config(dataset or assets.dataset, need_sources=False)
    training_set = discover(config, check_mode(config, mode))
    checkpoint = Checkpoint.open(assets.checkpoint)
    ids = EncoderIds(*(checkpoint.encoder_id(kind) for kind in ("video_vae", "audio_vae", "text")))
    check_caches(training_set, encoders=ids, commands=RepairCommands(Path("data.toml"), assets.checkpoint, mode))
    return list(BatchLoader(BatchPlan(training_set, seed=0)).epoch(1))


def test_from_media_to_batches(assets: Assets, caplog) -> None:
    _latents(assets, "va")
    _text(assets, "av", "--precache_sample_prompts", "--sample_prompts", str(assets.prompts))
    batches = _batches(assets, "av")
    assert len(batches) == CLIPS
    for batch in batches:
        assert batch.video.latents.shape == (1, 128, 3, 4, 6)
        # 17 frames at 25 fps: 0.68 s, 69 mel frames, 18 steps
        assert batch.audio.latents.shape == (1, 8, 18, 16)
        assert batch.audio.lengths.tolist() == [18]
        assert batch.text.video.shape[:2] == batch.text.audio.shape[:2] == (1, 1024)
        assert torch.isfinite(batch.video.latents).all()
    assert (assets.cache / "ltx2_sample_prompts_cache.pt").exists()

    # Mode video reads the same caches; both scripts find them current.
    assert [b.audio for b in _batches(assets, "video")] == [None] * CLIPS
    before = {path: path.stat().st_mtime_ns for path in assets.cache.iterdir()}
    for mode in ("av", "video"):
        _latents(assets, mode, "--skip_existing")
        _text(assets, mode, "--skip_existing")
    assert {path: path.stat().st_mtime_ns for path in assets.cache.iterdir()} == before


@ONE_VERSION
def test_latents_do_not_depend_on_batches_workers_or_chunks(assets: Assets) -> None:
    def latents() -> dict:
        return {b.keys: (b.video.latents, b.audio.latents) for b in _batches(assets, "av")}

    _text(assets, "av", "--skip_existing")
    _latents(assets, "av", "--batch_size", "1", "--num_workers", "1")
    first = latents()
    _latents(assets, "av", "--batch_size", "2", "--num_workers", "3", "--vae_chunk_size", "4")
    torch.testing.assert_close(latents(), first, rtol=1e-4, atol=1e-4)


def test_sounds_in_mode_audio(assets: Assets, tmp_path: Path) -> None:
    sounds = tmp_path / "sounds"
    sounds.mkdir()
    for name, seconds in (("short", 1.0), ("long", 7.3)):
        write_sound(sounds / f"{name}.wav", tone(seconds))
        (sounds / f"{name}.txt").write_text(f"a {name} tone", encoding="utf-8")
    dataset = tmp_path / "sounds.toml"
    dataset.write_text('[[datasets]]\naudio_directory = "sounds"\ncache_directory = "cache"\n', encoding="utf-8")
    _latents(assets, "audio", dataset=dataset)
    _text(assets, "audio", dataset=dataset)
    batches = _batches(assets, "audio", dataset)
    assert all(batch.video is None for batch in batches)
    found = sorted((b.audio.lengths.item(), *b.audio.virtual_grid[0].tolist()) for b in batches)
    assert found == [(26, 4, 2, 2), (183, 23, 2, 2)]


@ONE_VERSION
def test_sound_is_cached_in_half_precision(assets: Assets, tmp_path: Path) -> None:
    """By default; the other tests of this file ask for fp32, in which a CPU is far quicker."""
    write_sound(tmp_path / "a.wav", tone(0.4))
    (tmp_path / "a.txt").write_text("a tone", encoding="utf-8")
    found = {}
    for name, flags in {"half": (), "full": ("--ltx2_audio_dtype", "fp32")}.items():
        dataset = tmp_path / f"{name}.toml"
        dataset.write_text(f'[[datasets]]\naudio_directory = "."\ncache_directory = "{name}"\n', encoding="utf-8")
        cache_latents([*_flags(assets, "audio", dataset), *flags])
        _text(assets, "audio", dataset=dataset)
        (batch,) = _batches(assets, "audio", dataset)
        found[name] = batch.audio.latents
    assert (found["half"].dtype, found["full"].dtype) == (torch.float16, torch.float32)
    assert (found["half"] - found["full"]).norm() < 0.01 * found["full"].norm()


def test_caches_of_the_other_version_are_refused(assets: Assets, tmp_path: Path) -> None:
    _latents(assets, "av", "--skip_existing")
    _text(assets, "av", "--skip_existing")
    training_set = discover(load_dataset_config(assets.dataset), "av")
    with pytest.raises(ConfigErrors) as error:
        check_caches(
            training_set,
            encoders=EncoderIds("other", "other", "other"),
            commands=RepairCommands(assets.dataset, assets.checkpoint, "av"),
        )
    assert len(error.value.problems) == 3
    assert all("run: python ltx2_cache_" in problem for problem in error.value.problems)


@ONE_VERSION
def test_a_corrupt_video_ends_with_status_1_unless_allowed(assets: Assets, caplog) -> None:
    bad = assets.videos / "bad.mp4"
    bad.write_bytes(b"this is not a video")
    bad.with_suffix(".txt").write_text("bad", encoding="utf-8")
    try:
        with pytest.raises(SystemExit) as stop, caplog.at_level(logging.ERROR):
            _latents(assets, "video", "--skip_existing")
        assert stop.value.code == 1
        _latents(assets, "video", "--skip_existing", "--allow_failed")
    finally:
        bad.unlink()
        bad.with_suffix(".txt").unlink()


@pytest.mark.parametrize(
    ("script", "flags", "messages"),
    [
        (
            cache_latents,
            ["--vae_spatial_tile_size", "50", "--vae_temporal_tile_overlap", "9", "--vae_temporal_tile_size", "16"],
            [
                *("--dataset_config is required", "--ltx2_checkpoint is required"),
                "--vae_spatial_tile_size 50: expected a multiple of 32, at least 64",
                "--vae_temporal_tile_overlap 9: expected a multiple of 8 below the tile size 16",
            ],
        ),
        (
            cache_latents,
            ["--ltx2_checkpoint", "absent.safetensors", "--dataset_config", "absent.toml", "--vae_dtype", "int3"],
            [
                f"--ltx2_checkpoint absent.safetensors: not found (working directory: {Path.cwd()})",
                "--vae_dtype int3: expected one of",
            ],
        ),
        (
            cache_text,
            ["--gemma_load_in_8bit", "--gemma_load_in_4bit", "--precache_sample_prompts"],
            [
                "give --gemma_root (a folder) or --gemma_safetensors (a file)",
                "exclude each other",
                "--precache_sample_prompts needs --sample_prompts",
            ],
        ),
    ],
)
def test_wrong_flags_are_reported_together(script, flags, messages, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        script(flags)
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert all(message in shown for message in messages), shown


@ONE_VERSION
def test_a_checkpoint_without_the_component_is_refused_before_decoding(assets: Assets, tmp_path, capsys) -> None:
    from musubi_tuner.common.safetensors_io import save_safetensors

    bare = tmp_path / "bare.safetensors"
    save_safetensors({"model.diffusion_model.patchify_proj.weight": torch.zeros(4, 4)}, bare)
    with pytest.raises(SystemExit) as stop:
        cache_latents(["--dataset_config", str(assets.dataset), "--ltx2_checkpoint", str(bare), "--device", "cpu"])
    assert stop.value.code == 2
    assert "has no video VAE encoder" in capsys.readouterr().err


def test_caches_made_with_encoders_of_other_files_serve_training(assets: Assets, tmp_path: Path) -> None:
    file = SafetensorsFile(assets.checkpoint)
    own = dict(file.read())
    vae = {key: tensor * 1.5 for key, tensor in own.items() if key.startswith("vae.")}
    save_safetensors(vae, tmp_path / "vae.safetensors", file.metadata)
    text = {key: tensor * 1.5 for key, tensor in own.items() if "connector" in key or "text_embedding" in key}
    save_safetensors(text, tmp_path / "text.safetensors", file.metadata)
    _latents(assets, "av", "--skip_existing", "--vae", str(tmp_path / "vae.safetensors"))
    _text(assets, "av", "--skip_existing", "--ltx2_text_encoder_checkpoint", str(tmp_path / "text.safetensors"))
    assert len(_batches(assets, "av")) == CLIPS
    _latents(assets, "av", "--skip_existing")  # without --vae the checkpoint's own encoder makes them anew
    cached = next((assets.dataset.parent / "cache").glob("*x0128_ltx2.safetensors"))
    assert SafetensorsFile(cached).metadata["encoder_id"] == Checkpoint.open(assets.checkpoint).encoder_id("video_vae")


@ONE_VERSION
def test_references_and_masks_from_the_command_line(assets: Assets, tmp_path: Path, capsys) -> None:
    videos = load_dataset_config(assets.dataset).datasets[0].source
    clips = scan_directory(videos, "video")
    for folder in ("refs", "masks"):
        (tmp_path / folder).mkdir()
        for clip in clips:
            Image.new("RGB", (192, 128), "white").save(tmp_path / folder / f"{clip.stem}.png")
    dataset = tmp_path / "data.toml"
    dataset.write_text(
        "[[datasets]]\n"
        f"video_directory = '{videos.as_posix()}'\ncache_directory = 'cache'\nresolution = [192, 128]\n"
        "reference_directory = 'refs'\nreference_cache_directory = 'ref_cache'\nmask_directory = 'masks'\n"
        "target_frames = [17]\n",
        encoding="utf-8",
    )
    flags = ("--reference_frames", "9", "--reference_downscale", "2", "--vae_chunk_size", "4")
    _latents(assets, "video", *flags, dataset=dataset)
    names = sorted(path.name for path in (tmp_path / "ref_cache").iterdir())
    assert len(names) == CLIPS
    for name in names:
        reference = SafetensorsFile(tmp_path / "ref_cache" / name)
        assert reference.tensors["latents_2x2x3_float32"].shape == (128, 2, 2, 3)
        mask = SafetensorsFile(tmp_path / "cache" / name.replace("_ltx2", "_ltx2_mask"))
        assert mask.tensors["mask"].shape == (3, 4, 6)

    (tmp_path / "refs" / f"{clips[0].stem}.png").unlink()
    with pytest.raises(SystemExit) as stopped:
        _latents(assets, "video", *flags, "--strict_references", dataset=dataset)
    assert stopped.value.code == 2
    assert f"no reference for {clips[0].name}" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        _latents(assets, "video", "--reference_frames", "4", "--reference_downscale", "0", dataset=dataset)
    message = capsys.readouterr().err
    assert "--reference_frames 4: expected a number of frames of the form 8k + 1" in message
    assert "--reference_downscale 0: expected at least 1" in message
