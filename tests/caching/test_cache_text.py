import errno
import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_encoders import AUDIO_WIDTH, TOKENS, VIDEO_WIDTH, FakeTextEncoder

from musubi_tuner.caching.pipeline import RunOptions
from musubi_tuner.caching.text import (
    TextRecipe,
    cache_sample_prompts,
    cache_text,
    gemma_fingerprint,
    read_sample_prompts,
)
from musubi_tuner.common.errors import UserError
from musubi_tuner.common.safetensors_io import SafetensorsFile, save_safetensors
from musubi_tuner.dataset.entries import DatasetConfig, DatasetEntry
from musubi_tuner.dataset.items import EncoderRecord
from musubi_tuner.generation.prompt_cache import load_prompt_cache
from musubi_tuner.generation.prompts import SamplePrompt

RECIPE = TextRecipe("av", EncoderRecord("connectors id"), "gemma id")
PLAIN = RunOptions(workers=2)
SKIP = RunOptions(skip_existing=True)


@pytest.fixture
def entry(tmp_path: Path) -> DatasetEntry:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.mp4").write_bytes(b"never opened")
        (folder / f"{name}.txt").write_text(f"caption of {name}", encoding="utf-8")
    return DatasetEntry("datasets[0]", "video", folder, tmp_path / "cache", batch_size=2)


def _run(entry: DatasetEntry, recipe: TextRecipe = RECIPE, options: RunOptions = PLAIN, encoder=None):
    return cache_text(
        DatasetConfig((entry,), (), Path("data.toml")), recipe, lambda: encoder or FakeTextEncoder(), options=options
    )


def _counts(summary) -> tuple[int, int, int]:
    tally = summary.tally("datasets[0]", "text")
    return tally.encoded, tally.current, tally.failed


def test_one_file_a_source_with_the_documented_keys(entry: DatasetEntry) -> None:
    summary = _run(entry)
    assert summary.finish(allow_failed=False) == 0
    files = sorted(entry.cache_directory.iterdir())
    assert [f.name for f in files] == ["a_ltx2_te.safetensors", "b_ltx2_te.safetensors", "c_ltx2_te.safetensors"]
    file = SafetensorsFile(files[0])
    assert {k: i.shape for k, i in file.tensors.items()} == {
        "video_prompt_embeds_float32": (TOKENS, VIDEO_WIDTH),
        "audio_prompt_embeds_float32": (TOKENS, AUDIO_WIDTH),
        "prompt_attention_mask": (TOKENS,),
        "text_float32": (TOKENS, VIDEO_WIDTH + AUDIO_WIDTH),
        "text_mask": (TOKENS,),
    }
    assert file.metadata["caption1"] == "caption of a"
    assert file.metadata["ltx2_mode"] == "av"
    assert file.metadata["encoder_id"] == "connectors id"
    assert file.metadata["architecture"] == "ltx2_v1"
    assert file.metadata["source_name"] == "a.txt"


def test_mode_video_and_no_legacy_keys(entry: DatasetEntry) -> None:
    _run(entry, replace(RECIPE, mode="video", dtype=torch.bfloat16, legacy_keys=False))
    file = SafetensorsFile(entry.cache_directory / "a_ltx2_te.safetensors")
    assert set(file.tensors) == {"video_prompt_embeds_bfloat16", "prompt_attention_mask"}


def test_the_encoder_is_not_loaded_when_all_is_current(entry: DatasetEntry) -> None:
    _run(entry)

    def never():
        raise AssertionError("loaded")

    summary = cache_text(DatasetConfig((entry,), (), Path("x.toml")), RECIPE, never, options=SKIP)
    assert _counts(summary) == (0, 3, 0)


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (replace(RECIPE, connectors=EncoderRecord("other")), "another checkpoint"),
        (replace(RECIPE, gemma_id="other"), "changed: gemma"),
        (replace(RECIPE, dtype=torch.bfloat16), "changed: dtype"),
        (replace(RECIPE, max_length=256), "changed: max_length"),
    ],
)
def test_what_changed_is_encoded_again(entry: DatasetEntry, recipe: TextRecipe, reason: str) -> None:
    _run(entry)
    summary = _run(entry, recipe, SKIP)
    assert _counts(summary) == (3, 0, 0)
    assert summary.reasons == {reason: 3}


def test_embeddings_of_mode_av_serve_the_other_modes_but_not_the_reverse(entry: DatasetEntry) -> None:
    _run(entry, RECIPE)
    for mode in ("video", "audio"):
        assert _counts(_run(entry, replace(RECIPE, mode=mode), SKIP)) == (0, 3, 0)
    _run(entry, replace(RECIPE, mode="video"))
    summary = _run(entry, RECIPE, SKIP)
    assert summary.reasons == {"changed: modalities": 3}


def test_only_a_changed_caption_counts_not_its_date(entry: DatasetEntry) -> None:
    _run(entry)
    (entry.source / "a.txt").write_text("caption of a\n", encoding="utf-8")
    (entry.source / "b.txt").write_text("another caption", encoding="utf-8")
    encoder = FakeTextEncoder()
    summary = _run(entry, options=SKIP, encoder=encoder)
    assert encoder.prompts == ["another caption"]
    assert summary.reasons == {"changed: caption": 1}


def test_foreign_text_caches_are_kept_if_caption_and_parts_fit(entry: DatasetEntry) -> None:
    entry.cache_directory.mkdir()
    video = {"video_prompt_embeds_bfloat16": torch.ones(TOKENS, VIDEO_WIDTH)}
    both = video | {"audio_prompt_embeds_bfloat16": torch.ones(TOKENS, AUDIO_WIDTH)}
    for name, tensors, caption in (("a", both, "caption of a"), ("b", both, "old"), ("c", video, "caption of c")):
        save_safetensors(tensors, entry.cache_directory / f"{name}_ltx2_te.safetensors", {"caption1": caption})
    assert _counts(_run(entry, options=SKIP)) == (2, 1, 0)


def test_one_bad_caption_fails_alone(entry: DatasetEntry, caplog) -> None:
    encoder = FakeTextEncoder()
    encoder.bad = {"caption of b"}
    stale = entry.cache_directory / "gone_ltx2_te.safetensors"
    entry.cache_directory.mkdir()
    stale.write_bytes(b"x")
    summary = _run(entry, encoder=encoder)
    assert _counts(summary) == (2, 0, 1)
    assert summary.finish(allow_failed=False) == 1
    assert stale.exists()  # nothing is deleted after failures
    _run(entry)
    assert not stale.exists()


def test_keep_cache_keeps_texts_of_vanished_items(entry: DatasetEntry) -> None:
    _run(entry)
    (entry.source / "a.mp4").unlink()
    _run(entry, options=RunOptions(keep_cache=True))
    assert (entry.cache_directory / "a_ltx2_te.safetensors").exists()
    _run(entry)
    assert not (entry.cache_directory / "a_ltx2_te.safetensors").exists()


def test_missing_captions_are_named(entry: DatasetEntry, caplog) -> None:
    (entry.source / "a.txt").unlink()
    (entry.source / "b.txt").write_bytes(b"\xff\xfe\xff")
    with caplog.at_level(logging.WARNING):
        summary = _run(entry)
    assert _counts(summary) == (1, 0, 0)
    assert "no caption file a.txt" in caplog.text
    assert "b.txt is not UTF-8" in caplog.text


def test_gemma_is_known_by_its_weights_and_quantisation(tmp_path: Path) -> None:
    def folder(name: str, fill: int) -> Path:
        path = tmp_path / name
        path.mkdir()
        (path / "model-00001.safetensors").write_bytes(bytes([fill]) * 100_000)
        return path

    first, copy, other = folder("first", 1), folder("copy", 1), folder("other", 2)
    assert gemma_fingerprint(first) == gemma_fingerprint(copy)
    assert len({gemma_fingerprint(first), gemma_fingerprint(other), gemma_fingerprint(first, "8bit")}) == 3
    assert gemma_fingerprint(first / "model-00001.safetensors") == gemma_fingerprint(first)


def test_sample_prompts_keep_a_negative_prompt_for_guidance_set_later(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog --n blurry --g 1\n", encoding="utf-8")
    path = tmp_path / "cache.pt"
    cache_sample_prompts(path, read_sample_prompts(prompts), RECIPE, FakeTextEncoder())
    content = torch.load(path, weights_only=True)
    assert (content["version"], content["ltx_mode"], content["audio_video"]) == (2, "av", True)
    first, second = content["prompt_cache"]
    assert first["prompt_embeds"].shape == (TOKENS, VIDEO_WIDTH + AUDIO_WIDTH)
    assert first["prompt_attention_mask"].shape == (TOKENS,)
    assert first["negative_prompt"] == ""
    assert second["negative_prompt"] == "blurry"


def test_sample_prompts_of_other_connectors_belong_to_the_checkpoint_they_stand_in_for(tmp_path: Path) -> None:
    recipe = replace(RECIPE, connectors=EncoderRecord("named", replaces="its own"))
    path = tmp_path / "cache.pt"
    prompts = [SamplePrompt(prompt="a cat")]
    cache_sample_prompts(path, prompts, recipe, FakeTextEncoder())
    assert len(load_prompt_cache(path, "av", prompts, encoder_id="its own")) == 1
    with pytest.raises(UserError, match="another checkpoint"):
        load_prompt_cache(path, "av", prompts, encoder_id="of a third")


def test_a_full_disk_ends_the_run_with_one_message(entry: DatasetEntry, monkeypatch) -> None:
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("musubi_tuner.caching.text.write_text", full)
    with pytest.raises(UserError, match="make room"):
        _run(entry)


@pytest.mark.skipif(os.name == "nt", reason="the length of whole paths is what is limited there")
def test_a_name_too_long_for_a_cache_fails_alone(entry: DatasetEntry) -> None:
    name = "x" * 250  # with its extension a name may have 255 characters
    (entry.source / f"{name}.mp4").touch()
    (entry.source / f"{name}.txt").write_text("caption", encoding="utf-8")
    for options in (PLAIN, SKIP):
        summary = _run(entry, options=options)
        assert _counts(summary)[2] == 1
        assert len(list(entry.cache_directory.iterdir())) == 3
        assert summary.finish(allow_failed=False) == 1
