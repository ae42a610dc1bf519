"""From a manifest to a trained LoRA, equal to that of the configuration it was made from."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training_runs import arguments, refused

from musubi_tuner.dataset.discovery import discover
from musubi_tuner.dataset.manifest import load_dataset_manifest
from musubi_tuner.demo.assets import Assets, asset_paths
from musubi_tuner.ltx2_cache_latents import main as cache_latents
from musubi_tuner.ltx2_cache_text_encoder_outputs import main as cache_text
from musubi_tuner.ltx2_train_network import main as train


@dataclass(frozen=True)
class Project:
    """A copy of the demo that a test may change."""

    assets: Assets
    mode: str = "av"

    @property
    def folder(self) -> Path:
        return self.assets.checkpoint.parent

    @property
    def dataset(self) -> Path:
        return self.assets.audio_dataset if self.mode == "audio" else self.assets.dataset

    def flags(self, manifest: Path | str) -> list[str]:
        return [
            *("--dataset_config", str(self.dataset), "--ltx2_checkpoint", str(self.assets.checkpoint)),
            *("--ltx2_mode", self.mode, "--skip_existing", "--save_dataset_manifest", str(manifest)),
        ]

    def cache_latents(self, manifest: Path | str) -> None:
        cache_latents(
            [*self.flags(manifest), "--vae_dtype", "fp32", "--ltx2_audio_dtype", "fp32", "--num_workers", "1"]
        )

    def cache_text(self, manifest: Path | str) -> None:
        cache_text([*self.flags(manifest), "--gemma_root", str(self.assets.gemma)])

    def training(self, output: Path, *extra: str, manifest: Path | None = None, steps: int = 4) -> list[str]:
        argv = arguments(self.assets, output, "--save_state", *extra, steps=steps, mode=self.mode)
        return argv if manifest is None else ["--dataset_manifest", str(manifest), *argv[2:]]

    def moved_without_sources(self, target: Path) -> Project:
        for path in (self.assets.videos, self.assets.sounds):
            shutil.rmtree(path)
        for path in (self.assets.dataset, self.assets.audio_dataset):
            path.unlink()
        return Project(asset_paths(self.folder.rename(target)), self.mode)


@pytest.fixture
def project(cached_demo, tmp_path: Path):
    def copy(mode: str = "av") -> Project:
        source = cached_demo("2.3", mode).checkpoint.parent
        return Project(asset_paths(Path(shutil.copytree(source, tmp_path / "first place"))), mode)

    return copy


def assert_equal_weights(one: Path, other: Path) -> None:
    for name in ("x-state/network.safetensors", "x-state/optimizer.safetensors"):
        a, b = load_file(one / name), load_file(other / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name


def losses(output: Path) -> list[float]:
    """Of each step, from the files beside the LoRAs."""
    files = sorted(output.glob("x-step*.json"))
    return [json.loads(file.read_text(encoding="utf-8"))["loss"] for file in files]


@pytest.mark.parametrize("mode", ["av", "audio"])
def test_the_same_run_without_sources_and_configuration(project, tmp_path: Path, monkeypatch, mode: str) -> None:
    here = project(mode)
    here.cache_latents(here.folder / "manifest.json")
    each_step = ("--save_every_n_steps", "1", "--save_checkpoint_metadata")
    train(here.training(tmp_path / "configuration", *each_step))
    there = here.moved_without_sources(tmp_path / "zweiter Ort é")
    monkeypatch.chdir(there.folder)
    train(there.training(tmp_path / "manifest", *each_step, manifest=Path("manifest.json")))
    assert len(losses(tmp_path / "manifest")) >= 3
    assert losses(tmp_path / "manifest") == losses(tmp_path / "configuration")
    assert_equal_weights(tmp_path / "configuration", tmp_path / "manifest")


def test_a_run_resumes_from_the_manifest(project, tmp_path: Path) -> None:
    here = project()
    here.cache_text(here.folder / "manifest.json")
    train(here.training(tmp_path / "straight"))
    train(here.training(tmp_path / "half", "--save_every_n_steps", "2"))
    there = here.moved_without_sources(tmp_path / "second place")
    resume = ("--resume", str(tmp_path / "half" / "x-step00000002-state"))
    train(there.training(tmp_path / "resumed", *resume, manifest=there.folder / "manifest.json"))
    assert_equal_weights(tmp_path / "straight", tmp_path / "resumed")


@pytest.mark.parametrize("first", ["latents", "text"])
def test_either_script_may_come_last(project, first: str) -> None:
    here = project()
    few = sorted(here.assets.videos.glob("*.mp4"))[2:]
    for path in (*few, *here.assets.cache.glob("*.safetensors")):
        path.unlink()
    manifest = here.folder / "manifest.json"
    scripts = {"latents": here.cache_latents, "text": here.cache_text}
    scripts.pop(first)(manifest)
    (last,) = scripts.values()
    last(manifest)
    items = list(discover(load_dataset_manifest(manifest), "av").items())
    assert len(items) == len(list(here.assets.videos.glob("*.mp4"))) > 0
    assert all(item.audio_steps for item in items)


def test_a_failing_file_is_not_in_the_manifest(project, tmp_path: Path, capsys) -> None:
    here = project()
    broken = sorted(here.assets.videos.glob("*.mp4"))[0]
    broken.write_bytes(b"no video")
    for path in here.assets.cache.glob(f"{broken.stem}*_ltx2*.safetensors"):
        path.unlink()
    manifest = here.folder / "manifest.json"
    with pytest.raises(SystemExit) as stop:
        here.cache_latents(manifest)
    assert stop.value.code == 1
    assert f"not cached and so not listed: {broken.stem}" in capsys.readouterr().err
    train(here.training(tmp_path / "out", manifest=manifest, steps=1))
    assert f"was not cached and is left out: {broken.stem}" in capsys.readouterr().err


def test_a_missing_file_is_refused_before_the_model_is_loaded(project, tmp_path: Path, capsys) -> None:
    here = project()
    manifest = here.folder / "manifest.json"
    here.cache_latents(manifest)
    lost = sorted(here.assets.cache.glob("*_te.safetensors"))[0]
    lost.unlink()
    message = refused(here.training(tmp_path / "out", manifest=manifest), capsys)
    assert f"{lost.name}: text caches that the manifest lists are not in" in message
    assert "--save_dataset_manifest" in message
    assert not (tmp_path / "out").exists()


def test_exactly_one_of_configuration_and_manifest(project, tmp_path: Path, capsys) -> None:
    here = project()
    manifest = here.folder / "manifest.json"
    manifest.write_text("{}", encoding="utf-8")
    argv = here.training(tmp_path / "out")
    message = refused([*argv, "--dataset_manifest", str(manifest)], capsys)
    assert "--dataset_config and --dataset_manifest exclude each other" in message
    assert "--dataset_config is required, or else --dataset_manifest" in refused(argv[2:], capsys)
    assert "format: expected" in refused(here.training(tmp_path / "out", manifest=manifest), capsys)


def test_a_manifest_is_not_saved_where_it_would_do_harm(project, capsys) -> None:
    here = project()
    for target, message in ((here.dataset, "would replace the dataset configuration"), (here.folder, "is a folder")):
        with pytest.raises(SystemExit) as stop:
            here.cache_latents(target)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cache_latents([*here.flags(here.folder / "m.json"), "--dry_run"])
    assert "--dry_run and --debug_mode cache nothing" in capsys.readouterr().err
