"""``ltx2_train_network.py`` with references and masks that lie in caches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_training_runs import arguments, refused

from musubi_tuner.common.av import AV
from musubi_tuner.common.safetensors_io import SafetensorsFile
from musubi_tuner.dataset.cache import (
    CacheName,
    list_caches,
    read_latent_header,
    write_audio,
    write_latents,
    write_mask,
)
from musubi_tuner.ltx2_train_network import main as train


class Data:
    """The demo's caches with references beside them; a new ``dataset.toml`` names both."""

    def __init__(self, assets, folder: Path, mode: str) -> None:
        self.assets, self.folder, self.mode = assets, folder, mode
        self.cache = assets.audio_cache if mode == "audio" else assets.cache
        self.references, self.sounds = folder / "references", folder / "sounds"
        self.dataset = folder / "dataset.toml"

    def targets(self, kind: str) -> list[tuple[CacheName, Path]]:
        return [(name, path) for name, path in list_caches(self.cache).items() if name.kind == kind]

    def write(self, *lines: str) -> None:
        source = f'audio_directory = "{self.assets.sounds.as_posix()}"'
        if self.mode != "audio":
            source = f'video_directory = "{self.assets.videos.as_posix()}"\ntarget_frames = [17]'
        general = "resolution = [192, 128]\nenable_bucket = true" if self.mode != "audio" else ""
        cache = f'cache_directory = "{self.cache.as_posix()}"'
        self.dataset.write_text("\n".join(["[general]", general, "[[datasets]]", source, cache, *lines]), "utf-8")

    def with_references(self, *, scale: int = 1, frames: int = 1, seed: int = 0, count: int | None = None) -> None:
        """Random latents under the names of the targets, made "by" the encoder that made the targets."""
        self.references.mkdir(exist_ok=True)
        for number, (_, path) in enumerate(self.targets("latents")[:count]):
            header = read_latent_header(path)
            grid = (frames, header.grid[1] // scale, header.grid[2] // scale)
            made = {"encoder_id": header.metadata["encoder_id"], "cache_key": "by hand"}
            made |= {"reference_downscale": str(scale), "reference_frames": str((frames - 1) * 8 + 1)}
            random = torch.Generator().manual_seed(seed + number)
            write_latents(self.references / path.name, torch.randn(header.channels, *grid, generator=random), made)
        self.write(
            f'reference_cache_directory = "{self.references.as_posix()}"',
            'reference_directory = "references not needed"',
        )

    def with_sounds(self) -> None:
        self.sounds.mkdir(exist_ok=True)
        for number, (_, path) in enumerate(self.targets("audio")):
            made = {"encoder_id": SafetensorsFile(path).metadata["encoder_id"], "cache_key": "by hand"}
            random = torch.Generator().manual_seed(number)
            write_audio(self.sounds / path.name, torch.randn(8, 5 + number, 16, generator=random), made)
        self.write(
            f'reference_audio_cache_directory = "{self.sounds.as_posix()}"',
            'reference_audio_directory = "sounds not needed"',
        )

    def run(self, name: str, *flags: str, steps: int = 2) -> dict[str, torch.Tensor]:
        train(self.arguments(name, *flags, steps=steps))
        return load_file(self.folder / name / "x.safetensors")

    def arguments(self, name: str, *flags: str, steps: int = 2) -> list[str]:
        argv = arguments(self.assets, self.folder / name, *flags, steps=steps, mode=self.mode)
        argv[argv.index("--dataset_config") + 1] = str(self.dataset)
        return argv


@pytest.fixture
def data(cached_demo, tmp_path: Path):
    return lambda mode="video": Data(cached_demo("2.3", mode), tmp_path, mode)


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


V2V = ("--lora_target_preset", "v2v")


def test_reference_videos_are_trained_with(data):
    data = data()
    data.with_references(scale=2, frames=2)
    flags = (*V2V, "--reference_downscale", "2", "--reference_frames", "9", "--gradient_checkpointing")
    one = data.run("one", *flags, "--ltx2_first_frame_conditioning_p", "0.5")
    again = data.run("again", *flags, "--ltx2_first_frame_conditioning_p", "0.5")
    assert same(one, again)
    data.with_references(scale=2, frames=2, seed=50)
    assert not same(one, data.run("other", *flags, "--ltx2_first_frame_conditioning_p", "0.5")), "they are looked at"
    metadata = metadata_of(data.folder / "one" / "x.safetensors")
    assert metadata["ss_reference_downscale_factor"] == metadata["reference_downscale_factor"] == "2"
    assert metadata["ss_ic_lora_strategy"] == "v2v"
    assert metadata["ss_v2v_training"] == "True"


def test_references_under_another_strategy_are_ignored_and_told_of(data, capsys):
    data = data()
    data.write()
    plain = data.run("plain")
    data.with_references()
    ignored = data.run("ignored", "--ic_lora_strategy", "none")
    assert same(plain, ignored)
    assert "reference_cache_directory of datasets[0] is ignored with --ic_lora_strategy none" in capsys.readouterr().err
    metadata = metadata_of(data.folder / "ignored" / "x.safetensors")
    assert "reference_downscale_factor" not in metadata
    assert metadata["ss_ic_lora_strategy"] == "none"


def test_items_without_a_reference_are_left_out_of_training(data, capsys):
    data = data()
    data.with_references(count=1)
    data.run("out", *V2V)
    datasets = json.loads(metadata_of(data.folder / "out" / "x.safetensors")["ss_datasets"])
    assert datasets[0]["items"] == 1
    assert "no cached reference for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mode", "flags", "expected"),
    [
        ("video", V2V, "no dataset has a reference_cache_directory"),
        ("video", ("--ic_lora_strategy", "v2v"), "no dataset has a reference_cache_directory"),
        ("av", V2V, "which --lora_target_preset v2v stands for, needs --ltx2_mode video, got av"),
        ("av", ("--ic_lora_strategy", "audio_ref_only_ic"), "no dataset has a reference_audio_cache_directory"),
        ("video", ("--ic_lora_strategy", "audio_ref_only_ic"), "needs --ltx2_mode av or audio, got video"),
        ("video", ("--reference_frames", "10"), "--reference_frames: expected 8k + 1 (1, 9, 17, ...), got 10"),
        ("video", ("--reference_downscale", "0"), "--reference_downscale: expected at least 1, got 0"),
    ],
)
def test_what_a_strategy_lacks_is_said_before_the_model_loads(data, capsys, mode: str, flags, expected: str):
    data = data(mode)
    data.write()
    assert expected in refused(data.arguments("out", *flags), capsys)
    assert not (data.folder / "out").exists()


def test_references_of_another_size_are_refused_with_the_flag_that_fits(data, capsys):
    data = data()
    data.with_references(scale=2)
    message = refused(data.arguments("out", *V2V), capsys)
    assert "references were made with reference_downscale 2, this run has 1; give --reference_downscale 2" in message
    data.with_references(scale=1)
    message = refused(data.arguments("out", *V2V, "--reference_downscale", "2"), capsys)
    assert "references were made with reference_downscale 1, this run has 2" in message
    assert "--ltx2_mode video --reference_downscale 2 --skip_existing" in message


AUDIO_FLAGS = (
    "--audio_ref_use_negative_positions",
    "--audio_ref_mask_cross_attention_to_reference",
    "--audio_ref_mask_reference_from_text_attention",
)


@pytest.mark.parametrize("mode", ["av", "audio"])
def test_reference_sounds_are_trained_with(data, mode: str):
    data = data(mode)
    data.with_sounds()
    plain = data.run("plain", "--ic_lora_strategy", "audio_ref_only_ic")
    ruled = data.run("ruled", "--ic_lora_strategy", "audio_ref_only_ic", *AUDIO_FLAGS)
    assert plain.keys() == ruled.keys()
    assert not same(plain, ruled)
    metadata = metadata_of(data.folder / "ruled" / "x.safetensors")
    assert metadata["ss_lora_target_preset"] == ("audio" if mode == "audio" else "audio_ref_only_ic")
    assert metadata["ss_audio_ref_use_negative_positions"] == "True"
    data.write()
    without = data.run(
        "without", "--lora_target_preset", metadata["ss_lora_target_preset"], "--ic_lora_strategy", "none"
    )
    assert not same(plain, without)


def test_flags_of_reference_sounds_without_any_are_told_of(data, capsys):
    data = data("av")
    data.write()
    data.run("out", AUDIO_FLAGS[0], steps=1)
    assert (
        "--audio_ref_use_negative_positions: no effect on training with --ic_lora_strategy none"
        in capsys.readouterr().err
    )


def test_masks_are_trained_with(data, tmp_path: Path):
    data = data()
    data.write()
    plain = data.run("plain")
    cache = tmp_path / "masked"
    cache.mkdir()
    for path in data.cache.iterdir():
        (cache / path.name).write_bytes(path.read_bytes())
    data.cache = cache
    for name, path in data.targets("latents"):
        mask = torch.zeros(read_latent_header(path).grid)
        write_mask(cache / str(name.sibling("mask")), AV(mask), {})
    data.write('mask_directory = "masks not needed"')
    assert same(plain, data.run("empty")), "nothing is marked"
    for name, path in data.targets("latents"):
        mask = torch.zeros(read_latent_header(path).grid)
        mask[:, 0] = 1.0
        write_mask(cache / str(name.sibling("mask")), AV(mask), {})
    assert not same(plain, data.run("marked"))


def test_a_resumed_run_with_references_validation_and_average_equals_an_unbroken_one(data, logged):
    """Everything at once that a state, the bar's counters or a key of a random draw could get wrong."""
    data = data()
    data.with_references(scale=2)
    text = data.dataset.read_text(encoding="utf-8")
    section = text.partition("[[datasets]]")[2]
    for folder in (data.cache, data.references):
        copy = data.folder / f"validation {folder.name}"
        shutil.copytree(folder, copy)
        section = section.replace(f'"{folder.as_posix()}"', f'"{copy.as_posix()}"')
    data.dataset.write_text(f"{text}\n[[validation_datasets]]{section}", encoding="utf-8")
    flags = (
        *("--ic_lora_strategy", "v2v", "--reference_downscale", "2", "--num_timestep_buckets", "3"),
        *("--gradient_accumulation_steps", "3", "--ema_decay", "0.5", "--ema_update_every", "2"),
        *("--validate_every_n_steps", "2", "--network_dropout", "0.3", "--caption_dropout_rate", "0.5"),
        *("--save_state", "--save_every_n_steps", "3", "--no_save_original_lora", "--scale_weight_norms", "0.01"),
    )
    train(data.arguments("straight", *flags, steps=4))
    straight = {step: dict(values) for step, values in logged.items()}
    logged.clear()
    state = data.folder / "straight" / "x-step00000003-state"
    train(data.arguments("resumed", *flags, "--resume", str(state), steps=4))
    assert logged == {4: straight[4]}
    assert straight[4]["val_loss"] != straight[2]["val_loss"]
    names = ("x-state/network", "x-state/optimizer", "x-state/ema", "x.comfy", "x-ema.comfy")
    for name in names:
        assert same(*(load_file(data.folder / run / f"{name}.safetensors") for run in ("straight", "resumed"))), name
    assert not same(*(load_file(data.folder / "straight" / f"{name}.safetensors") for name in names[-2:]))
