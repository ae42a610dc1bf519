from pathlib import Path

import pytest
import torch
from cache_files import WIDTHS, write_item
from hypothesis import given
from hypothesis import strategies as st

from musubi_tuner.common.av import AV
from musubi_tuner.common.errors import UserError
from musubi_tuner.common.safetensors_io import SafetensorsFile, save_safetensors
from musubi_tuner.dataset.cache import (
    CacheName,
    TensorKey,
    clip_base,
    list_caches,
    read_audio,
    read_audio_header,
    read_latent_header,
    read_latents,
    read_text,
    read_text_header,
    read_virtual_grid,
    split_clip_base,
    write_audio,
    write_latents,
    write_text,
)

KINDS = ("latents", "audio", "text", "dino", "mask")


@pytest.mark.parametrize(
    ("name", "file_name"),
    [
        (CacheName("clip_00000-049", "latents", (768, 512)), "clip_00000-049_0768x0512_ltx2.safetensors"),
        (CacheName("clip_00000-049", "audio", (768, 512)), "clip_00000-049_0768x0512_ltx2_audio.safetensors"),
        (CacheName("clip", "text"), "clip_ltx2_te.safetensors"),
        (CacheName("clip_00000-049", "dino", (768, 512)), "clip_00000-049_0768x0512_ltx2_dino.safetensors"),
        (CacheName("photo", "latents", (1500, 1000)), "photo_1500x1000_ltx2.safetensors"),
        (CacheName("a", "audio", (768, 512)), "a_0768x0512_ltx2_audio.safetensors"),
        (CacheName("pan", "latents", (12000, 512)), "pan_12000x0512_ltx2.safetensors"),
        (CacheName("a_b", "audio"), "a_b_ltx2_audio.safetensors"),  # sound without a size, as in old caches
    ],
)
def test_names_are_built_and_parsed(name: CacheName, file_name: str) -> None:
    assert str(name) == file_name
    assert CacheName.parse(file_name) == name


@pytest.mark.parametrize(
    "file_name",
    ["clip.safetensors", "clip_ltx2.pt", "clip_0768x0512_ltx2.partial-0a1b2c3d.safetensors", "_ltx2_te.txt"],
)
def test_foreign_names_are_not_caches(file_name: str) -> None:
    assert CacheName.parse(file_name) is None


@given(
    stem=st.text("ab_0x1[]é .-", min_size=1),
    kind=st.sampled_from(KINDS),
    size=st.tuples(st.integers(32, 20000), st.integers(32, 20000)),
)
def test_any_stem_survives_the_name(stem: str, kind: str, size: tuple[int, int]) -> None:
    name = CacheName(stem, kind, None if kind == "text" else size)  # type: ignore[arg-type]
    assert CacheName.parse(str(name)) == name


def test_clip_ranges_are_read_from_the_right() -> None:
    assert clip_base("a_00000-049", 49, 49) == "a_00000-049_00049-049"
    assert split_clip_base("a_00000-049_00049-049") == ("a_00000-049", 49, 49)
    assert split_clip_base("a_b") is None


def test_directories_with_brackets_are_listed_in_order(tmp_path: Path) -> None:
    directory = tmp_path / "set [v1] *"
    for base in ("b_00000-009", "a_00000-009"):
        write_item(directory, base, stem=base[0])
    (directory / "notes.txt").write_text("x", encoding="utf-8")
    names = list_caches(directory)
    assert [n.base for n in names if n.kind == "latents"] == ["a_00000-009", "b_00000-009"]
    assert len(names) == 4
    assert list_caches(tmp_path / "absent") == {}


@pytest.mark.parametrize(
    ("key", "parsed"),
    [
        ("latents_7x16x24_bfloat16", TensorKey("latents", (7, 16, 24), "bfloat16")),
        ("latents_7x16x24_float8_e4m3fn", TensorKey("latents", (7, 16, 24), "float8_e4m3fn")),
        ("audio_latents_50x16x8_fp16", TensorKey("audio_latents", (50, 16, 8), "fp16")),
        ("ref_latents_1x16x24_float32", TensorKey("ref_latents", (1, 16, 24), "float32")),
        ("audio_lengths_int32", TensorKey("audio_lengths", None, "int32")),
        ("prompt_attention_mask", TensorKey("prompt_attention_mask")),
        ("text_mask", TensorKey("text_mask")),
        ("video_prompt_embeds_bfloat16", TensorKey("video_prompt_embeds", None, "bfloat16")),
        ("ltx2_virtual_num_frames_int32", TensorKey("ltx2_virtual_num_frames", None, "int32")),
        ("dino_features", TensorKey("dino_features")),
    ],
)
def test_tensor_keys(key: str, parsed: TensorKey) -> None:
    assert TensorKey.parse(key) == parsed


def test_video_latents_have_the_documented_layout(tmp_path: Path) -> None:
    path = tmp_path / "clip_00000-049_0768x0512_ltx2.safetensors"
    latents = torch.randn(128, 7, 16, 24, dtype=torch.bfloat16)
    write_latents(path, latents, {"cache_key": "k"}, frame_count=49)
    assert path.stat().st_size == pytest.approx(688_344, abs=600)
    file = SafetensorsFile(path)
    assert {k: i.shape for k, i in file.tensors.items()} == {"latents_7x16x24_bfloat16": (128, 7, 16, 24)}
    expected = {"architecture": "ltx2_v1", "format_version": "1.0.1", "width": "768", "height": "512"}
    assert file.metadata == {**expected, "frame_count": "49", "cache_key": "k"}
    assert torch.equal(read_latents(path), latents)
    header = read_latent_header(path)
    assert (header.channels, header.grid, header.has_virtual_grid) == (128, (7, 16, 24), False)
    assert read_virtual_grid(path) is None


def test_images_carry_their_own_size_and_no_frame_count(tmp_path: Path) -> None:
    path = tmp_path / "photo_1500x1000_ltx2.safetensors"
    write_latents(path, torch.zeros(128, 1, 16, 24, dtype=torch.bfloat16), {})
    file = SafetensorsFile(path)
    assert list(file.tensors) == ["latents_1x16x24_bfloat16"]
    assert (file.metadata["width"], file.metadata["height"]) == ("1500", "1000")
    assert "frame_count" not in file.metadata


def test_audio_latents_have_the_documented_layout(tmp_path: Path) -> None:
    path = tmp_path / "clip_00000-049_0768x0512_ltx2_audio.safetensors"
    latents = torch.randn(8, 50, 16, dtype=torch.float16)
    write_audio(path, latents, {})
    shapes = {k: i.shape for k, i in SafetensorsFile(path).tensors.items()}
    assert shapes == {"audio_latents_50x16x8_float16": (8, 50, 16), "audio_lengths_int32": ()}
    read, length = read_audio(path)
    assert torch.equal(read, latents)
    assert length == 50
    assert read_audio_header(path).steps == 50


def test_the_placeholder_of_mode_audio_keeps_the_virtual_geometry(tmp_path: Path) -> None:
    path = tmp_path / "a_0768x0512_ltx2.safetensors"
    write_latents(path, torch.zeros(128, 1, 1, 1, dtype=torch.float16), {}, virtual_grid=(23, 2, 2))
    assert set(SafetensorsFile(path).tensors) == {
        "latents_1x1x1_float16",
        "ltx2_virtual_num_frames_int32",
        "ltx2_virtual_height_int32",
        "ltx2_virtual_width_int32",
    }
    assert read_virtual_grid(path) == (23, 2, 2)
    assert read_latent_header(path).has_virtual_grid


def test_text_keys_hold_both_modalities_and_their_concatenation(tmp_path: Path) -> None:
    path = tmp_path / "clip_ltx2_te.safetensors"
    video, audio = torch.randn(6, 5).bfloat16(), torch.randn(6, 3).bfloat16()
    write_text(path, AV(video, audio), torch.ones(6), {}, caption="a cat, in full")
    tensors = dict(SafetensorsFile(path).read())
    assert set(tensors) == {
        *("video_prompt_embeds_bfloat16", "audio_prompt_embeds_bfloat16", "prompt_attention_mask"),
        *("text_bfloat16", "text_mask"),
    }
    assert tensors["prompt_attention_mask"].dtype == torch.int64
    assert torch.equal(tensors["text_bfloat16"], torch.cat([video, audio], dim=-1))
    assert SafetensorsFile(path).metadata["caption1"] == "a cat, in full"
    header = read_text_header(path)
    assert (header.tokens, header.widths, header.legacy_width) == (6, AV(5, 3), 8)


def test_legacy_text_keys_can_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "clip_ltx2_te.safetensors"
    write_text(path, AV(torch.ones(6, 5)), torch.ones(6), {}, caption="", legacy_keys=False)
    assert set(SafetensorsFile(path).tensors) == {"video_prompt_embeds_float32", "prompt_attention_mask"}


def test_a_file_with_one_text_tensor_is_split_by_the_widths(tmp_path: Path) -> None:
    path = tmp_path / "clip_ltx2_te.safetensors"
    text = torch.randn(6, 8)
    save_safetensors({"text_float32": text, "text_mask": torch.ones(6, dtype=torch.int64)}, path)
    embeds, mask = read_text(path, ("video", "audio"), WIDTHS)
    assert torch.equal(embeds.video, text[:, :5])
    assert torch.equal(embeds.audio, text[:, 5:])
    assert mask is not None
    assert mask.dtype == torch.bool
    with pytest.raises(UserError, match="width 8, of which the video part is not known"):
        read_text(path, ("video",), AV(7, 7))


def test_a_legacy_file_of_mode_video_has_no_audio_part(tmp_path: Path) -> None:
    path = tmp_path / "clip_ltx2_te.safetensors"
    save_safetensors({"text_float32": torch.randn(6, 4)}, path)
    assert read_text(path, ("video",), AV(4, 4))[0].video is not None
    with pytest.raises(UserError, match="audio part is not known"):
        read_text(path, ("audio",), AV(4, 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_are_refused_and_leave_no_file(tmp_path: Path, bad: float) -> None:
    latents = torch.zeros(4, 1, 1, 1)
    latents[0] = bad
    writers = [
        lambda: write_latents(tmp_path / "a_0032x0032_ltx2.safetensors", latents, {}),
        lambda: write_audio(tmp_path / "a_0032x0032_ltx2_audio.safetensors", latents[:, 0], {}),
        lambda: write_text(tmp_path / "a_ltx2_te.safetensors", AV(latents[:, 0, 0]), torch.ones(4), {}, caption="a"),
    ]
    for write in writers:
        with pytest.raises(UserError, match="NaN or infinity"):
            write()
    assert list(tmp_path.iterdir()) == []


def test_a_text_cache_is_overwritten_whole(tmp_path: Path) -> None:
    path = tmp_path / "clip_ltx2_te.safetensors"
    write_text(path, AV(torch.ones(6, 5), torch.ones(6, 3)), torch.ones(6), {}, caption="a")
    write_text(path, AV(torch.ones(6, 5)), torch.ones(6), {}, caption="a")
    assert "audio_prompt_embeds_float32" not in SafetensorsFile(path).tensors


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "clip_00000-049_0064x0032_ltx2.safetensors"
    save_safetensors({"something_else": torch.ones(1)}, path)
    with pytest.raises(UserError, match=r"clip_00000-049.*has no latents.*something_else"):
        read_latent_header(path)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match="truncated"):
        read_latent_header(path)
