from pathlib import Path

import pytest
import torch
from cache_files import AUDIO_WIDTH, CHANNELS, TOKENS, VIDEO_WIDTH, WIDTHS, one_dataset, write_item

from musubi_tuner.common.av import AV
from musubi_tuner.common.errors import UserError
from musubi_tuner.common.safetensors_io import SafetensorsFile, save_safetensors
from musubi_tuner.dataset.batch import SampleKey
from musubi_tuner.dataset.collate import collate, damaged_files, load_batch, load_item
from musubi_tuner.dataset.sampling import BatchSpec


def _load(items, mode, **options):
    loaded = [load_item(item, mode, SampleKey(item.base)) for item in items]
    return collate(loaded, **options)


@pytest.mark.parametrize("part", ["latents", "audio", "text"])
def test_damaged_files_are_found_among_those_of_a_batch(tmp_path: Path, part: str) -> None:
    items = [write_item(tmp_path, name, audio_steps=3) for name in ("a", "b", "c")]
    keys = [SampleKey("a"), SampleKey("b", repeat=1)]
    training_set = one_dataset(items)
    assert damaged_files(training_set, keys) == []
    for item, value in ((items[1], float("inf")), (items[2], float("nan"))):  # c is in another batch
        file = SafetensorsFile(getattr(item, part))
        tensors = {key: t + value if t.is_floating_point() else t for key, t in file.read()}
        save_safetensors(tensors, file.path, file.metadata)
    assert damaged_files(training_set, keys) == [getattr(items[1], part)]
    getattr(items[0], part).unlink()
    assert damaged_files(training_set, keys) == [getattr(items[0], part), getattr(items[1], part)]


def test_videos_with_and_without_sound_share_a_batch(tmp_path: Path) -> None:
    items = [
        write_item(tmp_path, "a", audio_steps=5, value=1.0),
        write_item(tmp_path, "b", value=2.0),
        write_item(tmp_path, "c", audio_steps=7, value=3.0),
    ]
    batch = _load(items, "av")
    assert batch.video.latents.shape == (3, CHANNELS, 2, 1, 2)
    assert batch.video.fps.tolist() == [25.0] * 3
    assert batch.audio.latents.shape == (3, 8, 7, 16)
    assert batch.audio.lengths.tolist() == [5, 0, 7]
    assert batch.audio.latents.sum(dim=(1, 3))[0].tolist() == [128.0] * 5 + [0.0] * 2  # padding is zero
    assert batch.audio.latents[1].abs().max() == 0
    assert batch.text.video.shape == (3, TOKENS, VIDEO_WIDTH)
    assert batch.text.audio.shape == (3, TOKENS, AUDIO_WIDTH)
    assert batch.text.mask is None
    assert [key.name for key in batch.keys] == ["a", "b", "c"]


def test_no_sound_in_the_whole_batch_means_no_audio(tmp_path: Path) -> None:
    batch = _load([write_item(tmp_path, "a"), write_item(tmp_path, "b")], "av")
    assert batch.audio is None


def test_mode_video_reads_the_video_part_of_av_caches(tmp_path: Path) -> None:
    batch = _load([write_item(tmp_path, "a", audio_steps=5)], "video")
    assert batch.audio is None
    assert batch.text.audio is None
    assert batch.text.video.shape == (1, TOKENS, VIDEO_WIDTH)


def test_mode_audio_has_no_video_but_its_virtual_grid(tmp_path: Path) -> None:
    items = [
        write_item(tmp_path, name, grid=(1, 1, 1), audio_steps=steps, virtual_grid=(steps, 2, 2))
        for name, steps in (("a", 4), ("b", 6))
    ]
    batch = _load(items, "audio")
    assert batch.video is None
    assert batch.text.video is None
    assert batch.audio.virtual_grid.tolist() == [[4, 2, 2], [6, 2, 2]]
    assert batch.audio.lengths.tolist() == [4, 6]


def test_video_latents_are_refused_in_mode_audio(tmp_path: Path) -> None:
    item = write_item(tmp_path, "a", audio_steps=4)
    with pytest.raises(UserError, match=r"cache the latents again with --ltx2_mode audio"):
        load_item(item, "audio", SampleKey("a"))


def test_truncation_cuts_long_sounds_and_pads_short_ones(tmp_path: Path) -> None:
    items = [write_item(tmp_path, "a", audio_steps=9), write_item(tmp_path, "b", audio_steps=3)]
    batch = _load(items, "av", audio_steps=6)
    assert batch.audio.latents.shape == (2, 8, 6, 16)
    assert batch.audio.lengths.tolist() == [6, 3]
    assert batch.audio.latents[1, :, 3:].abs().max() == 0


def test_partial_masks_are_kept(tmp_path: Path) -> None:
    a, b = write_item(tmp_path, "a"), write_item(tmp_path, "b")
    embeds = torch.ones(TOKENS, VIDEO_WIDTH)
    mask = torch.tensor([1, 1, 0, 0, 0, 0])
    save_safetensors({"video_prompt_embeds_float32": embeds, "prompt_attention_mask": mask}, b.text)
    batch = _load([a, b], "video")
    assert batch.text.mask.dtype == torch.bool
    assert batch.text.mask.sum(dim=1).tolist() == [TOKENS, 2]


def test_a_batch_carries_the_dataset_and_its_weights(tmp_path: Path) -> None:
    training_set = one_dataset([write_item(tmp_path, "a")], loss_weights=AV(0.5, None))
    batch = load_batch(training_set, BatchSpec(0, ((0, 0), (0, 1))))
    assert batch.loss_weights == AV(0.5, None)
    assert batch.keys == (SampleKey("a", 0, 0), SampleKey("a", 0, 1))


def test_old_text_caches_are_split_by_the_widths_of_the_training_set(tmp_path: Path) -> None:
    item = write_item(tmp_path, "a", audio_steps=3)
    text = torch.randn(TOKENS, VIDEO_WIDTH + AUDIO_WIDTH)
    save_safetensors({"text_float32": text}, item.text)
    training_set = one_dataset([item])
    object.__setattr__(training_set, "legacy_text_widths", WIDTHS)
    batch = load_batch(training_set, BatchSpec(0, ((0, 0),)))
    assert torch.equal(batch.text.audio[0], text[:, VIDEO_WIDTH:])
