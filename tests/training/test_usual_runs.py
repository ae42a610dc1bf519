"""The usual recipes run on the demo's files: with their paths replaced, and without what does not exist yet."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_reference_runs import Data
from usual_commands import Command, commands

from musubi_tuner.ltx2_cache_latents import main as cache_latents
from musubi_tuner.ltx2_cache_text_encoder_outputs import main as cache_text
from musubi_tuner.ltx2_merge_lora import main as merge
from musubi_tuner.ltx2_train_network import main as train

SHORT = ("--max_train_steps", "2", "--max_data_loader_n_workers", "0", "--seed", "1")


def find(script: str, *flags: str) -> Command:
    """The first recipe of a script with all of these flags."""
    return next(c for c in commands() if c.script == script and set(flags) <= set(c.arguments))


def adapted(command: Command, values: Mapping[str, object]) -> list[str]:
    """Its arguments with other values, without what is refused and what only a GPU has."""
    left_out = {f"--{name}" for name in command.refuses}
    if not torch.cuda.is_available():
        left_out |= {"--gemma_load_in_8bit", "--device"}
    argv: list[str] = []
    words = iter(command.arguments)
    drop = False
    for word in words:
        if word.startswith("--"):
            drop = word in left_out
            if not drop:
                argv.append(word)
                if word[2:] in values:
                    argv.append(str(values[word[2:]]))
                    next(words)
        elif not drop:
            argv.append(word)
    return argv


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.slow
def test_caching(demo_assets, tmp_path: Path):
    from musubi_tuner.demo.assets import asset_paths

    shutil.copytree(demo_assets().checkpoint.parent, tmp_path / "demo")
    assets = asset_paths(tmp_path / "demo")
    values = {"dataset_config": assets.dataset, "ltx2_checkpoint": assets.checkpoint, "gemma_root": assets.gemma}
    cache_latents(adapted(find("ltx2_cache_latents.py", "--ltx2_audio_source"), values))
    cache_text(adapted(find("ltx2_cache_text_encoder_outputs.py", "--batch_size", "--ltx2_mode"), values))
    names = {path.name.rpartition("_ltx2")[2] for path in assets.cache.glob("*.safetensors")}
    assert names == {".safetensors", "_audio.safetensors", "_te.safetensors"}


@pytest.mark.parametrize("mode", ["video", pytest.param("av", marks=pytest.mark.slow), "audio"])
def test_recipes_with_references_and_merging(cached_demo, tmp_path: Path, mode: str):
    assets = cached_demo("2.3", mode)
    data = Data(assets, tmp_path, mode)
    data.with_references() if mode == "video" else data.with_sounds()
    name = {"video": "ltx2_ic_lora", "av": "ltx2_audio_ref_ic_lora", "audio": "ltx2_audio_ref_ic_lora_audioonly"}[mode]
    values = {"dataset_config": data.dataset, "ltx2_checkpoint": assets.checkpoint, "sample_prompts": assets.prompts}
    train([*adapted(find("ltx2_train_network.py", name), {**values, "output_dir": tmp_path / "out"}), *SHORT])
    strategy = "v2v" if mode == "video" else "audio_ref_only_ic"
    trained = tmp_path / "out" / f"{name}.safetensors"
    assert metadata_of(trained)["ss_ic_lora_strategy"] == strategy
    assert any((tmp_path / "out" / "sample").iterdir())

    merged = tmp_path / "merged.safetensors"
    inputs = {"lora_A": trained, "lora_B": trained.with_suffix(".comfy.safetensors"), "merged_lora": merged}
    argv = find("ltx2_merge_lora.py", "--lora_multiplier").arguments
    merge([str(inputs.get(Path(word).stem, word)) for word in argv])
    assert metadata_of(merged)["ss_ltx_version"] == "2.3"
