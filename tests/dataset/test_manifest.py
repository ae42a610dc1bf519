"""Manifests: what is written, what is read back, and what is said of those that cannot be used."""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path, PureWindowsPath
from typing import Any

import pytest
import torch
from cache_files import WIDTHS, write_item, write_item_mask

from musubi_tuner.common.av import AV
from musubi_tuner.common.errors import ConfigErrors, UserError
from musubi_tuner.dataset.discovery import discover
from musubi_tuner.dataset.entries import DatasetConfig
from musubi_tuner.dataset.files import ItemFiles
from musubi_tuner.dataset.fingerprint import EncoderIds, RepairCommands, check_caches, provenance
from musubi_tuner.dataset.items import EncoderRecord
from musubi_tuner.dataset.manifest import _portable, load_dataset_manifest, save_dataset_manifest
from musubi_tuner.dataset.schema import load_dataset_config

NAMES = ("eins", "zwei é", "三")
KIND_KEYS = {
    "video": """
        resolution = [192, 128]
        reference_directory = "source"
        reference_cache_directory = "references"
        reference_frames = 9
        reference_downscale = 2
        mask_directory = "source"
        target_frames = [9, 17]
        frame_extraction = "slide"
        frame_stride = 3
        frame_sample = 4
        max_frames = 65
        source_fps = 30
        target_fps = 24
    """,
    "image": 'resolution = 96\ncontrol_directory = "source"\nreference_cache_directory = "references"',
    "audio": """
        resolution = [96, 64]
        reference_audio_directory = "source"
        reference_audio_cache_directory = "references"
        audio_mask_directory = "source"
        audio_bucket_strategy = "truncate"
        audio_bucket_interval = 0.5
    """,
}
COMMON_KEYS = """
    cache_directory = "cache"
    caption_extension = "cap"
    caption_field = "text"
    batch_size = 2
    num_repeats = 3
    enable_bucket = true
    bucket_no_upscale = true
    separate_audio_buckets = true
    video_loss_weight = 0.25
    audio_loss_weight = 0
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset of three videos, of which the first has sound, with their caches."""
    folder = tmp_path / "Daten é"
    (folder / "videos").mkdir(parents=True)
    (folder / "cache").mkdir()
    toml = '[[datasets]]\nvideo_directory = "videos"\ncache_directory = "cache"\n'
    toml += "resolution = [64, 32]\ntarget_frames = [9]\n"
    (folder / "dataset.toml").write_text(toml, encoding="utf-8")
    for name in NAMES:
        (folder / "videos" / f"{name}.mp4").write_bytes(b"never opened")
        (folder / "videos" / f"{name}.txt").write_text(f"caption of {name}", encoding="utf-8")
        cache(folder, name, audio_steps=9 if name == NAMES[0] else 0)
    return folder


def cache(folder: Path, name: str, **options: Any) -> None:
    write_item(folder / "cache", f"{name}_00000-009", stem=name, **options)


def save(folder: Path, path: Path | None = None, *, text_is_cached: bool = True, failures: int = 0) -> Path:
    path = path or folder / "manifest.json"
    config = load_dataset_config(folder / "dataset.toml")
    save_dataset_manifest(path, config, text_is_cached=text_is_cached, failures=failures)
    return path


def bases(config: DatasetConfig, mode: str = "av") -> list[str]:
    return [item.base for item in discover(config, mode).items()]


def edit(path: Path, change: Callable[[dict], Any]) -> Path:
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def check(config: DatasetConfig, mode: str = "av") -> None:
    commands = RepairCommands(config.made_from, Path("ltx2.safetensors"), mode, manifest=config.path)
    check_caches(discover(config, mode), encoders=EncoderIds(), commands=commands, text_widths=WIDTHS)


# --- what is kept -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listed", [False, True], ids=["directory", "JSONL"])
@pytest.mark.parametrize("kind", KIND_KEYS)
def test_every_key_survives_without_its_sources(tmp_path: Path, kind: str, listed: bool) -> None:
    suffix = {"video": "mp4", "image": "png", "audio": "wav"}[kind]
    for name in ("source", "cache", "references"):
        (tmp_path / name).mkdir()
    (tmp_path / "source" / f"a.{suffix}").touch()
    line = {f"{kind}_path": f"source/a.{suffix}", "text": "a caption"}
    (tmp_path / "list.jsonl").write_text(json.dumps(line), encoding="utf-8")
    source = f'{kind}_jsonl_file = "list.jsonl"' if listed else f'{kind}_directory = "source"'
    toml = tmp_path / "dataset.toml"
    toml.write_text(f"[[datasets]]\n{source}\n{COMMON_KEYS}{KIND_KEYS[kind]}", encoding="utf-8")
    (before,) = load_dataset_config(toml).datasets
    manifest = save(tmp_path)
    for path in (tmp_path / "source", tmp_path / "list.jsonl", toml):
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    (after,) = load_dataset_manifest(manifest).datasets
    sources = {"source", *(f.name for f in fields(before) if f.name.endswith("_directory") and "cache" not in f.name)}
    expected = replace(before, cache_only=True, listed=False, files=(), **dict.fromkeys(sources))
    assert after == expected
    (section,) = json.loads(manifest.read_text(encoding="utf-8"))["datasets"]
    assert section["dataset_type"] == kind
    assert section["params"][f"{kind}_directory"] is section["params"][f"{kind}_jsonl_file"] is None
    directories = {k: v for k, v in section["params"].items() if k.endswith("_directory") and v}
    assert set(directories) >= {"cache_directory"}
    assert set(directories.values()) == {"cache", "references"}, "relative to the manifest"


def test_what_is_written(folder: Path) -> None:
    values = json.loads(save(folder).read_text(encoding="utf-8"))
    assert (values["format"], values["version"], values["architecture"]) == ("musubi_tuner_dataset_manifest", 1, "ltx2")
    assert (values["source_dataset_config"], values["failures"]) == ("dataset.toml", 0)
    assert values["generated_at"].endswith("+00:00")
    (section,) = values["datasets"]
    assert section["left_out"] == []
    assert [item["base"] for item in section["files"]] == [f"{name}_00000-009" for name in sorted(NAMES)]
    assert section["files"][0] == {
        "base": "eins_00000-009",
        "bucket": [64, 32],
        "frames": 9,
        "audio_t": 9,
        "latents": "eins_00000-009_0064x0032_ltx2.safetensors",
        "audio": "eins_00000-009_0064x0032_ltx2_audio.safetensors",
        "mask": None,
        "text": "eins_ltx2_te.safetensors",
    }
    assert section["files"][1]["audio"] is section["files"][1]["audio_t"] is None
    assert [path.name for path in folder.iterdir() if "manifest" in path.name] == ["manifest.json"]


def test_items_equal_those_of_the_configuration(folder: Path) -> None:
    cache(folder, "stranger")
    expected = discover(load_dataset_config(folder / "dataset.toml"), "av")
    manifest = save(folder)
    shutil.rmtree(folder / "videos")
    (folder / "dataset.toml").unlink()
    assert discover(load_dataset_manifest(manifest), "av") == expected
    assert len(expected) == 3


def test_validation_and_several_datasets(folder: Path) -> None:
    text = (folder / "dataset.toml").read_text(encoding="utf-8")
    for name, header in (("other", "[[datasets]]"), ("validation", "[[validation_datasets]]")):
        for part in ("videos", "cache"):
            shutil.copytree(folder / part, folder / name / part)
        text += f'{header}\nvideo_directory = "{name}/videos"\ncache_directory = "{name}/cache"\n'
        text += "resolution = [64, 32]\ntarget_frames = [9]\n"
    (folder / "dataset.toml").write_text(text, encoding="utf-8")
    (folder / "validation/cache/三_00000-009_0064x0032_ltx2.safetensors").unlink()
    config = load_dataset_manifest(save(folder))
    assert [entry.label for entry in config.entries()] == ["datasets[0]", "datasets[1]", "validation_datasets[0]"]
    assert len(discover(config, "av")) == 6
    assert len(discover(config, "av", validation=True)) == 2


def test_mode_audio(tmp_path: Path) -> None:
    (tmp_path / "sounds").mkdir()
    (tmp_path / "cache").mkdir()
    for name in ("a", "b"):
        (tmp_path / "sounds" / f"{name}.wav").touch()
        (tmp_path / "sounds" / f"{name}.txt").write_text(name, encoding="utf-8")
        write_item(tmp_path / "cache", name, grid=(1, 1, 1), audio_steps=5, virtual_grid=(3, 2, 2))
    toml = '[[datasets]]\naudio_directory = "sounds"\ncache_directory = "cache"\n'
    (tmp_path / "dataset.toml").write_text(toml, encoding="utf-8")
    config = load_dataset_manifest(save(tmp_path))
    (item, _) = config.datasets[0].files
    assert (item.bucket, item.frames, item.audio_steps) == (None, None, 5)
    assert bases(config, "audio") == ["a", "b"]
    Path(tmp_path / "cache" / item.audio).unlink()
    with pytest.raises(ConfigErrors, match="audio caches that the manifest lists"):
        check(config, "audio")


# --- files --------------------------------------------------------------------------------------------------


def test_files_that_are_not_listed_are_ignored(folder: Path, caplog) -> None:
    manifest = save(folder)
    cache(folder, "later", audio_steps=9)
    write_item(folder / "cache", "zwei é_00000-009", stem="zwei é", audio_steps=9)  # now with sound
    shutil.rmtree(folder / "videos")
    config = load_dataset_manifest(manifest)
    with caplog.at_level(logging.WARNING):
        items = list(discover(config, "av").items())
    assert [(item.base, item.audio_steps) for item in items] == [
        ("eins_00000-009", 9),
        ("zwei é_00000-009", 0),
        ("三_00000-009", 0),
    ]
    assert "caches of no item of the manifest are ignored: later_00000-009" in caplog.text


def test_missing_files_are_counted_and_named_with_the_remedy(folder: Path) -> None:
    for index in range(7):
        (folder / "videos" / f"m{index}.mp4").touch()
        (folder / "videos" / f"m{index}.txt").write_text("m", encoding="utf-8")
        cache(folder, f"m{index}", audio_steps=2)
    manifest = save(folder)
    for index in range(7):
        (folder / "cache" / f"m{index}_00000-009_0064x0032_ltx2.safetensors").unlink()
    (folder / "cache" / "m0_00000-009_0064x0032_ltx2_audio.safetensors").unlink()
    (folder / "cache" / "三_ltx2_te.safetensors").unlink()
    with pytest.raises(ConfigErrors) as error:
        check(load_dataset_manifest(manifest))
    latents, text, audio = error.value.problems
    dataset = folder / "dataset.toml"
    names = ", ".join(f"m{index}_00000-009_0064x0032_ltx2.safetensors" for index in range(5))
    assert latents.startswith(f"{names} and 2 more (7 in all): latents caches that the manifest lists are not in ")
    assert f'run: python ltx2_cache_latents.py --dataset_config "{dataset}"' in latents
    assert latents.endswith(f'--skip_existing --save_dataset_manifest "{manifest}"')
    assert text.startswith("三_ltx2_te.safetensors: text caches")
    assert "ltx2_cache_text_encoder_outputs.py" in text
    assert audio.startswith("m0_00000-009_0064x0032_ltx2_audio.safetensors: audio caches")
    with pytest.raises(ConfigErrors) as error:
        check(load_dataset_manifest(manifest), "video")
    assert len(error.value.problems) == 2, "mode video needs no sound"


def test_text_may_be_cached_later_but_not_left_out(folder: Path, caplog) -> None:
    text = folder / "cache" / "三_ltx2_te.safetensors"
    text.rename(folder / "text")
    with caplog.at_level(logging.INFO):
        manifest = save(folder, text_is_cached=False)
    assert "1 listed text caches are still to be made" in caplog.text
    with pytest.raises(ConfigErrors, match=r"三_ltx2_te\.safetensors: text caches that the manifest lists"):
        check(load_dataset_manifest(manifest))
    (folder / "text").rename(text)
    assert len(bases(load_dataset_manifest(manifest))) == 3


def test_what_failed_is_not_listed(folder: Path, caplog) -> None:
    (folder / "cache" / "eins_00000-009_0064x0032_ltx2.safetensors").unlink()
    (folder / "cache" / "三_ltx2_te.safetensors").unlink()
    with caplog.at_level(logging.WARNING):
        manifest = save(folder, failures=2)
    assert "datasets[0]: not cached and so not listed: eins, 三_00000-009" in caplog.text
    assert "failures of this run: 2" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        config = load_dataset_manifest(manifest)
    assert bases(config) == ["zwei é_00000-009"]
    assert "manifest.json: datasets[0]: was not cached and is left out: eins, 三_00000-009" in caplog.text
    assert "failures of the run that saved it: 2" in caplog.text


def test_a_caption_that_changed_since_is_not_taken_for_cached(folder: Path, caplog) -> None:
    made = provenance(folder / "videos" / "eins.txt", EncoderRecord("text"), {})
    cache(folder, "eins", metadata={"text": made})  # its caption is "caption of eins_00000-009"
    with caplog.at_level(logging.INFO):
        save(folder, text_is_cached=False)
    assert "1 listed text caches are still to be made" in caplog.text
    assert [item.text for item in load_dataset_manifest(save(folder)).datasets[0].files] == [
        "zwei é_ltx2_te.safetensors",
        "三_ltx2_te.safetensors",
    ]


def test_nothing_cached_yet(folder: Path, caplog) -> None:
    shutil.rmtree(folder / "cache")
    (folder / "cache").mkdir()
    manifest = save(folder)
    assert "nothing of datasets[0] is cached yet; save the manifest again" in caplog.text
    with pytest.raises(ConfigErrors, match="the manifest lists no items: cache both latents and text"):
        discover(load_dataset_manifest(manifest), "av")


def test_caches_made_again_with_other_settings_are_refused(folder: Path) -> None:
    manifest = save(folder)
    source = folder / "videos" / "eins.mp4"
    made = provenance(source, EncoderRecord("vae"), {"target_fps": 24.0, "source_fps": None, "bucket": "64x32"})
    cache(folder, "eins", audio_steps=9, metadata={"latents": made})
    with pytest.raises(ConfigErrors, match="made with target_fps 24, the configuration says 25"):
        check(load_dataset_manifest(manifest))


def test_caches_made_again_with_another_length_are_told(folder: Path, caplog) -> None:
    manifest = save(folder)
    cache(folder, "eins", audio_steps=8)
    check(load_dataset_manifest(manifest))
    assert "cached again with other sizes since the manifest was saved: eins_00000-009" in caplog.text


# --- places -------------------------------------------------------------------------------------------------


def test_all_can_be_moved_together(folder: Path, tmp_path: Path, monkeypatch) -> None:
    beside = save(folder, folder / "manifests" / "m.json")
    assert json.loads(beside.read_text(encoding="utf-8"))["datasets"][0]["params"]["cache_directory"] == "../cache"
    below = save(folder)
    shutil.rmtree(folder / "videos")
    moved = folder.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    for path in (below, beside):
        relative = Path("moved") / path.relative_to(folder)
        config = load_dataset_manifest(relative)
        assert config.datasets[0].cache_directory == moved / "cache"
        assert config.made_from == moved / "dataset.toml"
        assert len(bases(config)) == 3


def test_the_manifest_alone_can_be_moved(folder: Path, tmp_path: Path) -> None:
    moved = save(folder).rename(tmp_path / "elsewhere.json")
    assert load_dataset_manifest(moved).datasets[0].cache_directory == folder / "cache"


@pytest.mark.parametrize(
    ("path", "folder", "expected"),
    [
        ("C:\\data\\cache", "C:\\data", "cache"),
        ("C:\\data\\sets\\a\\cache", "C:\\data\\sets\\b", "../a/cache"),
        ("C:\\data", "C:\\data", "."),
        ("C:\\other\\cache", "C:\\data", "C:/other/cache"),  # the root is no place of its own
        ("D:\\cache", "C:\\data\\sets", "D:/cache"),
    ],
)
def test_directories_are_written_with_slashes(path: str, folder: str, expected: str) -> None:
    assert _portable(PureWindowsPath(path), PureWindowsPath(folder)) == expected  # type: ignore[arg-type]


def reference(path: Path, *params: dict, **changes: Any) -> Path:
    """A manifest as other programs write it: directories, no files."""
    values = {
        "format": "musubi_tuner_dataset_manifest",
        "version": 1,
        "architecture": "ltx2",
        "generated_at": "2026-01-31T12:00:00Z",
        "datasets": [{"dataset_type": "video", "params": p} for p in params],
    }
    path.write_text(json.dumps(values | changes), encoding="utf-8")
    return path


PARAMS = {"resolution": [64, 32], "target_frames": [9], "cache_only": True, "video_directory": None}


@pytest.mark.parametrize("where", ["absolute", "beside", "working directory", "Windows"])
def test_manifests_without_files_stand_for_their_directories(folder: Path, tmp_path: Path, monkeypatch, where) -> None:
    monkeypatch.chdir(tmp_path)
    directory, place = {
        "absolute": (str(folder / "cache"), tmp_path / "elsewhere"),
        "beside": ("cache", folder),
        "working directory": (f"{folder.name}/cache", tmp_path / "elsewhere"),
        "Windows": (f"{folder.name}\\cache", tmp_path / "elsewhere"),
    }[where]
    place.mkdir(exist_ok=True)
    config = load_dataset_manifest(reference(place / "m.json", {**PARAMS, "cache_directory": directory}))
    assert config.datasets[0].cache_directory == folder / "cache"
    assert config.datasets[0].files is None
    assert bases(config) == [f"{name}_00000-009" for name in sorted(NAMES)]


# --- values -------------------------------------------------------------------------------------------------


def test_unknown_parameters_are_ignored_in_one_line(folder: Path, caplog) -> None:
    params = {**PARAMS, "cache_directory": "cache", "fp_1f_no_post": False, "zoom": 3, "debug_dataset": True}
    with caplog.at_level(logging.INFO):
        load_dataset_manifest(reference(folder / "m.json", params))
    (line,) = [r.getMessage() for r in caplog.records]
    assert line == "m.json: unknown parameters are ignored: debug_dataset, fp_1f_no_post, zoom"


def test_the_command_line_applies_where_the_manifest_has_the_default(folder: Path) -> None:
    manifest = save(folder)
    given = {"separate_audio_buckets": True, "audio_bucket_strategy": None}
    assert load_dataset_manifest(manifest, command_line=given).datasets[0].separate_audio_buckets
    assert not load_dataset_manifest(manifest).datasets[0].separate_audio_buckets
    edit(manifest, lambda m: m["datasets"][0]["params"].update(video_loss_weight=0.5))
    assert load_dataset_manifest(manifest, command_line={"video_loss_weight": 2.0}).datasets[0].video_loss_weight == 0.5


TOP_LEVEL = {
    "format": ({"format": "other"}, 'format: expected "musubi_tuner_dataset_manifest", got "other"'),
    "version": ({"version": 2}, "version: expected 1, got 2"),
    "version as truth": ({"version": True}, "version: expected 1, got true"),
    "architecture": ({"architecture": "wan"}, 'architecture: expected "ltx2", got "wan"'),
    "datasets": ({"datasets": {}}, "datasets: expected a list of datasets, got {}"),
    "no datasets": ({"datasets": []}, r"datasets: expected a list of datasets, got \[\]"),
    "validation": ({"validation_datasets": "x"}, 'validation_datasets: expected a list of datasets, got "x"'),
}


@pytest.mark.parametrize(("change", "message"), TOP_LEVEL.values(), ids=TOP_LEVEL)
def test_files_that_are_no_manifest_for_this_program(folder: Path, change: dict, message: str) -> None:
    path = edit(save(folder), lambda m: m.update(change))
    with pytest.raises(UserError, match=rf"manifest\.json: {message}"):
        load_dataset_manifest(path)


def test_a_configuration_is_no_manifest_nor_the_other_way_round(folder: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.toml: not a dataset manifest: .* given as --dataset_config"):
        load_dataset_manifest(folder / "dataset.toml")
    with pytest.raises(UserError, match="is a dataset manifest, expected a configuration"):
        load_dataset_config(save(folder))
    (folder / "list.json").write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match="format: expected .* got no object"):
        load_dataset_manifest(folder / "list.json")


def test_all_that_is_wrong_in_the_datasets_is_reported_together(folder: Path) -> None:
    def spoil(manifest: dict) -> None:
        good = json.dumps(manifest["datasets"][0])
        sections = [json.loads(good) for _ in range(7)]
        sections[0]["params"].update(batch_size=0, frame_extraction="heads", resolution=[60, 32])
        sections[1]["dataset_type"] = "movie"
        sections[2]["params"]["cache_directory"] = "nowhere"
        sections[3]["files"][1]["text"] = "a.txt"
        sections[4]["files"][0]["bucket"] = "64x32"
        sections[5]["params"] = None
        sections[6]["params"]["cache_directory"] = None
        manifest["datasets"] = sections

    with pytest.raises(ConfigErrors) as error:
        load_dataset_manifest(edit(save(folder), spoil))
    text = str(error.value)
    assert "manifest.json: invalid dataset manifest" in text
    for expected in (
        "datasets[0].batch_size: expected an integer >= 1, got 0",
        "datasets[0].frame_extraction: expected one of",
        "datasets[0].resolution: expected multiples of 32",
        'datasets[1].dataset_type: expected one of video, image, audio, got "movie"',
        "datasets[2].params.cache_directory: nowhere does not exist (looked in",
        'datasets[3].files[1].text: expected the name of a cache file of this kind, got "a.txt"',
        'datasets[4].files[0].bucket: expected [width, height] or null, got "64x32"',
        "datasets[5].params: expected an object",
        "datasets[6].cache_directory: needed with cache_only",
        "datasets[3].cache_directory: is also that of datasets[0]",
    ):
        assert expected in text, expected


def test_item_files_need_no_sizes(folder: Path) -> None:
    def strip(manifest: dict) -> None:
        for item in manifest["datasets"][0]["files"]:
            for name in ("base", "bucket", "frames", "audio_t"):
                del item[name]

    config = load_dataset_manifest(edit(save(folder), strip))
    assert config.datasets[0].files[2] == ItemFiles("三_00000-009_0064x0032_ltx2.safetensors", "三_ltx2_te.safetensors")
    check(config)


# --- masks --------------------------------------------------------------------------------------------------


def _mask(folder: Path, name: str) -> Path:
    item = write_item(folder / "cache", f"{name}_00000-009", stem=name)
    return write_item_mask(item, AV(video=torch.ones(2, 1, 2)))


def test_masks_that_the_configuration_does_not_have_are_not_trained_with_its_manifest(folder: Path) -> None:
    _mask(folder, NAMES[1])
    items = list(discover(load_dataset_manifest(save(folder)), "video").items())
    assert [item.mask for item in items] == [None] * 3


def test_masks_of_the_configuration_are_listed_and_missed(folder: Path) -> None:
    masks = [_mask(folder, name) for name in NAMES[:2]]  # the third has none and is left out, as with the configuration
    (folder / "masks").mkdir()
    toml = folder / "dataset.toml"
    toml.write_text(toml.read_text(encoding="utf-8") + 'mask_directory = "masks"\n', encoding="utf-8")
    expected = [(item.base, item.mask) for item in discover(load_dataset_config(toml), "video").items()]
    manifest = save(folder)
    found = discover(load_dataset_manifest(manifest), "video")
    assert [(item.base, item.mask) for item in found.items()] == expected
    assert {item.mask for item in found.items()} == {*masks}
    masks[0].unlink()
    with pytest.raises(ConfigErrors, match="mask caches that the manifest lists are not in"):
        check(load_dataset_manifest(manifest), "video")
