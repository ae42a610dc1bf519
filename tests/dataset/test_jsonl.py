import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from musubi_tuner.common.errors import ConfigErrors, UserError
from musubi_tuner.dataset.entries import DatasetEntry
from musubi_tuner.dataset.jsonl import read_media_list
from musubi_tuner.dataset.schema import load_dataset_config
from musubi_tuner.dataset.sources import list_items


def _write(folder: Path, *lines: object, name: str = "list.jsonl") -> Path:
    file = folder / name
    file.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n", encoding="utf-8")
    return file


def _problems(file: Path, kind="video") -> tuple[str, ...]:
    with pytest.raises(ConfigErrors) as caught:
        read_media_list(file, kind)
    return caught.value.problems


def _config(folder: Path, text: str, **options):
    path = folder / "dataset.toml"
    path.write_text(text, encoding="utf-8")
    return load_dataset_config(path, **options)


def test_items_keep_the_order_of_the_file(tmp_path: Path) -> None:
    file = _write(
        tmp_path,
        {"video_path": "z.mp4", "caption": "  last letter\n"},
        "",
        {"video_path": "a clip.mp4", "caption": "", "audio_path": "tön é.wav"},
        "   ",
    )
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    entry = DatasetEntry("datasets[0]", "video", file, tmp_path / "cache", listed=True)
    first, second = list_items(entry).items
    assert (first.path, first.stem, first.caption, first.audio) == (tmp_path / "z.mp4", "z", "last letter", None)
    assert (second.stem, second.caption, second.audio) == ("a clip", "", tmp_path / "tön é.wav")
    assert (first.place, second.place) == ("list.jsonl:1", "list.jsonl:3")


@settings(max_examples=50, deadline=None)
@given(
    captions=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5),
    ascii_only=st.booleans(),
)
def test_any_caption_survives(tmp_path_factory, captions: list[str], ascii_only: bool) -> None:
    file = tmp_path_factory.mktemp("list") / "list.jsonl"
    lines = [{"image_path": f"{i}.png", "caption": caption} for i, caption in enumerate(captions)]
    text = "\n\n".join(json.dumps(line, ensure_ascii=ascii_only) for line in lines)
    file.write_text(text, encoding="utf-8")
    assert [m.caption for m in read_media_list(file, "image").media] == [c.strip() for c in captions]


def test_relative_paths_lie_beside_the_list_or_in_the_working_directory(tmp_path: Path, monkeypatch) -> None:
    work, lists = tmp_path / "work", tmp_path / "lists"
    for path in (work / "both.mp4", work / "here.mp4", lists / "both.mp4", tmp_path / "absolute.mp4"):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    monkeypatch.chdir(work)
    names = ["both.mp4", "here.mp4", "nowhere.mp4", str(tmp_path / "absolute.mp4"), "../lists/up.mp4"]
    file = _write(lists, *({"video_path": name, "caption": "x"} for name in names))
    assert [m.path for m in read_media_list(file, "video").media] == [
        lists / "both.mp4",
        work / "here.mp4",
        lists / "nowhere.mp4",
        tmp_path / "absolute.mp4",
        lists / "up.mp4",
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{'video_path': 'a.mp4'}", "not JSON: Expecting property name"),
        ('{"video_path": "C:\\videos\\a.mp4", "caption": ""}', "write \\ in paths as / or \\\\"),
        ("[" * 100_000, "too deeply nested"),
        ('["a.mp4", "caption"]', "expected one object"),
        ({"caption": "x"}, "video_path is missing; the line has caption"),
        ({"video_pth": "a.mp4", "caption": "x"}, "video_path is missing (is 'video_pth' meant?)"),
        ({"image_path": "a.png", "caption": "x"}, "(the line has image_path: list it in image_jsonl_file)"),
        ({"video_path": "a.mp4", "text": "x"}, "caption is missing"),
        ({"video_path": "a.mp4", "caption": None}, "caption: expected a text, got null"),
        ({"video_path": 7, "caption": "x"}, "video_path: expected a text, got 7"),
        ({"video_path": " ", "caption": "x"}, "video_path: expected a path"),
        ({"video_path": "a\0.mp4", "caption": "x"}, "video_path: expected a path"),
        ('{"video_path": "a.mp4", "caption": "\\ud83d"}', "caption: half a character at position 0"),
        ({"video_path": "a.png", "caption": "x"}, "a.png is of kind image; list it in image_jsonl_file"),
        ({"video_path": "a.mp4", "caption": "x", "audio_path": 1}, "audio_path: expected a text"),
        ({"video_path": "a.mp4", "caption": "x", "control_path_0": "b"}, "only images have several control images"),
        ({"video_path": "a.mp4", "caption": "x", "image_path_0": "b"}, "trained on one target per item"),
        ({"video_path": "a.mp4", "caption": "x", "reference_path": "b.wav"}, "b.wav is not a picture or video"),
        (
            {"video_path": "a.mp4", "caption": "x", "reference_path": "b.png", "control_path": "c.mp4"},
            "reference_path, control_path: give the reference once",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, problem: str) -> None:
    file = _write(tmp_path, "", {"video_path": "good.mp4", "caption": "x"}, line)
    (found,) = _problems(file)
    assert found.startswith(f"{file}:3: ")
    assert problem in found


def test_all_bad_lines_are_reported_but_not_thousands(tmp_path: Path) -> None:
    problems = _problems(_write(tmp_path, *["{"] * 1000))
    assert len(problems) == 21
    assert problems[-1] == "and 980 more"


def test_names_whose_caches_would_collide(tmp_path: Path) -> None:
    lines = [{"image_path": path, "caption": "x"} for path in ("a/x.png", "b/X.jpg", "c.png", "./c.png")]
    again, collision = _problems(_write(tmp_path, *lines), "image")
    assert "c.png is listed 2 times (list.jsonl:3, list.jsonl:4); use num_repeats" in again
    assert f"{tmp_path / 'a' / 'x.png'} (list.jsonl:1)" in collision
    assert f"{tmp_path / 'b' / 'X.jpg'} (list.jsonl:2)" in collision


def test_sound_may_be_listed_as_a_video_file(tmp_path: Path) -> None:
    file = _write(tmp_path, {"audio_path": "a.mp4", "caption": "x"}, {"audio_path": "b.wav", "caption": "x"})
    assert [m.path.name for m in read_media_list(file, "audio").media] == ["a.mp4", "b.wav"]
    file = _write(tmp_path, {"audio_path": "a.png", "caption": "x"})
    assert "of kind image" in _problems(file, "audio")[0]


# --- in a configuration -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["video", "image", "audio"])
def test_every_kind_has_its_key(tmp_path: Path, kind: str) -> None:
    _write(tmp_path, {f"{kind}_path": "a.xyz", "text": "said elsewhere"})
    text = f"""
    [general]
    cache_directory = "cache"
    [[datasets]]
    {kind}_jsonl_file = "list.jsonl"
    caption_field = "text"
    """
    (entry,) = _config(tmp_path, text).datasets
    assert (entry.kind, entry.source, entry.listed) == (kind, tmp_path / "list.jsonl", True)
    assert (entry.source_key, entry.cache_directory) == (f"{kind}_jsonl_file", tmp_path / "cache")
    assert [item.caption for item in list_items(entry).items] == ["said elsewhere"]


def test_a_list_needs_a_cache_directory(tmp_path: Path) -> None:
    _write(tmp_path, {"video_path": "a.mp4", "caption": "x"})
    with pytest.raises(ConfigErrors) as caught:
        _config(tmp_path, '[[datasets]]\nvideo_jsonl_file = "list.jsonl"\nresolution = 50')
    needed, resolution = caught.value.problems
    assert needed == "datasets[0].cache_directory: needed with video_jsonl_file"
    assert "multiples of 32" in resolution


def test_problems_of_a_list_are_those_of_its_configuration(tmp_path: Path) -> None:
    _write(tmp_path, "{", name="bad.jsonl")
    _write(tmp_path, "", name="empty.jsonl")
    text = "\n".join(
        f'[[datasets]]\nvideo_jsonl_file = "{name}.jsonl"\ncache_directory = "{name}"'
        for name in ("bad", "empty", "gone")
    )
    with pytest.raises(ConfigErrors) as caught:
        _config(tmp_path, text)
    bad, empty, gone = caught.value.problems
    assert bad.startswith(f"datasets[0].video_jsonl_file: {tmp_path / 'bad.jsonl'}:1: not JSON")
    assert empty.endswith("empty.jsonl lists nothing")
    assert "gone.jsonl: file not found" in gone
    assert len(_config(tmp_path, text, need_sources=False).datasets) == 3


def test_a_list_and_a_directory_exclude_each_other(tmp_path: Path) -> None:
    _write(tmp_path, {"video_path": "a.mp4", "caption": "x"})
    text = '[[datasets]]\nvideo_directory = "."\nvideo_jsonl_file = "list.jsonl"\ncache_directory = "cache"'
    with pytest.raises(ConfigErrors, match="found video_directory, video_jsonl_file"):
        _config(tmp_path, text)


def test_keys_without_effect_are_told(tmp_path: Path, caplog) -> None:
    _write(tmp_path, {"video_path": "a.mp4", "caption": "x", "fps": 24, "width": 1})
    _config(tmp_path, '[[datasets]]\nvideo_jsonl_file = "list.jsonl"\ncache_directory = "cache"')
    assert "keys without effect: fps, width" in caplog.text


def test_another_encoding_is_named(tmp_path: Path) -> None:
    file = tmp_path / "list.jsonl"
    file.write_bytes('{"video_path": "a.mp4", "caption": "Köln"}'.encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_media_list(file, "video")
