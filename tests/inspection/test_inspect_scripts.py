"""The scripts that look at a dataset: the page, prepared clips, the dry run."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest
from media_files import index_frame, read_index, tone, write_sound, write_video
from PIL import Image

from musubi_tuner.ltx2_cache_latents import main as cache_latents
from musubi_tuner.ltx2_inspect_dataset import main as inspect_dataset

ODD = "odd #1 [x] 'ü' & 100%"
CAPTION = "</p><script>alert(\"x\")</script> <b>bold</b> & 'quoted'"
_VOID = {"meta", "img", "input", "path", "rect", "br"}


class _Page(HTMLParser):
    """Text, tags and unbalanced tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.tags, self.open, self.ids, self.links = "", [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"][1:]] if values.get("href", "").startswith("#") else []
        assert not any(str(value).startswith("http") for value in values.values()), "needs nothing beside it"
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def _page(folder: Path) -> _Page:
    page = _Page((folder / "index.html").read_text(encoding="utf-8"))
    assert not page.open
    assert len(page.ids) == len(set(page.ids))
    assert set(page.links) <= set(page.ids), "links that lead nowhere"
    return page


def _status(script, *flags: object) -> int:
    try:
        script([str(flag) for flag in flags])
    except SystemExit as stop:
        return int(stop.code)
    return 0


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """A configuration of three videos."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for name, caption, frames in (("plain", "first", 40), ("other", "second", 50), (ODD, CAPTION, 30)):
        write_video(folder / f"{name}.mp4", frames, sound=tone(frames / 25), sound_codec="aac")
        (folder / f"{name}.txt").write_text(caption, encoding="utf-8")
    return _config(tmp_path, "video", "clips", "target_frames = [17]\n")


def _config(folder: Path, kind: str, source: str, more: str = "") -> Path:
    path = folder / f"{kind}.toml"
    path.write_text(
        f"[general]\nresolution = [128, 64]\n[[datasets]]\n{kind}_directory = '{source}'\n"
        f"cache_directory = 'cache_{kind}'\n{more}",
        encoding="utf-8",
    )
    return path


def test_the_page_holds_names_and_captions_as_text(videos: Path) -> None:
    assert _status(inspect_dataset, "--dataset_config", videos, "--ltx2_mode", "av") == 0
    page = _page(videos.parent / "inspection")
    assert CAPTION in page.text
    assert f"{ODD}.mp4" in page.text
    assert "script" not in page.tags
    assert page.tags.count("article") == page.tags.count("img") == 3
    assert not (videos.parent / "cache_video").exists()  # nothing but the page is written


def test_damaged_files_are_named_and_the_rest_is_shown(videos: Path, capsys) -> None:
    clips = videos.parent / "clips"
    (clips / "bad.mp4").write_bytes(b"nothing")
    (clips / "bad.txt").write_text("bad", encoding="utf-8")
    (clips / "empty.mp4").touch()
    (clips / "empty.txt").write_text("", encoding="utf-8")
    (clips / "nameless.mp4").write_bytes((clips / "plain.mp4").read_bytes())
    assert _status(inspect_dataset, "--dataset_config", videos, "--output_dir", videos.parent / "out") == 1
    page = _page(videos.parent / "out")
    for text in ("no caption file nameless.txt", "the file is empty", "the caption is empty", "unreadable: 2 files"):
        assert text in page.text, text
    assert page.tags.count("img") == 3
    assert re.search(r"datasets\[0\] +video +6 +3 +3 ", capsys.readouterr().err)


def test_pictures_are_limited_and_the_table_is_complete(videos: Path) -> None:
    assert _status(inspect_dataset, "--dataset_config", videos, "--max_items", 1, "--num_workers", 2) == 0
    page = _page(videos.parent / "inspection")
    # One of the first, and one of those with remarks.
    assert page.tags.count("img") == 2
    assert all(f"{name}.mp4" in page.text for name in ("plain", "other", ODD))
    assert "1 more file in the table only" in page.text


def test_images_and_sounds(tmp_path: Path) -> None:
    for folder in ("images", "sounds"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (40, 90), (10, 200, 30)).save(tmp_path / "images" / "green.webp")
    (tmp_path / "images" / "green.txt").write_text("green", encoding="utf-8")
    write_sound(tmp_path / "sounds" / "a.wav", tone(1.0))
    write_sound(tmp_path / "sounds" / "b.wav", np.zeros((2, 48_000), np.float32))
    for name in "ab":
        (tmp_path / "sounds" / f"{name}.txt").write_text("a sound", encoding="utf-8")
    images, sounds = _config(tmp_path, "image", "images"), _config(tmp_path, "audio", "sounds")

    assert _status(inspect_dataset, "--dataset_config", images, "--output_dir", tmp_path / "i") == 0
    page = _page(tmp_path / "i")
    assert page.tags.count("img") == 1
    assert "one plain colour" in page.text
    assert _status(inspect_dataset, "--dataset_config", sounds, "--output_dir", tmp_path / "s") == 0
    page = _page(tmp_path / "s")
    assert (page.tags.count("svg"), page.tags.count("img")) == (2, 0)
    assert "the sound is silence" in page.text
    assert "same caption as b.wav" in page.text


def test_decoded_caches(cached_demo, tmp_path: Path) -> None:
    demo = cached_demo()
    flags = ("--dataset_config", demo.dataset, "--ltx2_mode", "av", "--output_dir", tmp_path, "--max_items", 2)
    assert _status(inspect_dataset, *flags, "--decode_caches", "--ltx2_checkpoint", demo.checkpoint) == 0
    assert "Decoded caches: 2" in _page(tmp_path).text
    decoded = sorted((tmp_path / "decoded" / "datasets_0").iterdir())
    assert len(decoded) == 2
    with av.open(str(decoded[0])) as container:
        assert len(container.streams.audio) == 1
        assert sum(1 for _ in container.decode(video=0)) == 17


def test_a_list_with_a_folder_of_images_and_a_missing_file(tmp_path: Path) -> None:
    frames = tmp_path / "frames"
    frames.mkdir()
    for index in range(20):
        Image.fromarray(index_frame(index)).save(frames / f"{index}.png")  # 10 comes before 2
    lines = [{"video_path": "frames", "caption": "numbers"}, {"video_path": "gone.mp4", "caption": "gone"}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    config = tmp_path / "list.toml"
    config.write_text(
        "[general]\nresolution = [128, 64]\n[[datasets]]\nvideo_jsonl_file = 'list.jsonl'\n"
        "cache_directory = 'cache'\ntarget_frames = [17]\n",
        encoding="utf-8",
    )
    assert _status(inspect_dataset, "--dataset_config", config) == 1
    page = _page(tmp_path / "inspection")
    assert page.tags.count("img") == 1
    assert "0.12 s not used" in page.text
    assert "pad the numbers" in page.text
    assert "does not exist (video_path of list.jsonl:2)" in page.text
    assert _status(cache_latents, "--dataset_config", config, "--dry_run", "--allow_failed") == 0


def test_a_dataset_of_caches_alone(cached_demo, tmp_path: Path) -> None:
    demo = cached_demo()
    config = tmp_path / "caches.toml"
    text = f"[general]\nresolution = [192, 128]\n[[datasets]]\ncache_only = true\ncache_directory = '{demo.cache}'\n"
    config.write_text(text, encoding="utf-8")
    flags = ("--dataset_config", config, "--ltx2_mode", "av")
    assert _status(inspect_dataset, *flags) == 0
    assert "no sources to look at" in _page(tmp_path / "inspection").text
    assert _status(inspect_dataset, *flags, "--decode_caches", "--ltx2_checkpoint", demo.checkpoint) == 0
    assert _page(tmp_path / "inspection").tags.count("img") == 4


def test_wrong_flags(videos: Path, capsys) -> None:
    assert _status(inspect_dataset, "--decode_caches", "--max_items", -1) == 2
    error = capsys.readouterr().err
    assert "--dataset_config is required" in error
    assert "--decode_caches needs --ltx2_checkpoint" in error
    assert "--max_items -1" in error
    assert _status(cache_latents, "--dataset_config", videos, "--encode_rate", 0) == 2
    error = capsys.readouterr().err
    assert "--ltx2_checkpoint is required" in error
    assert "--encode_rate needs --dry_run" in error


# --- without encoding ---------------------------------------------------------------------------------------


def test_prepared_clips_as_videos_with_sound(videos: Path) -> None:
    flags = ("--dataset_config", videos, "--ltx2_mode", "av", "--debug_mode", "video")
    assert _status(cache_latents, *flags) == 0
    written = sorted((videos.parent / "debug" / "datasets_0").iterdir())
    assert [path.name for path in written] == sorted(f"{n}_00000-017.mp4" for n in ("plain", "other", ODD))
    with av.open(str(written[-1])) as container:
        frames = [read_index(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
        assert len(container.streams.audio) == 1
    assert frames == list(range(17))
    assert not (videos.parent / "cache_video").exists()


def test_prepared_clips_as_pictures_and_as_a_table(videos: Path, capsys) -> None:
    assert _status(cache_latents, "--dataset_config", videos, "--debug_mode", "image") == 0
    picture = Image.open(videos.parent / "debug" / "datasets_0" / "plain_00000-017.png")
    assert picture.size == (8 * 128 + 7 * 3, 64)
    assert _status(cache_latents, "--dataset_config", videos, "--debug_mode", "console") == 0
    assert re.search(r"other_00000-017 +128x64 +17 +0.68 +24 +0", capsys.readouterr().err)


def test_prepared_clips_of_an_earlier_run_go_and_files_of_the_user_stay(videos: Path) -> None:
    flags = ("--dataset_config", videos, "--debug_mode")
    folder = videos.parent / "debug" / "datasets_0"
    assert _status(cache_latents, *flags, "video") == 0
    mine = folder / "plain_00000-017.txt"
    mine.write_text("a remark", encoding="utf-8")
    (videos.parent / "clips" / "other.mp4").unlink()
    assert _status(cache_latents, *flags, "console") == 0
    assert (folder / "other_00000-017.mp4").exists()
    assert _status(cache_latents, *flags, "image") == 0
    assert {path.name for path in folder.iterdir()} == {mine.name, "plain_00000-017.png", f"{ODD}_00000-017.png"}


def test_a_damaged_file_does_not_stop_prepared_clips(videos: Path) -> None:
    (videos.parent / "clips" / "bad.mp4").write_bytes(b"nothing")
    (videos.parent / "clips" / "bad.txt").write_text("bad", encoding="utf-8")
    flags = ("--dataset_config", videos, "--debug_mode", "video")
    assert _status(cache_latents, *flags) == 1
    assert len(list((videos.parent / "debug" / "datasets_0").iterdir())) == 3
    assert _status(cache_latents, *flags, "--allow_failed") == 0
    assert _status(cache_latents, "--dataset_config", videos, "--dry_run") == 1


def test_a_dry_run_writes_nothing_and_knows_the_size(cached_demo, capsys) -> None:
    demo = cached_demo()
    before = sorted(demo.cache.parent.rglob("*"))
    common = ("--dataset_config", demo.dataset, "--ltx2_mode", "av", "--dry_run")
    common += ("--vae_dtype", "fp32", "--ltx2_audio_dtype", "fp32")
    assert _status(cache_latents, *common) == 0
    assert sorted(demo.cache.parent.rglob("*")) == before
    said = capsys.readouterr().err
    found = re.search(r"datasets\[0\] +video +4 +0 +4 +4 +([\d.]+) KiB +([\d.]+) KiB", said)
    assert found
    sizes = [sum(p.stat().st_size for p in demo.cache.glob(f"*128_ltx2{end}.safetensors")) for end in ("", "_audio")]
    assert [1024 * float(size) for size in found.groups()] == pytest.approx(sizes, rel=0.05)
    assert "give --encode_rate" in said

    assert _status(cache_latents, *common, "--encode_rate", "0.5") == 0
    assert "encoding: about 3.34 s for 2 megapixels" in capsys.readouterr().err  # 4 clips of 192x128x17

    assert _status(cache_latents, *common, "--ltx2_checkpoint", demo.checkpoint) == 0
    assert "together: about" in capsys.readouterr().err


@pytest.fixture
def accompanied(videos: Path) -> Path:
    """The three videos with references and masks; one lacks a reference, another has a mask of another shape."""
    folder = videos.parent
    for name in ("refs", "masks"):
        (folder / name).mkdir()
    for stem in ("plain", "other", ODD):
        size = (64, 64) if stem == "other" else (128, 64)
        Image.new("RGB", size, "white").save(folder / "masks" / f"{stem}.png")
        if stem != "plain":
            Image.new("RGB", (128, 64), "red").save(folder / "refs" / f"{stem}.png")
    more = "reference_directory = 'refs'\nreference_cache_directory = 'rc'\nmask_directory = 'masks'\n"
    return _config(folder, "video", "clips", f"target_frames = [17]\n{more}")


def test_the_page_shows_references_and_masks_and_what_is_missing(accompanied: Path, capsys) -> None:
    assert _status(inspect_dataset, "--dataset_config", accompanied) == 1
    page = _page(accompanied.parent / "inspection")
    assert page.text.count("1 frame of 128x64") == 2
    assert "mask plain.png: keeps 100%" in page.text
    assert page.tags.count("img") == 3 + 2 + 2  # clips, references, masks
    said = capsys.readouterr().err
    assert "reference 2 of 3, mask 3 of 3" in said
    assert "no reference: 1 file: plain.mp4" in said
    assert "unreadable mask: 1 file: other.mp4" in said


@pytest.mark.parametrize("flags", [("--dry_run",), ("--debug_mode", "console")])
def test_missing_references_are_counted_without_encoding(accompanied: Path, capsys, flags: tuple[str, ...]) -> None:
    assert _status(cache_latents, "--dataset_config", accompanied, *flags) == 1
    said = capsys.readouterr().err
    assert "datasets[0]: reference 2 of 3, mask 3 of 3" in said
    assert "missing: datasets[0]: no reference for plain.mp4" in said
    Image.new("RGB", (128, 64)).save(accompanied.parent / "refs" / "plain.png")
    assert _status(cache_latents, "--dataset_config", accompanied, *flags) == 0


def test_the_flags_of_references_are_those_of_caching(accompanied: Path, capsys) -> None:
    flags = ("--reference_downscale", "2", "--reference_frames", "9")
    _status(inspect_dataset, "--dataset_config", accompanied, *flags)
    assert _page(accompanied.parent / "inspection").text.count("9 frames of 64x32") == 2
    assert _status(inspect_dataset, "--dataset_config", accompanied, "--reference_frames", "8") == 2
    assert "--reference_frames 8: expected a number of frames of the form 8k + 1" in capsys.readouterr().err


def test_buckets_are_those_that_the_references_allow(tmp_path: Path, capsys) -> None:
    (tmp_path / "clips").mkdir()
    write_video(tmp_path / "clips" / "a.mp4", 10, size=(352, 224))
    (tmp_path / "clips" / "a.txt").write_text("a", encoding="utf-8")
    more = "resolution = [352, 224]\nenable_bucket = true\ntarget_frames = [9]\n"
    config = tmp_path / "d.toml"
    config.write_text(f"[[datasets]]\nvideo_directory = 'clips'\n{more}", encoding="utf-8")
    for flags, step in (((), 32), (("--reference_downscale", "2"), 64)):
        assert _status(inspect_dataset, "--dataset_config", config, *flags) == 0
        found = re.search(r"datasets\[0\] +(\d+)x(\d+) +9 +1 +(\d+)", capsys.readouterr().err)
        width, height, tokens = map(int, found.groups())
        assert (width % step, height % step) == (0, 0)
        assert (width == 352) == (step == 32)
        assert tokens == 2 * (width // 32) * (height // 32)
