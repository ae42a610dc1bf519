"""Seeding of dropout against PyTorch's own."""

import torch

from musubi_tuner.common.seeding import seed_dropout


def test_dropout_draws_as_after_manual_seed() -> None:
    torch.manual_seed(2**62 + 5)
    expected = torch.rand(4)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    seed_dropout(2**62 + 5, torch.device("cpu"))
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(torch.get_rng_state(), state)
