import json
from pathlib import Path

import pytest

from musubi_tuner.common.errors import ConfigErrors
from musubi_tuner.dataset import companions as module
from musubi_tuner.dataset.companions import check_companions, find_companions, reference_frames
from musubi_tuner.dataset.entries import DatasetConfig, DatasetEntry
from musubi_tuner.dataset.jsonl import read_media_list
from musubi_tuner.dataset.schema import load_dataset_config
from musubi_tuner.dataset.sources import SourceItem, list_items


def _touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def _items(folder: Path, *names: str, kind="video") -> list[SourceItem]:
    return [SourceItem(folder / name, Path(name).stem, "", kind) for name in names]


def _entry(tmp_path: Path, kind="video", **options) -> DatasetEntry:
    caches = {"reference_cache_directory": tmp_path / "ref_cache"} if kind != "audio" else {}
    return DatasetEntry("datasets[0]", kind, tmp_path / "media", tmp_path / "cache", **(caches | options))


def _references(entry: DatasetEntry, items: list[SourceItem]) -> dict[str, list[str]]:
    listing = find_companions(entry, items, "video")
    return {item.stem: [path.name for path in listing.of(item).references] for item in items}


def test_references_are_found_by_stem_exactly_then_in_any_case(tmp_path: Path) -> None:
    folder = _touch(tmp_path / "refs", "one.PNG", "Two.mp4", "two.txt", "ONE.jpg", "four/0.png", "five.wav", ".six.png")
    entry = _entry(tmp_path, reference_directory=folder)
    items = _items(tmp_path / "media", "one.mp4", "two.mov", "three.mp4", "four.mp4", "five.mp4", "six.mp4")
    assert _references(entry, items) == {
        **{"one": ["one.PNG"], "two": ["Two.mp4"], "three": [], "four": ["four"], "five": [], "six": []}
    }
    missing = find_companions(entry, items, "video").missing
    assert missing == {"reference": ("three.mp4", "five.mp4", "six.mp4")}


def test_two_references_of_one_name_are_refused(tmp_path: Path) -> None:
    entry = _entry(tmp_path, reference_directory=_touch(tmp_path / "refs", "a.png", "a.mp4"))
    with pytest.raises(ConfigErrors, match="a.mp4 and a.png are all meant for a; keep one"):
        find_companions(entry, _items(tmp_path / "media", "a.mp4"), "video")


def test_a_directory_may_hold_targets_and_references(tmp_path: Path) -> None:
    folder = _touch(tmp_path / "media", "a.mp4", "a.txt", "a.png", "a.json", "a.wav")
    entry = _entry(
        tmp_path,
        reference_directory=folder,
        mask_directory=folder,
        audio_mask_directory=folder,
        reference_audio_directory=folder,
        reference_audio_cache_directory=tmp_path / "sounds",
    )
    (item,) = _items(folder, "a.mp4")
    found = find_companions(entry, [item], "av").of(item)
    assert found == module.Companions((folder / "a.png",), folder / "a.wav", folder / "a.png", folder / "a.json")


def test_what_the_mode_cannot_use_is_not_looked_for(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    options = {
        **{"reference_directory": empty, "mask_directory": empty, "audio_mask_directory": empty},
        **{"reference_audio_directory": empty, "reference_audio_cache_directory": tmp_path / "sounds"},
    }
    items = _items(tmp_path / "media", "a.mp4")
    missing = {
        mode: list(find_companions(_entry(tmp_path, **options), items, mode).missing)
        for mode in ("video", "av", "audio")
    }
    assert missing == {
        "video": ["reference", "mask"],
        "av": ["reference", "reference audio", "mask", "audio mask"],
        "audio": ["reference audio", "audio mask"],
    }


# --- control images -----------------------------------------------------------------------------------------


def test_control_images_go_to_the_longest_stem_in_order_of_number(tmp_path: Path) -> None:
    names = ["a_b.png", "a_10.png", "a_2.jpg", "a.webp", "a_b_1.png", "A_3.png", "c_d_0.png", "other.png", "a_7.txt"]
    entry = _entry(tmp_path, "image", control_directory=_touch(tmp_path / "control", *names))
    items = _items(tmp_path / "media", "a.png", "a_b.png", "c_d.png", kind="image")
    assert _references(entry, items) == {
        "a": ["a.webp", "a_2.jpg", "A_3.png", "a_10.png"],
        "a_b": ["a_b.png", "a_b_1.png"],
        "c_d": ["c_d_0.png"],
    }


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["a.png", "a_left.png", "b.png"], r"a_left\.png: expected a\.png or a_<digits>\.png"),
        (["a.png"], r"no control image in .* for b\.png; every image needs one"),
        (["a_1.png", "a_01.png", "b.png"], r"a_01\.png and a_1\.png are all meant for a"),
    ],
)
def test_control_images_that_cannot_be_used(tmp_path: Path, names: list[str], problem: str) -> None:
    entry = _entry(tmp_path, "image", control_directory=_touch(tmp_path / "control", *names))
    with pytest.raises(ConfigErrors, match=problem):
        find_companions(entry, _items(tmp_path / "media", "a.png", "b.png", kind="image"), "video")


def test_control_videos_by_file_name_then_folder_then_extension(tmp_path: Path) -> None:
    names = ["a.mp4", "a.mov", "a/0.png", "b/0.png", "b.webm", "c.webm", "c.png"]
    entry = _entry(tmp_path, control_directory=_touch(tmp_path / "control", *names))
    items = _items(tmp_path / "media", "a.mp4", "b.mp4", "c.mp4")
    assert _references(entry, items) == {"a": ["a.mp4"], "b": ["b"], "c": ["c.webm"]}
    with pytest.raises(ConfigErrors, match="no control video .* for d.mp4"):
        find_companions(entry, _items(tmp_path / "media", "a.mp4", "d.mp4"), "video")


@pytest.mark.parametrize(("count", "given", "frames"), [(1, 1, 1), (1, 9, 9), (2, 1, 9), (3, 17, 17), (4, 1, 25)])
def test_each_of_several_control_images_is_one_latent_frame(tmp_path, count: int, given: int, frames: int) -> None:
    names = ["a.png", *(f"a_{i}.png" for i in range(1, count))]
    folder = _touch(tmp_path / "control", *names)
    entry = _entry(tmp_path, "image", control_directory=folder, reference_frames=given)
    (item,) = items = _items(tmp_path / "media", "a.png", kind="image")
    assert reference_frames(entry, find_companions(entry, items, "video").of(item).references) == frames


def test_another_number_of_frames_than_the_control_images_make_is_refused(tmp_path: Path) -> None:
    folder = _touch(tmp_path / "control", "a.png", "a_1.png")
    entry = _entry(tmp_path, "image", control_directory=folder, reference_frames=17)
    with pytest.raises(ConfigErrors, match="2 control images .of a.png. make 9 frames, got 17; leave it out"):
        find_companions(entry, _items(tmp_path / "media", "a.png", kind="image"), "video")


# --- lists --------------------------------------------------------------------------------------------------


def _list(folder: Path, *lines: dict) -> Path:
    file = folder / "list.jsonl"
    file.write_text("\n".join(json.dumps({"caption": "x", **line}) for line in lines), encoding="utf-8")
    return file


def test_lines_name_references_and_win_over_the_directory(tmp_path: Path) -> None:
    _touch(tmp_path, "refs/a.png", "refs/b.png", "own.mp4", "voice.wav")
    file = _list(
        tmp_path,
        {"video_path": "a.mp4", "reference_path": "own.mp4", "reference_audio_path": "voice.wav"},
        {"video_path": "b.mp4"},
        {"video_path": "c.mp4", "control_path": "gone.mp4"},
    )
    entry = DatasetEntry(
        "datasets[0]",
        "video",
        file,
        tmp_path / "cache",
        listed=True,
        reference_directory=tmp_path / "refs",
        reference_cache_directory=tmp_path / "ref_cache",
        reference_audio_cache_directory=tmp_path / "sounds",
    )
    items = list_items(entry).items
    listing = find_companions(entry, items, "av")
    assert [[p.name for p in listing.of(item).references] for item in items] == [["own.mp4"], ["b.png"], []]
    assert listing.of(items[0]).reference_audio == tmp_path / "voice.wav"
    assert listing.missing == {"reference": ("c.mp4",), "reference audio": ("b.mp4", "c.mp4")}


def test_numbered_control_images_of_a_line(tmp_path: Path) -> None:
    line = {"image_path": "a.png", "control_path_1": "y.png", "control_path_0": "x.png"}
    (media,) = read_media_list(_list(tmp_path, line), "image").media
    assert [path.name for path in media.references] == ["x.png", "y.png"]
    with pytest.raises(ConfigErrors, match="control_path_1 is missing: control images are numbered from 0"):
        read_media_list(_list(tmp_path, {"image_path": "a.png", "control_path_0": "x", "control_path_2": "y"}), "image")


@pytest.mark.parametrize(
    ("line", "keys", "problem"),
    [
        ({"reference_path": "r.png"}, "", "reference_cache_directory: needed with the reference_path of list.jsonl:1"),
        ({}, 'reference_cache_directory = "rc"', "no line of the list has a reference_path"),
        ({"reference_audio_path": "r.wav"}, "", "reference_audio_cache_directory: needed with"),
    ],
)
def test_listed_references_need_a_cache(tmp_path: Path, line: dict, keys: str, problem: str) -> None:
    _list(tmp_path, {"video_path": "a.mp4", **line})
    config = tmp_path / "data.toml"
    config.write_text(f'[[datasets]]\nvideo_jsonl_file = "list.jsonl"\ncache_directory = "c"\n{keys}', encoding="utf-8")
    with pytest.raises(ConfigErrors, match=problem):
        load_dataset_config(config)


# --- before encoding ----------------------------------------------------------------------------------------


def test_strict_names_what_is_missing_of_all_datasets(tmp_path: Path) -> None:
    names = [f"{letter}.mp4" for letter in "abcdefg"]
    media = _touch(tmp_path / "media", *names, *(f"{Path(n).stem}.txt" for n in names))
    refs = _touch(tmp_path / "refs", "b.png")
    entry = _entry(tmp_path, reference_directory=refs, mask_directory=media)
    config = DatasetConfig((entry,), (), Path("data.toml"))
    check_companions(config, "video", strict=False)
    with pytest.raises(ConfigErrors) as caught:
        check_companions(config, "video", strict=True)
    assert caught.value.problems == (
        "datasets[0]: no reference for a.mp4, c.mp4, d.mp4, e.mp4, f.mp4 and 1 more (6 in all)",
        "datasets[0]: no mask for a.mp4, b.mp4, c.mp4, d.mp4, e.mp4 and 2 more (7 in all)",
    )


def test_directories_are_read_once(tmp_path: Path, monkeypatch) -> None:
    refs = _touch(tmp_path / "refs", *(f"{i}.png" for i in range(50)))
    scans: list[Path] = []
    real = module.os.scandir
    monkeypatch.setattr(module.os, "scandir", lambda path: scans.append(path) or real(path))
    items = _items(tmp_path / "media", *(f"{i}.mp4" for i in range(50)))
    assert not find_companions(_entry(tmp_path, reference_directory=refs), items, "video").missing
    assert scans == [refs]
