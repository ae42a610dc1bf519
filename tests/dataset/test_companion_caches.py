"""References and masks of cached items: found, held against their targets, stacked."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cache_files import CHANNELS, one_dataset, write_item, write_item_mask, write_reference, write_reference_audio

from musubi_tuner.common.av import AV
from musubi_tuner.common.errors import ConfigErrors, UserError
from musubi_tuner.common.safetensors_io import save_safetensors
from musubi_tuner.dataset.batch import SampleKey
from musubi_tuner.dataset.buckets import reference_scale
from musubi_tuner.dataset.cache import read_mask, read_mask_header, write_mask
from musubi_tuner.dataset.collate import collate, load_batch, load_item
from musubi_tuner.dataset.discovery import discover
from musubi_tuner.dataset.entries import DatasetConfig, DatasetEntry
from musubi_tuner.dataset.fingerprint import EncoderIds, RepairCommands, check_caches, provenance
from musubi_tuner.dataset.items import EncoderRecord
from musubi_tuner.dataset.sampling import BatchPlan, BatchSpec

GRID = (2, 4, 2)  # 9 frames of 64x128
COMMANDS = RepairCommands(Path("data.toml"), Path("ltx2.safetensors"), "video", latents=("--reference_downscale", "2"))


@pytest.fixture
def entry(tmp_path: Path) -> DatasetEntry:
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in "abcdefgh":
        (videos / f"{name}.mp4").write_bytes(b"never opened")
        (videos / f"{name}.txt").write_text(name, encoding="utf-8")
    (tmp_path / "cache").mkdir()
    return DatasetEntry(
        label="datasets[0]",
        kind="video",
        source=videos,
        cache_directory=tmp_path / "cache",
        resolution=(64, 128),
        target_frames=(9,),
        reference_cache_directory=tmp_path / "references",
        reference_audio_cache_directory=tmp_path / "sounds",
    )


def write_target(entry: DatasetEntry, stem: str, *, grid=GRID, **options):
    return write_item(entry.cache_directory, f"{stem}_00000-009", stem=stem, grid=grid, **options)


def find(entry: DatasetEntry, mode: str = "video", references=("video",)):
    return discover(DatasetConfig((entry,), (), Path("data.toml")), mode, references=references)


def refuse(entry: DatasetEntry, match: str, mode: str = "video", references=("video",), **encoders: str) -> str:
    with pytest.raises(ConfigErrors, match=match) as error:
        check_caches(find(entry, mode, references), encoders=EncoderIds(**encoders), commands=COMMANDS)
    return str(error.value)


def load(training_set, count: int = 1):
    return load_batch(training_set, BatchSpec(0, tuple((i, 0) for i in range(count))))


@pytest.mark.parametrize(
    ("target", "reference", "scale"),
    [
        ((5, 8, 12), (1, 8, 12), 1),
        ((5, 8, 12), (5, 4, 6), 2),
        ((1, 8, 12), (2, 2, 3), 4),
        ((5, 8, 12), (5, 4, 12), None),
        ((5, 8, 12), (5, 4, 5), None),
        ((5, 8, 12), (5, 3, 4), None),  # 8 is no multiple of 3, though 12 is one of 4
        ((5, 8, 12), (5, 16, 24), None),
    ],
)
def test_a_scale_is_whole_and_the_same_for_both_sides(target, reference, scale) -> None:
    assert reference_scale(target, reference) == scale


def test_references_are_found_and_stacked(entry: DatasetEntry) -> None:
    entry = replace(entry, reference_downscale=2, reference_frames=17, target_fps=24.0)
    for stem in "ab":
        write_reference(entry.reference_cache_directory, write_target(entry, stem), (3, 2, 1))
    training_set = find(entry)
    assert training_set.problems == ()
    assert {item.reference_grid for item in training_set.items()} == {(3, 2, 1)}
    batch = load(training_set, 2)
    assert batch.references.video.latents.shape == (2, CHANNELS, 3, 2, 1)
    assert batch.references.video.latents.unique().tolist() == [2.0]
    assert batch.references.video.fps.tolist() == [24.0, 24.0]
    assert batch.video.latents.unique().tolist() == [1.0]
    assert batch.references.audio is None


def test_references_that_a_run_does_not_use_are_not_needed(entry: DatasetEntry) -> None:
    write_target(entry, "a")
    batch = load(find(entry, references=()))
    assert not batch.references


def test_items_without_their_reference_are_left_out(entry: DatasetEntry, caplog) -> None:
    write_reference(entry.reference_cache_directory, write_target(entry, "a"), (1, 4, 2))
    for stem in "bcdefgh":
        write_target(entry, stem)
    with caplog.at_level(logging.WARNING):
        training_set = find(entry)
    assert [item.base for item in training_set.items()] == ["a_00000-009"]
    names = ", ".join(f"{stem}_00000-009" for stem in "bcdef")
    assert f"no cached reference for {names} and 2 more (7 in all); left out (ltx2_cache_latents.py)" in caplog.text


def test_no_reference_at_all_is_an_error(entry: DatasetEntry) -> None:
    write_target(entry, "a")
    with pytest.raises(ConfigErrors, match=r"no cached reference for a_00000-009; run ltx2_cache_latents\.py"):
        find(entry)


@pytest.mark.parametrize(
    ("grid", "metadata", "cause"),
    [
        ((1, 2, 1), {}, r"latent size 1x2, targets 2x4, which is not reference_downscale 1 on both sides"),
        ((1, 4, 1), {}, r"latent size 1x4, targets 2x4"),
        ((2, 4, 2), {}, r"references have 2 latent frames, reference_frames 1 gives 1"),
        ((1, 2, 1), {"reference_downscale": "2"}, r"reference_downscale 2, this run has 1; give --reference_downscale"),
        ((2, 4, 2), {"reference_frames": "9"}, r"reference_frames 9, this run has 1; give --reference_frames 9"),
        ((1, 4, 2), {"target_fps": "24.0"}, r"target_fps 24.0, this run has 25"),
    ],
)
def test_references_of_other_settings_are_refused(entry: DatasetEntry, grid, metadata, cause: str) -> None:
    write_reference(entry.reference_cache_directory, write_target(entry, "a"), grid, metadata)
    message = refuse(entry, cause)
    assert "python ltx2_cache_latents.py --dataset_config data.toml" in message
    assert "--reference_downscale 2 --skip_existing" in message


def test_several_control_images_make_references_of_their_own_lengths(entry: DatasetEntry) -> None:
    for stem, frames in (("a", 2), ("b", 3)):
        made = {"reference_frames": str(8 * frames - 7), "source_frames": "a hash"}
        write_reference(entry.reference_cache_directory, write_target(entry, stem), (frames, 4, 2), made)
    training_set = find(entry)
    assert training_set.problems == ()
    assert [item.reference_grid[0] for item in training_set.items()] == [2, 3]
    refuse(replace(entry, reference_frames=17), "a_00000-009: references were made with reference_frames 9, this run")


def test_references_of_another_checkpoint_are_refused(entry: DatasetEntry) -> None:
    source = entry.source / "a.mp4"
    made = {"latents": provenance(source, EncoderRecord("ours"), {})}
    target = write_target(entry, "a", metadata=made)
    entry = replace(entry, reference_directory=entry.source.parent / "pictures")
    entry.reference_directory.mkdir()
    (entry.reference_directory / "a.png").touch()
    made_by_theirs = provenance(entry.reference_directory / "a.png", EncoderRecord("theirs"), {})
    write_reference(entry.reference_cache_directory, target, (1, 4, 2), made_by_theirs)
    refuse(entry, "a_00000-009: references were made with another checkpoint", video_vae="ours")
    check_caches(find(entry, references=()), encoders=EncoderIds(video_vae="ours"), commands=COMMANDS)


def test_a_damaged_reference_is_named(entry: DatasetEntry) -> None:
    path = write_reference(entry.reference_cache_directory, write_target(entry, "a"), (1, 4, 2))
    path.write_bytes(path.read_bytes()[:-3])
    refuse(entry, "a_00000-009: unreadable cache: .*truncated")


def test_reference_sounds_keep_their_lengths(entry: DatasetEntry) -> None:
    for stem, steps in (("a", 3), ("b", 9)):
        target = write_target(entry, stem, audio_steps=5)
        write_reference_audio(entry.reference_audio_cache_directory, target, steps)
    training_set = find(entry, "av", ("audio",))
    assert [item.reference_audio_steps for item in training_set.items()] == [3, 9]
    sound = load(training_set, 2).references.audio
    assert sound.lengths.tolist() == [3, 9]
    assert sound.latents.shape == (2, 8, 9, 16)
    assert sound.latents[0, :, 3:].abs().max() == 0
    assert sound.latents[0, :, :3].unique().tolist() == [2.0]


def test_truncated_targets_do_not_cut_their_references(tmp_path: Path) -> None:
    items = [write_item(tmp_path, name, grid=(1, 1, 1), audio_steps=8, virtual_grid=(3, 2, 2)) for name in ("a", "b")]
    items = [
        replace(item, reference_audio=write_reference_audio(tmp_path / "sounds", item, steps))
        for item, steps in zip(items, (9, 2), strict=True)
    ]
    batch = collate([load_item(item, "audio", SampleKey(item.base)) for item in items], audio_steps=4)
    assert batch.audio.latents.shape[2] == 4
    assert batch.references.audio.lengths.tolist() == [9, 2]


def test_a_reference_sound_without_valid_steps_is_an_error(entry: DatasetEntry) -> None:
    target = write_target(entry, "a", audio_steps=5)
    path = write_reference_audio(entry.reference_audio_cache_directory, target, 3)
    tensors = {"audio_latents_3x16x8_float32": torch.zeros(8, 3, 16)}
    save_safetensors(tensors | {"audio_lengths_int32": torch.tensor(0, dtype=torch.int32)}, path)
    with pytest.raises(UserError, match="the reference sound has no valid step"):
        load(find(entry, "av", ("audio",)))


def test_clips_without_sound_have_nothing_to_refer_to(entry: DatasetEntry, caplog) -> None:
    for stem, steps in (("a", 5), ("b", 0)):
        target = write_target(entry, stem, audio_steps=steps)
        write_reference_audio(entry.reference_audio_cache_directory, target, 3)
    with caplog.at_level(logging.WARNING):
        training_set = find(entry, "av", ("audio",))
    assert [item.base for item in training_set.items()] == ["a_00000-009"]
    assert "no cached sound (which a reference needs) for b_00000-009; left out" in caplog.text


def test_batches_never_mix_references_of_different_shapes(tmp_path: Path) -> None:
    items = [write_item(tmp_path, name) for name in "abcd"]
    grids = [(1, 1, 2), (2, 1, 2), (1, 1, 2), None]
    items = [replace(item, reference_grid=grid) for item, grid in zip(items, grids, strict=True)]
    specs = BatchPlan(one_dataset(items, "video", batch_size=4), seed=0, shuffle=False).for_epoch(0)
    assert [[position for position, _ in spec.samples] for spec in specs] == [[0, 2], [1], [3]]


# --- masks --------------------------------------------------------------------------------------------------


def test_mask_files_hold_either_part(tmp_path: Path) -> None:
    for parts in (AV(torch.rand(2, 3, 4)), AV(audio=torch.rand(5)), AV(torch.rand(1, 1, 1), torch.rand(7))):
        write_mask(tmp_path / "m.safetensors", parts, {"source_name": "m.png"})
        header, read = read_mask_header(tmp_path / "m.safetensors"), read_mask(tmp_path / "m.safetensors")
        assert header.grid == (None if parts.video is None else tuple(parts.video.shape))
        assert header.audio_steps == (None if parts.audio is None else len(parts.audio))
        assert header.metadata["source_name"] == "m.png"
        for modality in ("video", "audio"):
            assert (read[modality] is None) == (parts[modality] is None)
        assert all(torch.equal(read[modality], part) for modality, part in parts.items())


def test_masks_reach_the_batch(entry: DatasetEntry) -> None:
    entry = replace(entry, mask_directory=entry.source, audio_mask_directory=entry.source)
    picture = torch.rand(GRID)
    for stem, steps in (("a", 5), ("b", 3), ("c", 0)):
        target = write_target(entry, stem, audio_steps=steps)
        write_item_mask(target, AV(picture, torch.ones(steps) if steps else None))
    training_set = find(entry, "av", ())
    assert training_set.problems == ()
    masks = load(training_set, 3).masks
    assert all(torch.equal(mask, picture) for mask in masks.video)
    assert masks.audio.tolist() == [[1.0] * 5, [1.0] * 3 + [0.0] * 2, [0.0] * 5]
    assert load(find(entry, "video", ())).masks.audio is None, "mode video reads the video part alone"


def test_masks_are_used_where_the_dataset_has_them(entry: DatasetEntry, caplog) -> None:
    write_item_mask(write_target(entry, "a"), AV(torch.ones(GRID)))
    write_target(entry, "b")
    assert not load(find(entry, references=())).masks, "no mask_directory"
    with caplog.at_level(logging.WARNING):
        training_set = find(replace(entry, mask_directory=entry.source), references=())
    assert [item.base for item in training_set.items()] == ["a_00000-009"]
    assert "no cached mask for b_00000-009; left out" in caplog.text


def test_without_sources_items_with_and_without_masks_share_a_batch(entry: DatasetEntry) -> None:
    entry = replace(entry, source=None, cache_only=True)
    write_item_mask(write_target(entry, "a"), AV(torch.ones(GRID)))
    write_target(entry, "b")
    masks = load(find(entry, references=()), 2).masks
    assert masks.video.flatten(1).sum(dim=1).tolist() == [16.0, 0.0]


@pytest.mark.parametrize(
    ("masks", "cause"),
    [
        (AV(torch.ones(2, 2, 2), torch.ones(5)), r"the video mask has the shape \(2, 2, 2\), the target \(2, 4, 2\)"),
        (AV(torch.ones(GRID), torch.ones(4)), r"the audio mask has the shape 4, the target 5"),
    ],
)
def test_masks_of_another_shape_are_refused(entry: DatasetEntry, masks, cause: str) -> None:
    entry = replace(entry, mask_directory=entry.source, audio_mask_directory=entry.source)
    write_item_mask(write_target(entry, "a", audio_steps=5), masks)
    refuse(entry, cause, "av", ())
