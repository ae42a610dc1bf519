"""From a JSONL list to a trained LoRA, equal to that of the same clips in a directory."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from conftest import run_caching
from safetensors.torch import load_file
from test_training_runs import arguments

from musubi_tuner.ltx2_train_network import main as train

DATASET = """
[general]
resolution = [192, 128]
enable_bucket = true
[[datasets]]
video_jsonl_file = "clips.jsonl"
cache_directory = "my cache"
target_frames = [17]
"""


def test_a_list_trains_like_its_directory(cached_demo, tmp_path: Path) -> None:
    directory = cached_demo()
    clips = sorted(directory.videos.glob("*.mp4"))
    captions = [clip.with_suffix(".txt").read_text(encoding="utf-8") for clip in clips]
    lines = [{"video_path": str(clip), "caption": text} for clip, text in zip(clips, captions, strict=True)]
    (tmp_path / "clips.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    (tmp_path / "data.toml").write_text(DATASET, encoding="utf-8")
    listed = replace(directory, dataset=tmp_path / "data.toml", cache=tmp_path / "my cache")
    run_caching(listed, "av")

    names = sorted(path.name for path in listed.cache.glob("*.safetensors"))
    assert names == sorted(path.name for path in directory.cache.glob("*.safetensors"))
    for name in names:
        one, other = load_file(directory.cache / name), load_file(listed.cache / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    for assets, run in ((directory, "directory"), (listed, "listed")):
        train(arguments(assets, tmp_path / run))
    one, other = (load_file(tmp_path / run / "x.safetensors") for run in ("directory", "listed"))
    assert all(torch.equal(one[key], other[key]) for key in one)
