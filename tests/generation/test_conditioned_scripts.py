"""From prompt files with --i, --v and --ra through the caching script to samples of both scripts."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from media_files import index_frame, tone, write_sound, write_video
from PIL import Image

from musubi_tuner.common.safetensors_io import SafetensorsFile
from musubi_tuner.demo.assets import Assets, asset_paths
from musubi_tuner.ltx2_cache_latents import main as cache_latents
from musubi_tuner.ltx2_generate_video import main as generate
from musubi_tuner.ltx2_train_network import main as train
from musubi_tuner.models.checkpoint import Checkpoint
from musubi_tuner.models.video_vae import load_video_vae

SIZE = "--w 96 --h 64 --f 9 --s 2 --d 1"


@pytest.fixture(scope="module")
def assets(cached_demo, tmp_path_factory) -> Assets:
    """A copy with files to condition on, and prompts that name them."""
    folder = tmp_path_factory.mktemp("conditioned") / "demo"
    shutil.copytree(cached_demo().checkpoint.parent, folder)
    Image.fromarray(index_frame(5, (192, 128))).save(folder / "first.png")
    write_video(folder / "ref.mp4", 12)
    write_sound(folder / "voice.wav", tone(0.5))
    assets = asset_paths(folder)
    assets.prompts.write_text(
        f"A rabbit. {SIZE} --i first.png --g 2\nA meadow. {SIZE}\n--v ref.mp4 --ra voice.wav A burrow. {SIZE}\n",
        encoding="utf-8",
    )
    return assets


def caching(assets: Assets, *more: str, prompts: Path | None = None) -> None:
    cache_latents(
        [
            *("--dataset_config", str(assets.dataset), "--ltx2_checkpoint", str(assets.checkpoint)),
            *("--ltx2_mode", "av", "--vae_dtype", "fp32", "--ltx2_audio_dtype", "fp32", "--skip_existing"),
            *("--num_workers", "1", "--precache_sample_latents", "--sample_prompts", str(prompts or assets.prompts)),
            *more,
        ]
    )


def generating(assets: Assets, output: Path, *more: str, prompts: Path | None = None, mode="av") -> list[dict]:
    """Latents of all samples."""
    generate(
        [
            *("--ltx2_checkpoint", str(assets.checkpoint), "--gemma_root", str(assets.gemma), "--ltx2_mode", mode),
            *("--sample_prompts", str(prompts or assets.prompts), "--output_dir", str(output), "--device", "cpu"),
            *("--mixed_precision", "no", "--vae_dtype", "fp32", "--output_type", "both", *more),
        ]
    )
    return [dict(SafetensorsFile(p).read()) for p in sorted(output.glob("*.safetensors"))]


def training(assets: Assets, output: Path, *more: str, prompts: Path | None = None) -> None:
    train(
        [
            *("--ltx2_checkpoint", str(assets.checkpoint), "--dataset_config", str(assets.dataset)),
            *("--ltx_version", "2.3", "--ltx2_mode", "av", "--mixed_precision", "no", "--vae_dtype", "fp32"),
            *("--output_dir", str(output), "--output_name", "x", "--max_train_steps", "1", "--seed", "1"),
            *("--network_dim", "2", "--max_data_loader_n_workers", "0", "--gemma_root", str(assets.gemma)),
            *("--sample_prompts", str(prompts or assets.prompts), "--sample_at_first", *more),
        ]
    )


def refused(run, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text


@pytest.fixture(scope="module")
def cache(assets, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "samples.pt"
    caching(assets, "--sample_latents_cache", str(path))
    return path


@pytest.fixture(scope="module")
def direct(assets, tmp_path_factory) -> list[dict]:
    return generating(assets, tmp_path_factory.mktemp("direct"))


def test_first_frames_are_the_encoded_image(assets, cache, direct):
    first, second = torch.load(cache, weights_only=True)["latent_cache"]
    assert torch.equal(direct[0]["video"][:, :, :1], first["conditioning_latent"])
    assert second["v2v_ref_latent"].shape == (1, 128, 2, 2, 3), "9 of 12 frames"
    assert second["ref_audio_latent"].shape == (1, 8, 13, 16), "0.5 s, whatever the sample's length"
    # the image itself, by the VAE of the checkpoint
    vae = load_video_vae(Checkpoint.open(assets.checkpoint), dtype=torch.float32, decoder=False)
    picture = Image.open(assets.checkpoint.parent / "first.png").resize((96, 64), Image.Resampling.BOX)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(1, 1, 64, 96, 3)
    expected = vae.encode(pixels.permute(0, 4, 1, 2, 3).float() / 127.5 - 1)
    error = (first["conditioning_latent"] - expected).abs().mean() / expected.abs().mean()
    assert error < 0.1, f"{error:.3f}"


def test_samples_from_the_cache_equal_those_encoded_on_the_way(assets, cache, direct, tmp_path):
    for mine, other in zip(direct, generating(assets, tmp_path, "--sample_latents_cache", str(cache)), strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in ("video", "audio"))


def test_conditions_change_their_own_prompts_only(assets, direct, tmp_path):
    plain = tmp_path / "plain.txt"
    text = assets.prompts.read_text(encoding="utf-8")
    plain.write_text(re.sub(r"--(i|v|ra) \S+", "", text), encoding="utf-8")
    without = generating(assets, tmp_path / "out", prompts=plain)
    equal = [torch.equal(a["video"], b["video"]) for a, b in zip(direct, without, strict=True)]
    assert equal == [False, True, False]


def test_previews_take_the_latents_from_where_caching_put_them(assets, tmp_path, capsys, monkeypatch):
    caching(assets)
    default = assets.cache / "ltx2_sample_latents_cache.pt"
    assert default.is_file()

    def encoded(*args, **kwargs):
        raise AssertionError("the VAE encoder was asked for")

    monkeypatch.setattr("musubi_tuner.generation.sample_latents.encode_with", encoded)
    training(assets, tmp_path)
    default_used = f"conditioning of samples: read from {default}" in capsys.readouterr().err
    with pytest.raises(AssertionError, match="was asked for"):
        training(assets, tmp_path / "again", "--no_use_precached_sample_latents")
    default.unlink()
    assert default_used
    assert len(list((tmp_path / "sample").glob("*.mp4"))) == 3


def test_previews_encode_where_there_is_no_cache(assets, tmp_path, capsys):
    training(assets, tmp_path)
    assert "read from" not in capsys.readouterr().err
    assert len(list((tmp_path / "sample").glob("*.mp4"))) == 3


def test_a_cache_that_does_not_fit_names_the_command(assets, cache, tmp_path, capsys, monkeypatch):
    other = assets.checkpoint.parent / "other.txt"
    other.write_text(f"A rabbit. {SIZE.replace('96', '128')} --i first.png\n", encoding="utf-8")
    monkeypatch.setattr("musubi_tuner.training.run_parts.load_model", None)
    flags = ("--use_precached_sample_latents", "--sample_latents_cache", str(cache))
    for run in (training, generating):
        message = refused(lambda run=run: run(assets, tmp_path / "out", *flags, prompts=other), capsys)
        assert f"{cache}: prompt 0 (A rabbit.), --i: made for 96x64 pixels" in message
        assert "run: python" not in message
        assert re.search(
            r"rebuild it: python ltx2_cache_latents.py --dataset_config .* --ltx2_mode av --skip_existing "
            r"--precache_sample_latents --sample_prompts \S+other.txt --width 768 --height 512 --sample_num_frames 45 "
            r"--sample_latents_cache \S+samples.pt",
            message,
        )


def test_a_cache_that_is_asked_for_must_exist(assets, tmp_path, capsys):
    flags = ("--use_precached_sample_latents", "--sample_latents_cache", str(tmp_path / "no.pt"))
    for run in (training, generating):
        assert "no.pt: not found; rebuild it: python" in refused(lambda run=run: run(assets, tmp_path, *flags), capsys)
    message = refused(lambda: generating(assets, tmp_path, "--use_precached_sample_latents"), capsys)
    assert "--use_precached_sample_latents needs --sample_latents_cache" in message


@pytest.mark.parametrize("run", [caching, training, generating], ids=["caching", "training", "generating"])
def test_a_missing_file_is_named_before_anything_is_loaded(assets, tmp_path, capsys, monkeypatch, run):
    prompts = tmp_path / "p.txt"
    prompts.write_text(f"A rabbit. {SIZE}\nA cat. {SIZE} --i gone.png\n", encoding="utf-8")
    for loads in ("models.video_vae.load_video_vae", "training.run_parts.load_model"):
        monkeypatch.setattr(f"musubi_tuner.{loads}", None)
    output = ("--sample_latents_cache", str(tmp_path / "c.pt")) if run is caching else (tmp_path / "out",)
    message = refused(lambda: run(assets, *output, prompts=prompts), capsys)
    assert "prompt 1 (A cat.): --i gone.png: not found" in message
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["p.txt"]


def test_a_damaged_file_leaves_no_cache(assets, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG and nothing else")
    shutil.copyfile(assets.checkpoint.parent / "first.png", tmp_path / "good.png")
    prompts = tmp_path / "p.txt"
    prompts.write_text(f"A rabbit. {SIZE} --i good.png\nA cat. {SIZE} --i bad.png\n", encoding="utf-8")
    run = lambda: caching(assets, "--sample_latents_cache", str(tmp_path / "c.pt"), prompts=prompts)  # noqa: E731
    assert "prompt 1 (A cat.): --i:" in refused(run, capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.png", "good.png", "p.txt"]


def test_conditions_that_the_mode_cannot_use(assets, tmp_path, capsys):
    message = refused(lambda: generating(assets, tmp_path, mode="video"), capsys)
    assert "prompt 2 (A burrow.): --ra gives an audio reference, but no audio is generated (mode video)" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--precache_sample_latents"], "--precache_sample_latents needs --sample_prompts"),
        (["--sample_prompts", __file__], "--sample_prompts needs --precache_sample_latents"),
        (["--precache_sample_latents", "--sample_prompts", "no.txt"], "--sample_prompts no.txt: not found"),
        (["--precache_sample_latents", "--sample_prompts", __file__, "--dry_run"], "leave one out"),
    ],
)
def test_flags_of_the_caching_script(flags, message, capsys):
    assert message in refused(lambda: cache_latents(flags), capsys)


def test_prompts_without_conditions_give_no_cache(assets, tmp_path, capsys):
    prompts = tmp_path / "p.txt"
    prompts.write_text("A rabbit.\n", encoding="utf-8")
    caching(assets, "--sample_latents_cache", str(tmp_path / "c.pt"), prompts=prompts)
    assert "no prompt has --i, --v or --ra" in capsys.readouterr().err
    assert not (tmp_path / "c.pt").exists()
