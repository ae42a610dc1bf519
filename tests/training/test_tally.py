"""What a step reports where a mask leaves a term without anything to learn."""

from __future__ import annotations

import pytest
import torch

from musubi_tuner.diffusion.losses import LossTerm, total
from musubi_tuner.training.tally import StepTally


def test_a_sound_that_is_masked_as_a_whole_is_no_loss_of_zero():
    """The balance of the losses would take it for a sound that is already perfect, and raise its weight."""
    tally = StepTally(["loss", "video", "audio"], torch.device("cpu"))
    video = torch.tensor([2.0, 4.0])
    heard = LossTerm(torch.tensor([1.0, 5.0]), 1.0, torch.tensor([True, False]))
    masked = LossTerm(torch.zeros(2), 1.0, torch.tensor([False, False]))
    for audio in (heard, masked):
        terms = {"video": LossTerm(video), "audio": audio}
        tally.add_batch(total(terms), terms, torch.tensor([0.1, 0.9]), 10)
    totals = tally.over_processes()
    assert totals.means(["video", "audio"]) == {"video": 3.0, "audio": 1.0}
    assert totals.counts["audio"] == 1
    assert totals.counts["loss"] == 2
    assert totals.num_tokens == 20


def test_a_sample_without_anything_to_learn_is_left_out_of_its_noise_level():
    tally = StepTally(["loss", "video"], torch.device("cpu"))
    term = LossTerm(torch.tensor([3.0, 0.0]), 1.0, torch.tensor([True, False]))
    tally.add_batch(total({"video": term}), {"video": term}, torch.tensor([0.8, 0.9]), 1)
    assert tally.over_processes().loss_by_range == {"sigma_0.75-1.00": 3.0}


def test_micro_batches_add_up_to_their_plain_means():
    """Against the means written out, with terms of a number for all samples and of a part of them."""
    tally = StepTally(["loss", "video", "audio", "grad_norm"], torch.device("cpu"))
    sigma = [torch.tensor([0.2, 0.6]), torch.tensor([1.0, 0.61])]
    batches = [
        {"video": LossTerm(torch.tensor([1.0, 2.0]), 0.5), "audio": LossTerm(torch.tensor(4.0), 2.0)},
        {"video": LossTerm(torch.tensor([3.0, 5.0]), 1.0, torch.tensor([True, True]))},
    ]
    for terms, levels in zip(batches, sigma, strict=True):
        tally.add_batch(total(terms), terms, levels, 3)
    tally.add("grad_norm", torch.tensor(0.25))
    totals = tally.over_processes()
    assert totals.means(["loss", "video", "audio", "grad_norm"]) == {
        "loss": pytest.approx(((0.5 * 1.5 + 2 * 4) + 4) / 2),
        "video": pytest.approx((1.5 + 4) / 2),
        "audio": 4.0,
        "grad_norm": 0.25,
    }
    assert totals.loss_by_range == {
        "sigma_0.00-0.25": pytest.approx(0.5 * 1 + 2 * 4),
        "sigma_0.50-0.75": pytest.approx(((0.5 * 2 + 2 * 4) + 5) / 2),
        "sigma_0.75-1.00": 3.0,
    }
    assert totals.num_tokens == 6


def test_a_process_without_batches_has_nothing_to_add():
    totals = StepTally(["loss"], torch.device("cpu")).over_processes()
    assert totals.means(["loss"]) == {}
    assert totals.num_tokens == 0
