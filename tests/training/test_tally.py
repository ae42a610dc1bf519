"""What a step reports where a mask leaves a term without anything to learn."""

from __future__ import annotations

import torch

from musubi_tuner.diffusion.losses import LossTerm
from musubi_tuner.training.tally import StepTally


def test_a_sound_that_is_masked_as_a_whole_is_no_loss_of_zero():
    """The balance of the losses would take it for a sound that is already perfect, and raise its weight."""
    tally = StepTally(["loss", "video", "audio"], torch.device("cpu"))
    video = torch.tensor([2.0, 4.0])
    heard = LossTerm(torch.tensor([1.0, 5.0]), 1.0, torch.tensor([True, False]))
    masked = LossTerm(torch.zeros(2), 1.0, torch.tensor([False, False]))
    for audio in (heard, masked):
        tally.add_batch({"video": LossTerm(video), "audio": audio}, torch.tensor([0.1, 0.9]), 10)
    totals = tally.over_processes()
    assert totals.means(["video", "audio"]) == {"video": 3.0, "audio": 1.0}
    assert totals.counts["audio"] == 1
    assert totals.counts["loss"] == 2
    assert totals.num_tokens == 20


def test_a_sample_without_anything_to_learn_is_left_out_of_its_noise_level():
    tally = StepTally(["loss", "video"], torch.device("cpu"))
    term = LossTerm(torch.tensor([3.0, 0.0]), 1.0, torch.tensor([True, False]))
    tally.add_batch({"video": term}, torch.tensor([0.8, 0.9]), 1)
    assert tally.over_processes().loss_by_range == {"sigma_0.75-1.00": 3.0}
