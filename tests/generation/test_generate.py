"""Prompts to files on a tiny random checkpoint: the pipeline, the shared renderer and the script."""

import re
from dataclasses import replace
from pathlib import Path

import av
import pytest
import torch
from PIL import Image

from musubi_tuner.common.av import AV
from musubi_tuner.common.errors import UserError
from musubi_tuner.common.safetensors_io import SafetensorsFile
from musubi_tuner.dataset.batch import TextEmbeds
from musubi_tuner.demo.checkpoint import write_checkpoint
from musubi_tuner.demo.gemma import write_gemma
from musubi_tuner.generation import pipeline
from musubi_tuner.generation.decode import Decoders
from musubi_tuner.generation.pipeline import generate_latents, initial_noise
from musubi_tuner.generation.prompt_cache import EncodedPrompt, encode_prompts, write_prompt_cache
from musubi_tuner.generation.prompts import SamplePrompt
from musubi_tuner.generation.run import (
    Job,
    RenderSettings,
    generation_stem,
    preview_stem,
    render_prompts,
)
from musubi_tuner.ltx2_generate_video import main
from musubi_tuner.models.checkpoint import Checkpoint
from musubi_tuner.models.ltx2.load import load_transformer
from musubi_tuner.models.text_encoder import load_text_encoder
from musubi_tuner.networks.lora_ltx2 import create_network

CPU = torch.device("cpu")
PROMPT = SamplePrompt(prompt="a cat", width=96, height=64, frame_count=9, sample_steps=3, seed=4)


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    for version in ("2.0", "2.3"):
        write_checkpoint(folder / f"{version}.safetensors", version)
    write_gemma(folder / "gemma", ["a cat on a mat", "a dog in the fog"])
    return folder


@pytest.fixture(scope="module", params=["2.0", "2.3"])
def version(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(assets, version) -> Checkpoint:
    return Checkpoint.open(assets / f"{version}.safetensors")


@pytest.fixture(scope="module")
def transformer(checkpoint):
    return load_transformer(checkpoint, mode="av", dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def encoded(assets, checkpoint) -> EncodedPrompt:
    encoder = load_text_encoder(checkpoint, gemma_root=assets / "gemma", dtype=torch.float32)
    prompt = replace(PROMPT, negative_prompt="a dog")
    return encode_prompts(encoder, [prompt], "av")[0]


def generate(transformer, encoded, prompt=PROMPT, mode="av"):
    return generate_latents(transformer, encoded, prompt, mode=mode, device=CPU, dtype=torch.float32)


def same(a: AV, b: AV) -> bool:
    return all(torch.equal(x, b[name]) for name, x in a.items())


@pytest.mark.parametrize(
    ("mode", "shapes"),
    [
        ("video", {"video": (1, 128, 2, 2, 3)}),
        ("av", {"video": (1, 128, 2, 2, 3), "audio": (1, 8, 9, 16)}),
        ("audio", {"audio": (1, 8, 9, 16)}),
    ],
)
def test_latents_of_each_mode(transformer, encoded, mode, shapes):
    latents = generate(transformer, encoded, mode=mode)
    assert {name: tuple(x.shape) for name, x in latents.items()} == shapes
    assert all(x.dtype == torch.float32 and bool(x.isfinite().all()) for _, x in latents.items())
    assert same(latents, generate(transformer, encoded, mode=mode))


def test_noise_is_drawn_video_first_then_audio():
    noise = initial_noise(PROMPT, "av")
    g = torch.Generator().manual_seed(PROMPT.seed)
    assert torch.equal(noise.video, torch.randn(1, 128, 2, 2, 3, generator=g))
    assert torch.equal(noise.audio, torch.randn(1, 8, 9, 16, generator=g))
    assert torch.equal(noise.video, initial_noise(PROMPT, "video").video)


def test_scale_one_is_the_conditional_pass_and_others_are_not(transformer, encoded):
    plain = generate(transformer, encoded)
    assert same(plain, generate(transformer, encoded, replace(PROMPT, cfg_scale=1.0, guidance_scale=5.0)))
    guided = generate(transformer, encoded, replace(PROMPT, cfg_scale=4.0))
    assert not torch.allclose(plain.video, guided.video)
    itself = EncodedPrompt(encoded.positive, encoded.positive)
    torch.testing.assert_close(
        generate(transformer, itself, replace(PROMPT, cfg_scale=4.0)).video, plain.video, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    "change", [{"audio_cfg_scale": 3.0}, {"stg_scale": 1.0}, {"modality_scale": 3.0}], ids=lambda c: next(iter(c))
)
def test_further_guidance_changes_the_sound(transformer, encoded, change):
    plain, other = generate(transformer, encoded), generate(transformer, encoded, replace(PROMPT, **change))
    assert not torch.allclose(plain.audio, other.audio)


def test_modality_guidance_of_one_step_by_hand(transformer, encoded, monkeypatch):
    """With one step the result is the guided prediction itself: isolated = each stream alone."""
    one = replace(PROMPT, sample_steps=1)
    together = generate(transformer, encoded, one)
    alone = AV(
        video=generate(transformer, encoded, one, "video").video,
        audio=_audio_alone(transformer, encoded, one, monkeypatch),
    )
    guided = generate(transformer, encoded, replace(one, modality_scale=3.0))
    for name, x in guided.items():
        torch.testing.assert_close(x, together[name] + 2 * (together[name] - alone[name]), atol=2e-3, rtol=1e-3)


def _audio_alone(transformer, encoded, prompt, monkeypatch):
    noise = initial_noise(prompt, "av")  # the same noise as in the pair, which an audio run would not draw
    monkeypatch.setattr(pipeline, "initial_noise", lambda *args, **options: AV(audio=noise.audio))
    alone = generate(transformer, encoded, prompt, "audio").audio
    monkeypatch.undo()
    return alone


def test_text_mask_is_honoured(transformer, encoded):
    text = encoded.positive
    half = torch.arange(text.video.shape[1]) < 100
    masked = TextEmbeds(text.video, text.audio, half[None])
    other = TextEmbeds(text.video * half[None, :, None], text.audio * half[None, :, None], half[None])
    a, b = generate(transformer, EncodedPrompt(masked)), generate(transformer, EncodedPrompt(other))
    torch.testing.assert_close(a.video, b.video)
    assert not torch.allclose(a.video, generate(transformer, encoded).video)


# --- the renderer ---


def render(transformer, encoded, checkpoint, output_dir, prompts=(PROMPT,), **options):
    return render_prompts(
        transformer,
        [Job(i, p, encoded) for i, p in enumerate(prompts)],
        Decoders(checkpoint, dtype=torch.float32, device=CPU),
        settings=RenderSettings(**{"mode": "av", "device": CPU, "dtype": torch.float32, **options}),
        output_dir=output_dir,
        stem=lambda job: f"s{job.index}",
    )


@pytest.mark.parametrize("offload", [False, True])
def test_files_of_an_av_sample(transformer, encoded, checkpoint, tmp_path, version, offload):
    (result,) = render(transformer, encoded, checkpoint, tmp_path, merge_audio=True, offload=offload)
    assert [p.name for p in result.paths] == ["s0.mp4", "s0.wav", "s0_av.mp4"]
    with av.open(str(tmp_path / "s0_av.mp4")) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.frames, video.width, video.height, video.average_rate) == (9, 96, 64, 25)
        assert audio.rate == (24000 if version == "2.0" else 48000)
        seconds = float(audio.duration * audio.time_base)
    assert seconds == pytest.approx(9 / 25, abs=0.06)


def test_single_frame_is_an_image_and_audio_only_a_sound(transformer, encoded, checkpoint, tmp_path):
    still = replace(PROMPT, frame_count=1)
    (a,) = render(transformer, encoded, checkpoint, tmp_path / "a", [still], decode_audio=False)
    assert [p.name for p in a.paths] == ["s0.png"]
    assert Image.open(a.paths[0]).size == (96, 64)
    (b,) = render(transformer, encoded, checkpoint, tmp_path / "b", audio_only=True)
    assert [p.name for p in b.paths] == ["s0.wav"]


def test_one_failing_prompt_does_not_stop_the_others(transformer, encoded, checkpoint, tmp_path, caplog):
    bad = replace(PROMPT, stg_scale=1.0, stg_blocks=(99,))
    results = render(transformer, encoded, checkpoint, tmp_path, [PROMPT, bad, PROMPT], decode_audio=False)
    assert [(r.job.index, r.error is None) for r in results] == [(0, True), (1, False), (2, True)]
    assert "sample 1 (a cat) failed: stg_blocks [99]" in caplog.text


def test_rendering_leaves_random_state_and_mode_alone(transformer, encoded, checkpoint, tmp_path):
    transformer.train()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    render(transformer, encoded, checkpoint, tmp_path, write_latents=True, write_media=False)
    assert torch.equal(torch.rand(3), expected)
    assert transformer.training
    saved = dict(SafetensorsFile(tmp_path / "s0.safetensors").read())
    latents = generate(transformer, encoded)
    assert torch.equal(saved["video"], latents.video)
    assert torch.equal(saved["audio"], latents.audio)


def test_file_names():
    assert re.fullmatch(r"n_e000003_01_\d{14}_7", preview_stem("n", 3, index=1, seed=7, epoch_end=True))
    assert re.fullmatch(r"n_000250_00_\d{14}_7", preview_stem("n", 250, index=0, seed=7, epoch_end=False))
    assert re.fullmatch(r"n_02_\d{14}_7", generation_stem("n", index=2, seed=7))


# --- the script ---


def run_script(assets: Path, version: str, mode: str, output_dir: Path, *extra: str) -> list[str]:
    main(
        [
            *("--ltx2_checkpoint", str(assets / f"{version}.safetensors"), "--ltx2_mode", mode),
            *("--mixed_precision", "no", "--vae_dtype", "fp32", "--device", "cpu"),
            *("--width", "96", "--height", "64", "--frame_count", "9", "--sample_steps", "2", "--seed", "1"),
            *("--output_dir", str(output_dir), *extra),
        ]
    )
    return sorted(re.sub(r"_\d{14}_1", "", p.name) for p in output_dir.iterdir())


@pytest.mark.parametrize(
    ("mode", "files"),
    [
        ("video", ["ltx2_gen_00.mp4"]),
        ("av", ["ltx2_gen_00.mp4", "ltx2_gen_00.wav", "ltx2_gen_00_av.mp4"]),
        ("audio", ["ltx2_gen_00.wav"]),
    ],
)
def test_script_in_each_mode(assets, version, mode, files, tmp_path):
    gemma = ("--gemma_root", str(assets / "gemma"))
    extra = ("--prompt", "a cat", "--cfg_scale", "2", "--sample_merge_audio", *gemma)
    assert run_script(assets, version, mode, tmp_path / "out", *extra) == files


def test_script_with_precached_prompts_needs_no_gemma(assets, encoded, version, tmp_path):
    cache, prompts = tmp_path / "c.pt", tmp_path / "p.txt"
    prompts.write_text("a cat\n", encoding="utf-8")
    write_prompt_cache(cache, "av", [PROMPT], [EncodedPrompt(encoded.positive)])
    extra = ("--sample_prompts", str(prompts), "--use_precached_sample_prompts", "--sample_prompts_cache", str(cache))
    files = run_script(assets, version, "video", tmp_path / "out", *extra, "--output_type", "both")
    assert files == ["ltx2_gen_00.mp4", "ltx2_gen_00.safetensors"]


def test_script_applies_loras_with_their_strength(assets, version, transformer, tmp_path):
    network = create_network(1.0, 4, 4.0, transformer, lora_target_preset="t2v")
    with torch.no_grad():
        for module in network.modules_by_name.values():
            module.lora_up.weight.normal_(std=0.3)
    lora = tmp_path / "lora.safetensors"
    network.save_weights(lora, None)

    def latents(name: str, *extra: str) -> torch.Tensor:
        gemma = ("--gemma_root", str(assets / "gemma"))
        out = tmp_path / name
        run_script(assets, version, "video", out, "--prompt", "a cat", "--output_type", "latent", *gemma, *extra)
        return SafetensorsFile(next(out.iterdir())).read_one("video")

    base, applied = latents("base"), latents("one", "--lora_weight", str(lora))
    assert not torch.allclose(base, applied)
    assert torch.equal(base, latents("zero", "--lora_weight", str(lora), "--lora_multiplier", "0"))
    twice = ("--lora_weight", str(lora), str(lora), "--lora_multiplier", "0.5")
    torch.testing.assert_close(applied, latents("halves", *twice), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a"], "--ltx2_checkpoint is required"),
        (["--ltx2_checkpoint", "nope.safetensors"], "nope.safetensors: not found"),
        ([], "give either --prompt or --sample_prompts"),
        (["--prompt", "a", "--lora_multiplier", "1", "2"], "--lora_multiplier needs --lora_weight"),
        (["--prompt", "a", "--sample_audio_only"], "--sample_audio_only needs --ltx2_mode av or audio"),
        (["--prompt", "a"], "needs --gemma_root"),
        (["--prompt", "a", "--use_precached_sample_prompts"], "needs --sample_prompts_cache"),
        (["--ltx2_mode", "audio", "--sample_disable_audio"], "leaves nothing to decode"),
        (["--sample_tiled_vae", "--sample_vae_tile_size", "50"], "--sample_vae_tile_size 50: expected"),
        (["--sample_vae_temporal_tile_size", "3"], "--sample_vae_temporal_tile_size 3: expected a multiple of 8"),
        (["--vae_dtype", "foo"], "--vae_dtype foo: expected one of"),
        (["--frame_rate", "nan"], "--frame_rate: expected a number"),
        (["--output_dir", __file__], "is a file, expected a folder"),
    ],
)
def test_bad_requests_end_with_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_component_is_named_before_anything_is_loaded(assets, tmp_path, capsys):
    from musubi_tuner.common.safetensors_io import save_safetensors

    file = SafetensorsFile(assets / "2.3.safetensors")
    kept = {k: t for k, t in file.read() if not k.startswith("vocoder.")}
    save_safetensors(kept, tmp_path / "cut.safetensors", file.metadata)
    with pytest.raises(SystemExit):
        main(
            [
                *("--ltx2_checkpoint", str(tmp_path / "cut.safetensors"), "--ltx2_mode", "av", "--prompt", "a"),
                *("--gemma_root", str(assets / "gemma"), "--device", "cpu"),
            ]
        )
    assert "has no vocoder" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cuda:77", "gpu", "meta"])
def test_unusable_device_is_one_message(assets, tmp_path, capsys, device):
    with pytest.raises(SystemExit) as exit_:
        run_script(assets, "2.3", "video", tmp_path, "--prompt", "a", "--gemma_root", str(assets / "gemma"),
                   "--device", device)  # fmt: skip
    assert exit_.value.code == 2
    assert f"--device {device}: PyTorch cannot use it here; it has cpu" in capsys.readouterr().err


def test_lora_of_another_version_is_found_before_a_model_is_loaded(assets, tmp_path, capsys, monkeypatch):
    files = {}
    for version in ("2.0", "2.3"):
        model = load_transformer(Checkpoint.open(assets / f"{version}.safetensors"), mode="video",
                                 dtype=torch.float32, device="cpu")  # fmt: skip
        files[version] = tmp_path / f"lora {version}.safetensors"
        network = create_network(1.0, 2, 1.0, model, lora_target_preset="full")
        network.save_weights(files[version], metadata={"ss_ltx_version": version})

    def loaded(*args, **kwargs):
        raise UserError("the text encoder was loaded")

    monkeypatch.setattr("musubi_tuner.generation.script.load_encoder_and_encode", loaded)
    for version, lora, expected in (
        ("2.0", files["2.3"], "to_gate_logits; it belongs to another model or version"),
        ("2.3", files["2.0"], "was trained on LTX-2.0, the checkpoint is 2.3"),  # a warning: every module exists
        ("2.3", assets / "2.3.safetensors", "is no LoRA"),
    ):
        with pytest.raises(SystemExit) as exit_:
            run_script(assets, version, "video", tmp_path / "out", "--prompt", "a", "--lora_weight", str(lora),
                       "--gemma_root", str(assets / "gemma"))  # fmt: skip
        assert exit_.value.code == 2
        text = capsys.readouterr().err
        assert expected in text
        assert str(lora) in text


def test_failed_samples_give_status_1(assets, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a cat\na dog --stg_scale 1 --stg_blocks 99\n", encoding="utf-8")
    extra = ("--sample_prompts", str(prompts), "--gemma_root", str(assets / "gemma"))
    with pytest.raises(SystemExit) as exit_:
        run_script(assets, "2.3", "video", tmp_path / "out", *extra)
    assert exit_.value.code == 1
    assert len(list((tmp_path / "out").iterdir())) == 1
