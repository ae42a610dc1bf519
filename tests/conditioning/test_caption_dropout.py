"""Blanked captions."""

import pytest
import torch

from musubi_tuner.common.seeding import generator
from musubi_tuner.conditioning.caption_dropout import drop_captions
from musubi_tuner.dataset.batch import TextEmbeds


def gens(count: int) -> list[torch.Generator]:
    return [generator("caption", i) for i in range(count)]


def embeds(batch: int, mask: bool = True) -> TextEmbeds:
    return TextEmbeds(
        video=torch.ones(batch, 6, 4),
        audio=torch.ones(batch, 6, 3),
        mask=torch.tensor([[1, 1, 1, 0, 0, 0]] * batch).bool() if mask else None,
    )


@pytest.mark.parametrize("mask", [True, False])
def test_dropped_captions_are_zero_and_show_position_zero(mask):
    before = embeds(64, mask)
    after = drop_captions(before, 0.5, gens(64))
    dropped = after.video[:, 0, 0] == 0
    assert 10 < int(dropped.sum()) < 54
    for value in (after.video, after.audio):
        assert bool((value[dropped] == 0).all())
        assert bool((value[~dropped] == 1).all())
    assert after.mask[dropped].sum(dim=1).unique().tolist() == [1]
    assert bool(after.mask[dropped, 0].all())
    kept = before.mask if mask else torch.ones(64, 6, dtype=torch.bool)
    assert torch.equal(after.mask[~dropped], kept[~dropped])
    assert bool((before.video == 1).all())  # caches are shared, so nothing is changed in place


def test_rate_zero_changes_nothing_and_one_drops_all():
    before = embeds(4)
    assert drop_captions(before, 0.0, gens(4)) is before
    assert float(drop_captions(before, 1.0, gens(4)).video.sum()) == 0


def test_one_modality_alone():
    audio_only = TextEmbeds(video=None, audio=torch.ones(2, 6, 3), mask=None)
    after = drop_captions(audio_only, 1.0, gens(2))
    assert after.video is None
    assert float(after.audio.sum()) == 0
