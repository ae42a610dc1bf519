import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cache_files import AUDIO_WIDTH, VIDEO_WIDTH, WIDTHS, write_item

from musubi_tuner.common.av import AV
from musubi_tuner.common.errors import ConfigErrors
from musubi_tuner.common.safetensors_io import save_safetensors
from musubi_tuner.dataset.discovery import discover
from musubi_tuner.dataset.entries import DatasetConfig, DatasetEntry
from musubi_tuner.dataset.fingerprint import EncoderIds, RepairCommands, cache_key, check_caches, provenance
from musubi_tuner.dataset.items import EncoderRecord

ENCODERS = EncoderIds("video id", "audio id", "text id")
COMMANDS = RepairCommands(Path("my data.toml"), Path("ltx2.safetensors"), "av", ("--gemma_root", "gemma"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.mp4").write_bytes(b"never opened")
        (folder / f"{name}.txt").write_text(f"caption of {name}", encoding="utf-8")
    return folder


def _entry(source: Path, **options) -> DatasetEntry:
    defaults = {"kind": "video", "resolution": (64, 32), "target_frames": (9,), "label": "datasets[0]"}
    cache = source.parent / "cache"
    cache.mkdir(exist_ok=True)
    return DatasetEntry(**(defaults | {"source": source, "cache_directory": cache} | options))


def _made(source: Path, name: str = "a", *, settings=None, encoders=ENCODERS, text_mode="av") -> dict:
    """Metadata as the caching scripts write it."""
    file = source / f"{name}.mp4"
    clip = {"target_fps": 25.0, "source_fps": None, "bucket": "64x32"} | (settings or {})
    return {
        "latents": provenance(file, _record(encoders.video_vae), clip),
        "audio": provenance(file, _record(encoders.audio_vae), {}),
        "text": provenance(file, _record(encoders.text), {}) | {"ltx2_mode": text_mode},
    }


def _record(encoder: str | EncoderRecord) -> EncoderRecord:
    return encoder if isinstance(encoder, EncoderRecord) else EncoderRecord(encoder)


def _write(entry: DatasetEntry, stem: str, *, count: int = 9, start: int = 0, **options):
    options.setdefault("metadata", _made(entry.source, stem))
    item = write_item(
        entry.cache_directory,
        f"{stem}_{start:05d}-{count:03d}",
        stem=stem,
        grid=((count - 1) // 8 + 1, 1, 2),
        frame_count=count,
        **options,
    )
    # write_item names the clip in its caption; a real text cache has the source's own.
    if options["metadata"].get("text"):
        _rewrite_caption(item.text, f"caption of {stem}")
    return item


def _rewrite_caption(path: Path, caption: str) -> None:
    from musubi_tuner.common.safetensors_io import SafetensorsFile

    file = SafetensorsFile(path)
    save_safetensors(dict(file.read()), path, file.metadata | {"caption1": caption})


def _discover(entry: DatasetEntry, mode: str = "av", **options):
    return discover(DatasetConfig((entry,), (), Path("data.toml")), mode, **options)


def _check(training_set, **options) -> None:
    check_caches(training_set, **({"encoders": ENCODERS, "commands": COMMANDS, "text_widths": WIDTHS} | options))


def test_items_are_found_with_what_batching_needs(source: Path) -> None:
    entry = _entry(source, num_repeats=3, batch_size=2, video_loss_weight=0.5, separate_audio_buckets=True)
    _write(entry, "a", audio_steps=9)
    _write(entry, "b")
    training_set = _discover(entry)
    assert training_set.problems == ()
    _check(training_set)
    (dataset,) = training_set.datasets
    assert (dataset.num_repeats, dataset.batch_size, dataset.separate_audio_buckets) == (3, 2, True)
    assert dataset.loss_weights == AV(0.5, None)
    a, b = dataset.items
    assert (a.base, a.grid, a.audio_steps, a.text_tokens, a.fps) == ("a_00000-009", (2, 1, 2), 9, 6, 25.0)
    assert (b.audio, b.audio_steps) == (None, 0)
    assert a.text_widths == AV(VIDEO_WIDTH, AUDIO_WIDTH)


def test_mode_video_takes_the_caches_of_mode_av(source: Path) -> None:
    entry = _entry(source)
    _write(entry, "a", audio_steps=9)
    training_set = _discover(entry, "video")
    _check(training_set)
    assert [item.audio for item in training_set.items()] == [None]


def test_only_items_of_the_configuration_count(source: Path, caplog) -> None:
    entry = _entry(source)
    _write(entry, "a")
    write_item(entry.cache_directory, "stranger_00000-009", stem="stranger")
    with caplog.at_level(logging.INFO):
        training_set = _discover(entry)
    assert [item.base for item in training_set.items()] == ["a_00000-009"]
    assert "caches of no item of this dataset are ignored: stranger_00000-009" in caplog.text
    assert "no cached latents for b, c; left out" in caplog.text


@pytest.mark.parametrize("missing", ["cache_only", "moved"])
def test_without_its_sources_a_dataset_is_all_that_is_cached(source: Path, missing: str) -> None:
    entry = _entry(source, frame_extraction="chunk")
    _write(entry, "a")
    _write(entry, "b", start=9)
    where = None if missing == "cache_only" else source / "moved"
    training_set = _discover(replace(entry, source=where, cache_only=where is None))
    assert [item.base for item in training_set.items()] == ["a_00000-009", "b_00009-009"]


def test_a_dataset_of_caches_alone_need_not_repeat_what_they_were_made_with(source: Path) -> None:
    entry = _entry(source, frame_extraction="chunk")
    _write(entry, "a")
    _write(entry, "b", start=17, count=17)
    alone = DatasetEntry("datasets[0]", "video", None, entry.cache_directory, cache_only=True)
    training_set = _discover(alone)
    _check(training_set)
    assert [item.base for item in training_set.items()] == ["a_00000-009", "b_00017-017"]
    for said in ({"target_frames": (9,)}, {"resolution": (32, 32)}):
        assert _discover(replace(alone, **said)).problems, "what is said must agree"


def test_images_and_stems_that_look_like_clips(tmp_path: Path) -> None:
    source = tmp_path / "images"
    source.mkdir()
    (source / "x_00000-049.png").write_bytes(b"x")
    (source / "x_00000-049.txt").write_text("x", encoding="utf-8")
    entry = _entry(source, kind="image")
    write_item(entry.cache_directory, "x_00000-049", grid=(1, 1, 2))
    (item,) = _discover(entry).items()
    assert (item.base, item.fps) == ("x_00000-049", 25.0)


def test_target_fps_of_the_cache_reaches_the_batch(source: Path) -> None:
    entry = _entry(source, target_fps=24.0)
    _write(entry, "a", metadata=_made(source, settings={"target_fps": 24.0}))
    assert [item.fps for item in _discover(entry).items()] == [24.0]


def test_nothing_cached_gives_counts_and_the_next_step(source: Path) -> None:
    entry = _entry(source)
    with pytest.raises(ConfigErrors, match=r"sources 3, latent caches 0, text caches 0.*ltx2_cache_latents\.py"):
        _discover(entry)
    item = _write(entry, "a")
    item.text.unlink()
    with pytest.raises(ConfigErrors, match=r"latent caches 1, text caches 0.*ltx2_cache_text_encoder_outputs\.py"):
        _discover(entry)
    item.latents.rename(item.latents.with_name("z_00000-009_0064x0032_ltx2.safetensors"))
    with pytest.raises(ConfigErrors, match=r"the caches \(z_00000-009\) belong to other sources"):
        _discover(entry)
    for file in source.glob("*.txt"):
        file.unlink()
    with pytest.raises(ConfigErrors, match=r"no source has a caption file \*\.txt"):
        _discover(entry)


def test_the_report_tells_the_share_of_sound(source: Path, caplog) -> None:
    entry = _entry(source)
    _write(entry, "a", audio_steps=3)
    _write(entry, "b")
    with caplog.at_level(logging.INFO):
        _discover(entry)
    assert "1 of 2 items have sound (50%)" in caplog.text


def test_latents_cached_for_video_and_trained_with_sound_are_noticed(source: Path, caplog) -> None:
    entry = _entry(source)
    _write(entry, "a")
    with caplog.at_level(logging.WARNING):
        _discover(entry)
    assert "no item has cached sound" in caplog.text
    assert "--ltx2_mode av" in caplog.text


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"target_fps": 24.0}, "latents were made with target_fps 25, the configuration says 24"),
        ({"source_fps": 30.0}, "latents were made with source_fps detected, the configuration says 30"),
        ({"resolution": (96, 64)}, "latents have 64x32 pixels, resolution is 96x64"),
        ({"target_frames": (17,)}, r"latents have 9 frames, target_frames is \[17\]"),
    ],
)
def test_changed_settings_are_refused(source: Path, change: dict, cause: str) -> None:
    entry = _entry(source)
    _write(entry, "a")
    _write(entry, "b", metadata=_made(source, "b"))
    training_set = _discover(_entry(source, **change))
    with pytest.raises(ConfigErrors, match=cause) as error:
        _check(training_set)
    assert len(error.value.problems) == 1
    assert "a_00000-009, b_00000-009" in error.value.problems[0]
    assert 'python ltx2_cache_latents.py --dataset_config "my data.toml" --ltx2_checkpoint' in str(error.value)


def test_leftovers_beside_current_caches_are_ignored(source: Path, caplog) -> None:
    entry = _entry(source)
    _write(entry, "a")
    _write(entry, "a", count=17)
    with caplog.at_level(logging.WARNING):
        training_set = _discover(entry)
    assert [item.base for item in training_set.items()] == ["a_00000-009"]
    assert "caches from other settings are ignored: a_00000-017" in caplog.text
    _check(training_set)


@pytest.mark.parametrize(
    ("encoders", "what", "script"),
    [
        (EncoderIds("other", "audio id", "text id"), "video latents", "ltx2_cache_latents.py"),
        (EncoderIds("video id", "other", "text id"), "audio latents", "ltx2_cache_latents.py"),
        (
            EncoderIds("video id", "audio id", "other"),
            "text embeddings",
            "ltx2_cache_text_encoder_outputs.py .*--gemma_root gemma",
        ),
    ],
)
def test_caches_of_another_checkpoint_are_refused(source: Path, encoders: EncoderIds, what: str, script: str) -> None:
    entry = _entry(source, frame_extraction="chunk")
    for stem in "abc":
        _write(entry, stem, audio_steps=3, metadata=_made(source, stem))
        _write(entry, stem, start=9, metadata=_made(source, stem))
    with pytest.raises(ConfigErrors, match=f"{what} were made with another checkpoint; run: python {script}") as error:
        _check(_discover(entry), encoders=encoders)
    assert len(error.value.problems) == 1
    if what != "audio latents":
        assert "and 1 more (6 in all)" in str(error.value)


def test_caches_made_on_purpose_with_another_encoder_file_are_used(source: Path) -> None:
    named = EncoderIds(EncoderRecord("vae.safetensors", "video id"), "audio id", EncoderRecord("text.st", "text id"))
    entry = _entry(source)
    for stem in "abc":
        _write(entry, stem, audio_steps=3, metadata=_made(source, stem, encoders=named))
    _check(_discover(entry))
    _check(_discover(entry), encoders=EncoderIds("vae.safetensors", "audio id", "text.st"))
    with pytest.raises(ConfigErrors, match="video latents were made with another checkpoint"):
        _check(_discover(entry), encoders=EncoderIds("a third", "audio id", "text id"))


@pytest.mark.parametrize("own", ["video id", None])
def test_a_mixture_of_encoders_is_refused(source: Path, own: str | None) -> None:
    named = EncoderIds(EncoderRecord("vae.safetensors", own), "audio id", "text id")
    entry = _entry(source)
    for stem in "abc":
        _write(entry, stem, metadata=_made(source, stem, encoders=named if stem == "b" else ENCODERS))
    message = "b_00000-009: video latents were made with another encoder than the rest; use the same --vae for all"
    with pytest.raises(ConfigErrors, match=message):
        _check(_discover(entry), encoders=EncoderIds(own, "audio id", "text id"))


@pytest.mark.parametrize(
    ("change", "bases"),
    [
        ({"frame_extraction": "head"}, {"a_00000-009"}),
        ({"frame_extraction": "full"}, {"a_00000-009"}),
        ({"frame_extraction": "chunk"}, {"a_00000-009", "a_00009-009"}),
        ({"frame_extraction": "slide", "frame_stride": 2}, {"a_00000-009", "a_00004-009"}),
        ({"frame_extraction": "uniform", "frame_sample": 3}, {"a_00000-009", "a_00004-009", "a_00009-009"}),
    ],
)
def test_clips_of_another_extraction_are_not_trained(source: Path, change: dict, bases: set[str]) -> None:
    entry = _entry(source, **change)
    for start in (0, 4, 9):
        _write(entry, "a", start=start)
    assert {item.base for item in _discover(entry).items()} == bases


@pytest.mark.parametrize(
    ("recorded", "options", "told"),
    [
        (("head",), {"frame_extraction": "chunk"}, True),
        (("full 65",), {"frame_extraction": "full"}, True),
        (("head", "chunk"), {"frame_extraction": "chunk"}, False),  # the new clips were added, the old one was kept
        (("chunk",), {"frame_extraction": "chunk"}, False),
        ((None,), {"frame_extraction": "chunk"}, False),  # not known
    ],
)
def test_clips_that_may_be_missing_after_another_extraction_are_told(source, caplog, recorded, options, told) -> None:
    entry = _entry(source, **options)
    for index, rule in enumerate(recorded):
        made = _made(source, "a")
        made["latents"] |= {"frame_extraction": rule} if rule else {}
        _write(entry, "a", start=9 * index, metadata=made)
    with caplog.at_level(logging.WARNING):
        _discover(entry)
    assert ("a: cached with other settings of frame_extraction" in caplog.text) == told


def test_what_mode_video_does_not_use_is_not_checked(source: Path) -> None:
    entry = _entry(source)
    _write(entry, "a", audio_steps=3)
    _check(_discover(entry, "video"), encoders=EncoderIds("video id", "other", "text id"))


def test_text_of_mode_video_is_refused_in_mode_av(source: Path) -> None:
    entry = _entry(source)
    _write(entry, "a", text=AV(VIDEO_WIDTH), metadata=_made(source, text_mode="video"))
    with pytest.raises(ConfigErrors, match="lack the audio part that mode av needs") as error:
        _check(_discover(entry))
    assert "ltx2_cache_text_encoder_outputs.py" in str(error.value)
    assert "--ltx2_mode av" in str(error.value)
    _check(_discover(entry, "video"))


def test_a_changed_caption_is_refused(source: Path) -> None:
    entry = _entry(source)
    _write(entry, "a")
    (source / "a.txt").write_text("something else", encoding="utf-8")
    with pytest.raises(ConfigErrors, match="a: captions changed since they were encoded"):
        _check(_discover(entry))


def test_sound_of_an_older_source_is_refused(source: Path) -> None:
    entry = _entry(source)
    metadata = _made(source)
    metadata["audio"] = metadata["audio"] | {"source_mtime_ns": "1"}
    _write(entry, "a", audio_steps=3, metadata=metadata)
    with pytest.raises(ConfigErrors, match="sound and picture were cached from different states"):
        _check(_discover(entry))
    _check(_discover(entry, "video"))


def test_the_repairing_command_can_be_pasted() -> None:
    latents = 'python ltx2_cache_latents.py --dataset_config "my data.toml" --ltx2_checkpoint ltx2.safetensors'
    assert COMMANDS["latents"] == f"{latents} --ltx2_mode av --skip_existing"
    assert COMMANDS["text"].endswith("--ltx2_mode av --gemma_root gemma --skip_existing")
    assert COMMANDS["text anew"].endswith("--ltx2_mode av --gemma_root gemma")


def test_latents_of_another_mode_are_refused(source: Path) -> None:
    entry = _entry(source)
    metadata = _made(source)
    write_item(
        entry.cache_directory, "a_00000-009", stem="a", grid=(1, 1, 1), virtual_grid=(2, 2, 2), metadata=metadata
    )
    with pytest.raises(ConfigErrors, match="latents were made in mode audio, this run is mode av"):
        _check(_discover(entry))


def test_a_damaged_cache_is_named(source: Path) -> None:
    entry = _entry(source)
    item = _write(entry, "a")
    item.latents.write_bytes(item.latents.read_bytes()[:-3])
    with pytest.raises(ConfigErrors, match=r"a_00000-009: unreadable cache: .*truncated"):
        _check(_discover(entry))


def test_foreign_caches_are_used_with_a_warning_when_shapes_fit(source: Path, caplog) -> None:
    entry = _entry(source)
    write_item(entry.cache_directory, "a_00000-009", stem="a", audio_steps=3)
    with caplog.at_level(logging.WARNING):
        _check(_discover(entry))
    assert "a_00000-009: caches without a record of the checkpoint" in caplog.text
    with pytest.raises(
        ConfigErrors, match=r"have the width 5 \(video\) and 3 \(audio\), .* needs 7 \(video\) and 3 \(audio\)"
    ):
        _check(_discover(entry), text_widths=AV(7, 3))


def test_old_text_caches_fit_by_the_sum_of_their_widths(source: Path) -> None:
    entry = _entry(source)
    item = write_item(entry.cache_directory, "a_00000-009", stem="a", audio_steps=3)
    save_safetensors({"text_float32": torch.ones(6, VIDEO_WIDTH + AUDIO_WIDTH)}, item.text)
    training_set = _discover(entry, legacy_text_widths=WIDTHS)
    _check(training_set)
    assert training_set.legacy_text_widths == WIDTHS
    with pytest.raises(ConfigErrors, match=r"have the width 8, this checkpoint needs 4 \(video\)"):
        _check(training_set, text_widths=AV(4, 3))


def test_a_checkpoint_without_encoders_cannot_be_compared(source: Path, caplog) -> None:
    entry = _entry(source)
    _write(entry, "a", audio_steps=3)
    with caplog.at_level(logging.WARNING):
        _check(_discover(entry), encoders=EncoderIds(text="text id"))
    assert "holds no video vae, audio vae encoder" in caplog.text


def test_validation_datasets_are_found_alike(source: Path) -> None:
    entry = _entry(source)
    _write(entry, "a")
    config = DatasetConfig((), (entry,), Path("data.toml"))
    assert len(discover(config, "av", validation=True)) == 1
    assert len(discover(config, "av")) == 0


def test_the_cache_key_covers_values_and_not_their_order() -> None:
    assert cache_key({"a": 1, "b": 2}) == cache_key({"b": 2, "a": 1})
    assert cache_key({"a": 1}) != cache_key({"a": 2}) != cache_key({"a": "2"})


@pytest.mark.parametrize("made_last", ["today", "yesterday"])
def test_a_clip_kept_in_two_sizes_is_trained_once_from_the_source_of_today(source, made_last: str, caplog) -> None:
    import os

    image = source / "a.png"
    image.write_bytes(b"as it was")
    (source / "a.txt").write_text("caption", encoding="utf-8")
    entry = _entry(source, kind="image", resolution=(64, 32))
    old, new = ("a_0100x0050_ltx2.safetensors", "a_0200x0100_ltx2.safetensors")
    item = write_item(entry.cache_directory, "a", grid=(1, 1, 2))
    for name, content in ((old, b"as it was"), (new, b"another picture")):
        image.write_bytes(content)
        made = provenance(image, EncoderRecord("video id"), {"bucket": "64x32"})
        write_item(entry.cache_directory, "a", grid=(1, 1, 2), metadata={"latents": made})
        item.latents.rename(entry.cache_directory / name)
    os.utime(entry.cache_directory / (new if made_last == "today" else old), (2e9, 2e9))
    with caplog.at_level(logging.WARNING):
        found = _discover(entry, "video")
    assert [i.latents.name for i in found.items()] == [new]
    assert "caches from other settings are ignored: a" in caplog.text


def test_a_clip_without_text_does_not_take_that_of_a_source_named_like_it(source: Path) -> None:
    entry = _entry(source)
    (source / "a_00000-009.mp4").write_bytes(b"never opened")
    (source / "a_00000-009.txt").write_text("caption of another", encoding="utf-8")
    item = _write(entry, "a")
    item.text.rename(entry.cache_directory / "a_00000-009_ltx2_te.safetensors")
    _write(entry, "b")
    assert [i.base for i in _discover(entry).items()] == ["b_00000-009"]
