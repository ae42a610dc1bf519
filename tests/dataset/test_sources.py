import os
import sys

import pytest

from musubi_tuner.common.errors import ConfigErrors
from musubi_tuner.dataset.entries import DatasetEntry
from musubi_tuner.dataset.sources import list_items, summarize_problems


def _entry(folder, **options) -> DatasetEntry:
    return DatasetEntry("datasets[0]", "video", folder, folder, **options)


def test_items_are_sorted_with_stripped_captions(tmp_path) -> None:
    for name in ("b.mp4", "a.MKV", "a.b.mov", ".hidden.mp4", "x.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a.txt").write_bytes("\ufeff  ein Zug fährt ein\r\n".encode())
    (tmp_path / "a.b.txt").write_text("dots", encoding="utf-8")
    (tmp_path / "b.txt").write_text("", encoding="utf-8")
    listing = list_items(_entry(tmp_path))
    assert [(i.stem, i.caption, i.kind) for i in listing.items] == [
        ("a", "ein Zug fährt ein", "video"),
        ("a.b", "dots", "video"),
        ("b", "", "video"),
    ]
    assert listing.problems == ()


def test_captions_that_cannot_be_read_become_problems(tmp_path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.mp4").write_bytes(b"")
    (tmp_path / "a.caption").write_bytes("Köln".encode("latin-1"))
    (tmp_path / "c.caption").write_text("good", encoding="utf-8")
    listing = list_items(_entry(tmp_path, caption_extension=".caption"))
    assert [item.stem for item in listing.items] == ["c"]
    assert [p.path.name for p in listing.problems] == ["a.mp4", "b.mp4"]
    assert "a.caption is not UTF-8 (byte 1)" in listing.problems[0].reason
    assert listing.problems[1].reason == "no caption file b.caption"
    assert summarize_problems(listing.problems, limit=1).endswith("; and 1 more")


def test_a_long_caption_is_kept_whole(tmp_path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "a.txt").write_text("word " * 10_000, encoding="utf-8")
    assert len(list_items(_entry(tmp_path)).items[0].caption.split()) == 10_000


def test_files_whose_caches_would_collide_are_an_error(tmp_path) -> None:
    for name in ("a.mp4", "a.mov"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ConfigErrors, match=r"a\.mov and .*a\.mp4"):
        list_items(_entry(tmp_path))


def test_a_dataset_of_caches_has_no_items(tmp_path) -> None:
    assert list_items(DatasetEntry("datasets[0]", "video", None, tmp_path, cache_only=True)).items == ()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_not_utf8_is_left_out_before_any_work(tmp_path) -> None:
    for name in (b"good", b"K\xf6ln"):
        (tmp_path / os.fsdecode(name + b".mp4")).write_bytes(b"")
        (tmp_path / os.fsdecode(name + b".txt")).write_text("caption", encoding="utf-8")
    listing = list_items(_entry(tmp_path))
    assert [item.stem for item in listing.items] == ["good"]
    assert [problem.reason for problem in listing.problems] == ["the name of the file is not UTF-8; rename it"]


@pytest.mark.skipif(sys.platform == "win32", reason="other systems have no such names")
def test_a_name_of_two_lines_is_left_out_so_that_each_file_is_one_line_of_the_log(tmp_path) -> None:
    for name in ("good", "two\nlines"):
        (tmp_path / f"{name}.mp4").write_bytes(b"")
        (tmp_path / f"{name}.txt").write_text("caption", encoding="utf-8")
    listing = list_items(_entry(tmp_path))
    assert [item.stem for item in listing.items] == ["good"]
    assert summarize_problems(listing.problems) == (
        "1 left out: two lines.mp4: the name of the file has several lines; rename it"
    )
