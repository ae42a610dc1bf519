import json
import logging

import pytest

from musubi_tuner.common.errors import ConfigErrors, UserError
from musubi_tuner.dataset.entries import DatasetConfig
from musubi_tuner.dataset.schema import check_mode, load_dataset_config


@pytest.fixture
def folder(tmp_path):
    for directory, name in (("videos", "a.mp4"), ("more", "b.MOV"), ("images", "c.PNG"), ("sounds", "d.wav")):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / name).write_bytes(b"x")
    return tmp_path


def _load(folder, text: str, **options) -> DatasetConfig:
    path = folder / "dataset.toml"
    path.write_text(text, encoding="utf-8")
    return load_dataset_config(path, **options)


def _problems(folder, text: str, **options) -> tuple[str, ...]:
    with pytest.raises(ConfigErrors) as caught:
        _load(folder, text, **options)
    return caught.value.problems


def _video(*lines: str) -> str:
    return "\n".join(["[[datasets]]", 'video_directory = "videos"', *lines])


# --- values -------------------------------------------------------------------------------------------------


def test_defaults_of_a_video_dataset(folder) -> None:
    (entry,) = _load(folder, _video()).datasets
    assert (entry.kind, entry.source, entry.cache_directory) == (
        "video",
        folder / "videos",
        folder / "videos",
    )
    assert (entry.resolution, entry.caption_extension) == ((960, 544), ".txt")
    assert (entry.batch_size, entry.num_repeats, entry.enable_bucket) == (1, 1, False)
    assert (entry.target_frames, entry.frame_extraction, entry.frame_stride) == ((1,), "head", 1)
    assert (entry.frame_sample, entry.max_frames, entry.source_fps, entry.target_fps) == (1, 129, None, 25.0)


def test_the_guide_example(folder) -> None:
    config = _load(
        folder,
        """
        [general]
        resolution = [768, 512]
        caption_extension = ".txt"
        batch_size = 1
        enable_bucket = true
        cache_directory = "cache"
        [[datasets]]
        video_directory = "videos"
        target_frames = [1, 17, 33, 49]
        target_fps = 25 # an integer
        """,
    )
    (entry,) = config.datasets
    assert entry.resolution == (768, 512)
    assert entry.enable_bucket
    assert entry.target_frames == (1, 17, 33, 49)
    assert entry.cache_directory == folder / "cache"
    assert entry.bucket((1920, 1080)) == (800, 480)


def test_values_come_from_the_entry_then_general_then_the_command_line(folder) -> None:
    text = """
    [general]
    batch_size = 2
    target_fps = 30
    audio_loss_weight = 0.5
    [[datasets]]
    audio_directory = "sounds"
    batch_size = 3
    [[datasets]]
    video_directory = "videos"
    """
    line = {
        "audio_bucket_interval": 4.0,
        "audio_loss_weight": 9.0,
        "batch_size": 7,
        "video_loss_weight": None,
    }
    sound, video = _load(folder, text, command_line=line).datasets
    assert (sound.batch_size, video.batch_size) == (3, 2)
    assert (sound.target_fps, video.target_fps) == (25.0, 30.0)  # a key of videos means nothing to sounds
    assert (sound.audio_bucket_interval, sound.audio_loss_weight, sound.video_loss_weight) == (4.0, 0.5, None)


def test_json_means_the_same_as_toml(folder) -> None:
    toml = _load(folder, '[general]\nresolution = 512\n[[datasets]]\nimage_directory = "images"')
    path = folder / "dataset.json"
    path.write_text(
        json.dumps({"general": {"resolution": 512}, "datasets": [{"image_directory": "images"}]}),
        encoding="utf-8",
    )
    loaded = load_dataset_config(path)
    assert loaded.datasets == toml.datasets
    assert loaded.datasets[0].resolution == (512, 512)


def test_a_byte_order_mark_is_accepted(folder) -> None:
    path = folder / "dataset.toml"
    path.write_bytes(b"\xef\xbb\xbf" + _video().encode())
    assert load_dataset_config(path).datasets


def test_caption_extension_without_a_dot(folder) -> None:
    assert _load(folder, _video('caption_extension = "caption"')).datasets[0].caption_extension == ".caption"


def test_frame_counts_are_rounded_down_to_8k_plus_1(folder, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        (entry,) = _load(folder, _video("target_frames = [50, 20, 17]")).datasets
    assert entry.target_frames == (17, 49)
    assert "50 -> 49, 20 -> 17" in caplog.text


def test_uniform_extraction_of_one_clip_is_head(folder, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        (entry,) = _load(folder, _video('frame_extraction = "uniform"')).datasets
    assert entry.frame_extraction == "head"
    assert "same as head" in caplog.text


def test_no_upscale_means_nothing_without_buckets(folder) -> None:
    assert not _load(folder, _video("bucket_no_upscale = true")).datasets[0].bucket_no_upscale


def test_keys_of_other_models_are_accepted_with_a_warning(folder, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        _load(folder, '[[datasets]]\nimage_directory = "images"\nfp_latent_window_size = 9')
    assert "datasets[0].fp_latent_window_size" in caplog.text


# --- paths --------------------------------------------------------------------------------------------------


def test_paths_lie_beside_the_file_or_in_the_working_directory(folder, monkeypatch) -> None:
    (folder / "configs").mkdir()
    monkeypatch.chdir(folder)
    text = '[[datasets]]\nvideo_directory = "videos"\ncache_directory = "cache"'
    path = folder / "configs" / "dataset.toml"
    path.write_text(text, encoding="utf-8")
    entry = load_dataset_config(path).datasets[0]
    assert (entry.source, entry.cache_directory) == (folder / "videos", folder / "cache")

    (folder / "configs" / "videos").mkdir()
    (folder / "configs" / "videos" / "a.mp4").write_bytes(b"x")
    entry = load_dataset_config(path).datasets[0]
    assert entry.source == folder / "configs" / "videos"
    assert entry.cache_directory == folder / "configs" / "cache"  # new: beside its source


def test_a_new_cache_lies_beside_the_file_wherever_the_script_is_started(folder, monkeypatch) -> None:
    (folder / "configs").mkdir()
    path = folder / "configs" / "dataset.toml"
    source = (folder / "videos").as_posix()
    path.write_text(f'[[datasets]]\nvideo_directory = "{source}"\ncache_directory = "new"', encoding="utf-8")
    monkeypatch.chdir(folder)
    assert load_dataset_config(path).datasets[0].cache_directory == folder / "configs" / "new"


def test_training_needs_no_sources(folder) -> None:
    text = '[[datasets]]\nvideo_directory = "gone"\ncache_directory = "cache"'
    assert "does not exist" in _problems(folder, text)[0]
    assert _load(folder, text, need_sources=False).datasets[0].source.name == "gone"
    (entry,) = _load(folder, '[[datasets]]\ncache_only = true\ncache_directory = "cache"').datasets
    assert entry.source is None


# --- problems -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('target_fps = "abc"', 'target_fps: expected a number > 0, got "abc"'),
        ("target_fps = 0", "target_fps: expected a number > 0, got 0"),
        ("target_fps = nan", "target_fps: expected a number > 0, got NaN"),
        ("batch_size = true", "batch_size: expected an integer >= 1, got true"),
        ("batch_size = 1.0", "batch_size: expected an integer >= 1, got 1.0"),
        ("enable_bucket = 1", "enable_bucket: expected true or false, got 1"),
        ("video_loss_weight = -1", "video_loss_weight: expected a number >= 0, got -1"),
        ("resolution = [1, 2, 3]", "resolution: expected an integer >= 1 or [width, height], got [1, 2, 3]"),
        (
            "target_frames = []",
            "target_frames: expected a list of integers >= 1, such as [1, 25, 49], got []",
        ),
        (
            "target_frames = [0]",
            "target_frames: expected a list of integers >= 1, such as [1, 25, 49], got [0]",
        ),
        (
            'frame_extraction = "chunks"',
            "frame_extraction: expected one of head, chunk, slide, uniform, full (did you mean 'chunk'?), "
            'got "chunks"',
        ),
        ("resolution = [1000, 600]", "got [1000, 600]; nearest: [992, 608]"),
        ("resolution = [16, 512]", "resolution: expected at least 32 per side, got [16, 512]"),
        ("resolution = 60\nenable_bucket = true", "expected an area of at least 64x64 with enable_bucket"),
        ('frame_extraction = "chunk"\ntarget_frames = [1, 17]', "an item of every single frame; remove it"),
        ("taget_frames = [1]", "taget_frames: unknown key (did you mean 'target_frames'?)"),
        ("audio_bucket_interval = 2", "belongs to audio datasets, this is a video dataset"),
        ('ltx2_mode = "av"', "ltx2_mode: is a command-line option; give it as --ltx2_mode"),
        ('reference_directory = "x"', "reference_cache_directory: needed with reference_directory"),
        ('control_directory = "x"', "reference_cache_directory: needed with control_directory"),
        ('reference_audio_directory = "x"', "reference_audio_cache_directory: needed with reference_audio_directory"),
        (
            'reference_cache_directory = "x"',
            "needs reference_directory or control_directory",
        ),
        (
            'reference_directory = "x"\nreference_cache_directory = "videos"',
            "reference_cache_directory: is also the cache_directory of datasets[0]",
        ),
        ('mask_directory = "x"', "does not exist"),
        ("reference_frames = 4", "reference_frames: expected a number of frames of the form 8k + 1"),
        ("reference_downscale = 2\nresolution = [96, 64]", "expected multiples of 64 (32 x reference_downscale 2)"),
        (
            'image_directory = "images"',
            "expected exactly one of video_directory, image_directory, audio_directory",
        ),
    ],
)
def test_bad_values(folder, line, problem) -> None:
    problems = _problems(folder, _video(line))
    assert any(problem in p for p in problems), problems
    assert all(p.startswith("datasets[0]") for p in problems)


def test_all_problems_are_reported_together(folder) -> None:
    problems = _problems(
        folder,
        """
        batch_size = 1
        [general]
        resolution = "big"
        video_directory = "videos"
        [[dataset]]
        [[datasets]]
        video_directory = "videos"
        batch_size = 0
        [[datasets]]
        target_fps = 25
        [[datasets]]
        video_jsonl_file = "list.jsonl"
        [[datasets]]
        cache_only = true
        [[validation_datasets]]
        image_directory = "nowhere"
        """,
    )
    starts = {p.split(":")[0] for p in problems}
    assert starts == {
        "batch_size",
        "dataset",
        "general.resolution",
        "general.video_directory",
        "datasets[0].batch_size",
        "datasets[1]",
        "datasets[2].cache_directory",
        "datasets[2].video_jsonl_file",
        "datasets[3].cache_directory",
        "validation_datasets[0].image_directory",
    }
    assert any("did you mean 'datasets'" in p for p in problems)
    assert any("[general] or [[datasets]]" in p for p in problems)


def test_no_dataset_at_all(folder) -> None:
    assert "at least one [[datasets]]" in _problems(folder, "[general]\nbatch_size = 1")[0]
    assert "double brackets" in _problems(folder, '[datasets]\nvideo_directory = "videos"')[0]


def test_larger_resolutions_with_buckets_need_not_be_divisible(folder) -> None:
    assert _load(folder, _video("resolution = [1000, 600]", "enable_bucket = true")).datasets


def test_a_cache_directory_belongs_to_one_dataset(folder) -> None:
    text = """
    [[datasets]]
    video_directory = "videos"
    cache_directory = "cache"
    [[validation_datasets]]
    video_directory = "more"
    cache_directory = "./x/../cache"
    """
    (problem,) = _problems(folder, text)
    assert problem.startswith("validation_datasets[0].cache_directory: is also that of datasets[0]")
    (problem,) = _problems(folder, _video() + "\n" + _video())  # by default: the source directory
    assert problem.startswith("datasets[1].cache_directory")


def test_a_directory_of_another_kind_names_the_right_key(folder) -> None:
    (problem,) = _problems(folder, '[[datasets]]\nvideo_directory = "images"')
    assert "holds no video file" in problem
    assert "image files: use image_directory" in problem


def test_equal_stems_name_both_files(folder) -> None:
    (folder / "videos" / "A.mov").write_bytes(b"x")
    (problem,) = _problems(folder, _video())
    assert "A.mov and a.mp4" in problem


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.toml", None, "not found"),
        ("d.yaml", b"", ".toml or .json"),
        ("d.toml", b"[general]\nx = ", "at end of document"),
        ("d.toml", b"[general]\nx = y", "line 2"),
        ("d.toml", b'[[datasets]]\nvideo_directory = "C:\\videos"', "Windows paths"),
        ("d.json", b'{"datasets": [}', "line 1"),
        ("d.json", b"[]", "expected an object"),
        ("d.toml", b'x = "\xff"', "UTF-8"),
    ],
)
def test_unreadable_files(tmp_path, name, content, message) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_dataset_config(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


# --- mode ---------------------------------------------------------------------------------------------------


def test_modes_and_kinds(folder) -> None:
    sound = '[[datasets]]\naudio_directory = "sounds"\n'
    image = '[[datasets]]\nimage_directory = "images"\n'
    assert check_mode(_load(folder, _video() + "\n" + image), "av") == "av"
    assert check_mode(_load(folder, sound), "video") == "audio"
    assert check_mode(_load(folder, sound), "audio") == "audio"
    mixed = _load(folder, sound + image + _video())
    with pytest.raises(ConfigErrors) as caught:
        check_mode(mixed, "audio")
    assert [p.split(":")[0] for p in caught.value.problems] == ["datasets[1]", "datasets[2]"]
    with pytest.raises(ConfigErrors, match=r"datasets\[0\]: an audio dataset cannot be used with --ltx2_mode av"):
        check_mode(mixed, "av")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("target_fps = 1" + "0" * 400, "target_fps: expected a number > 0"),
        ('cache_directory = "a\\u0000b"', "cache_directory: expected a path without the character 0"),
        ('caption_extension = " . "', "caption_extension: expected an extension"),
    ],
    ids=["integer beyond every float", "character 0", "only a dot"],
)
def test_values_that_no_file_should_hold_are_problems_and_no_crash(folder, line: str, problem: str) -> None:
    (found,) = _problems(folder, _video(line))
    assert found.startswith(f"datasets[0].{problem}")


def test_a_number_of_thousands_of_digits_is_named_with_its_file(folder) -> None:
    with pytest.raises(UserError, match=r"dataset\.toml: not valid TOML"):
        _load(folder, _video("target_fps = 1" + "0" * 5000))


def test_a_name_that_begins_with_a_tilde_is_no_user(folder) -> None:
    assert _load(folder, _video('cache_directory = "~nobody here"')).datasets[0].cache_directory.parent == folder


def test_without_its_cache_directory_the_rest_of_a_list_is_checked_as_well(folder) -> None:
    text = """
        [[datasets]]
        video_jsonl_file = "gone.jsonl"
        mask_directory = "gone"
        [[datasets]]
        image_jsonl_file = "gone too.jsonl"
    """
    problems = "\n".join(_problems(folder, text))
    for part in (
        "datasets[0].cache_directory: needed with video_jsonl_file",
        "datasets[0].video_jsonl_file",
        "datasets[0].mask_directory",
        "datasets[1].cache_directory: needed with image_jsonl_file",
        "datasets[1].image_jsonl_file",
    ):
        assert part in problems
    assert len(problems.splitlines()) == 5
