"""What the loop keeps about the sound of its batches: the balance of the losses and the supervision monitor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from musubi_tuner.diffusion.balance import BalanceSettings, BalanceState, balanced, effective_weight, observed
from musubi_tuner.diffusion.losses import AUDIO_TERM, LossTerm

from .state import Progress
from .supervision import SupervisionCounts, SupervisionSettings, supervise


@dataclass(frozen=True)
class AudioWatch:
    """Weighs the audio terms and counts the batches that have sound; both only where asked for.

    Its numbers live in :class:`Progress`, so a resumed run goes on with them.
    """

    base_weight: float = 1.0  # what is logged is the effective weight of this one
    balance: BalanceSettings | None = None
    supervision: SupervisionSettings | None = None

    def weigh(self, terms: Mapping[str, LossTerm], progress: Progress) -> Mapping[str, LossTerm]:
        """The terms with their weights for this step."""
        if self.balance is None:
            return terms
        return balanced(terms, self.balance, self._state(self.balance, progress))

    def observe(self, losses: Mapping[str, float], counts: Mapping[str, float], progress: Progress) -> dict[str, float]:
        """Take a step into account, after it; returns what to log.

        Args:
            losses: mean losses by term over all micro-batches of all processes.
            counts: how many micro-batches had each term; ``loss``: how many there were.

        Raises:
            UserError: too few batches have sound, and that was to be an error.
        """
        batches, with_sound = counts["loss"], counts.get(AUDIO_TERM, 0.0)
        if self.supervision is not None:
            before = SupervisionCounts(**progress.audio_supervision)
            after = supervise(before, self.supervision, batches=round(batches), with_sound=round(with_sound))
            progress.audio_supervision = asdict(after)
        if self.balance is None:
            return {}
        before_step = self._state(self.balance, progress)
        state = observed(before_step, self.balance, presence=with_sound / batches, losses=losses)
        progress.audio_balance = asdict(state)
        weight = effective_weight(self.base_weight, self.balance, before_step)
        return {"loss/audio_weight_effective": weight} | _shown(self.balance, state)

    @staticmethod
    def _state(settings: BalanceSettings, progress: Progress) -> BalanceState:
        return BalanceState(**progress.audio_balance) if progress.audio_balance else BalanceState.start(settings)


def _shown(settings: BalanceSettings, state: BalanceState) -> dict[str, float]:
    if settings.mode == "inv_freq":
        return {"loss/audio_presence_ema": state.presence}
    return {"loss/audio_loss_ema": state.audio_loss, "loss/video_loss_ema": state.video_loss}
