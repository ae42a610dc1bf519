"""The audio balance against the closed forms of its running means."""

from __future__ import annotations

import math

import pytest
import torch

from musubi_tuner.diffusion.balance import BalanceSettings, BalanceState, balanced, effective_weight, observed
from musubi_tuner.diffusion.losses import LossTerm, total

WIDE = {"minimum": 0.0, "maximum": 1e9}


def after(settings: BalanceSettings, steps: int, *, presence: float = 0.0, **losses: float) -> BalanceState:
    state = BalanceState.start(settings)
    for _ in range(steps):
        state = observed(state, settings, presence=presence, losses=losses)
    return state


@pytest.mark.parametrize("presence", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("start", [1.0, 0.5])
def test_presence_approaches_the_share_of_batches_with_sound(presence: float, start: float):
    settings = BalanceSettings("inv_freq", beta=0.05, ema_init=start, eps=1e-6, **WIDE)
    for steps in (0, 1, 30):
        expected = presence + (start - presence) * 0.95**steps
        state = after(settings, steps, presence=presence)
        assert state.presence == pytest.approx(expected)
        assert effective_weight(0.7, settings, state) == pytest.approx(0.7 / expected)


def test_rare_sound_weighs_as_much_in_the_end_as_if_it_were_in_every_batch():
    settings = BalanceSettings("inv_freq", beta=0.002, **WIDE)
    state, weighed = BalanceState.start(settings), []
    for step in range(8000):
        has_sound = step % 5 == 0
        if step >= 6000:
            weighed.append(effective_weight(1.0, settings, state) * has_sound)
        state = observed(state, settings, presence=float(has_sound), losses={})
    assert sum(weighed) / len(weighed) == pytest.approx(1.0, rel=0.02)


def test_losses_are_followed_and_audio_reaches_its_share_of_the_video_loss():
    settings = BalanceSettings("ema_mag", ema_decay=0.9, target_ratio=0.4, ema_init=2.0, **WIDE)
    video, audio = 0.5, 3.0
    for steps in (0, 1, 20):
        decay = 0.9**steps
        v, a = video + (2 - video) * decay, audio + (2 - audio) * decay
        state = after(settings, steps, video=video, audio=audio)
        assert (state.video_loss, state.audio_loss) == (pytest.approx(v), pytest.approx(a))
        assert effective_weight(1.5, settings, state) == pytest.approx(1.5 * 0.4 * v / a)
    settled = after(settings, 500, video=video, audio=audio)
    assert effective_weight(1.0, settings, settled) * audio == pytest.approx(0.4 * video)


def test_steps_without_sound_leave_its_mean_alone():
    settings = BalanceSettings("ema_mag", ema_decay=0.5)
    state = after(settings, 3, video=4.0)
    assert state.audio_loss == 1.0
    assert state.video_loss == pytest.approx(4 - 3 * 0.5**3)
    assert observed(state, settings, presence=0.0, losses={"video": math.nan, "audio": math.inf}) == BalanceState(
        state.presence * 0.99, state.video_loss, state.audio_loss
    )


def test_a_loss_of_zero_does_not_divide_by_zero():
    settings = BalanceSettings("ema_mag", ema_decay=0.01, maximum=4.0)
    assert effective_weight(1.0, settings, after(settings, 300, video=1.0, audio=0.0)) == 4.0


@pytest.mark.parametrize("mode", ["inv_freq", "ema_mag"])
def test_weights_stay_in_their_range_but_zero_stays_zero(mode: str):
    settings = BalanceSettings(mode, minimum=0.5, maximum=2.0, eps=0.01)
    rare = BalanceState(presence=0.02, video_loss=100.0, audio_loss=1.0)
    common = BalanceState(presence=1.0, video_loss=1e-3, audio_loss=1.0)
    assert effective_weight(1.0, settings, rare) == 2.0
    assert effective_weight(0.1, settings, common) == 0.5
    assert effective_weight(0.0, settings, common) == 0.0


def test_eps_bounds_the_division():
    settings = BalanceSettings("inv_freq", eps=0.25, **WIDE)
    assert effective_weight(1.0, settings, BalanceState(0.0, 1.0, 1.0)) == 4.0


def test_only_the_audio_terms_are_weighed_anew():
    one = torch.ones(2)
    terms = {
        "video": LossTerm(one, 0.3),
        "audio": LossTerm(one, 0.5, share=0.75),
        "audio_silence": LossTerm(one, 0.25, share=0.25),
    }
    result = balanced(terms, BalanceSettings("inv_freq", **WIDE), BalanceState(0.5, 1.0, 1.0))
    assert {name: term.weight for name, term in result.items()} == {"video": 0.3, "audio": 1.0, "audio_silence": 0.5}
    assert float(total(result)) == pytest.approx(0.3 + 0.75 * 1.0 + 0.25 * 0.5)
