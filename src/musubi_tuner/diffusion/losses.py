"""The training loss: weighted error a sample, then weighted terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from musubi_tuner.common.av import AV
from musubi_tuner.common.registry import Registry

from .tokens import NoisedTokens

# Terms of the audio stream: of the sounds, and of silence in place of missing ones.
AUDIO_TERM = "audio"
SILENCE_TERM = "audio_silence"
AUDIO_TERMS = (AUDIO_TERM, SILENCE_TERM)


@dataclass(frozen=True)
class LossTerm:
    """One part of the loss; it counts ``weight * share * mean over the valid samples``."""

    value: Tensor  # [B] or scalar
    weight: float = 1.0
    valid: Tensor | None = None  # [B] bool, samples with something to learn from; None = all
    share: float = 1.0  # of the batch, where two terms divide its samples between them

    def mean(self) -> Tensor:
        """Unweighted mean over the valid samples; exactly 0, but in the graph, when there is none."""
        if self.valid is None:
            return self.value.mean()
        valid = self.valid.to(self.value.dtype)
        return (self.value * valid).sum() / valid.sum().clamp(min=1)


LossFunction = Callable[[Tensor, Tensor, float], Tensor]  # (prediction, target, delta) -> elementwise error
LOSSES: Registry[LossFunction] = Registry("loss type")


@LOSSES.register("mse")
def _mse(prediction: Tensor, target: Tensor, delta: float) -> Tensor:
    return F.mse_loss(prediction, target, reduction="none")


@LOSSES.register("mae", "l1")
def _mae(prediction: Tensor, target: Tensor, delta: float) -> Tensor:
    return F.l1_loss(prediction, target, reduction="none")


@LOSSES.register("huber", "smooth_l1")
def _smooth_l1(prediction: Tensor, target: Tensor, delta: float) -> Tensor:
    # d^2 / (2 delta) below delta, |d| - delta / 2 above.
    return F.smooth_l1_loss(prediction, target, reduction="none", beta=delta)


def masked_error(error: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Per sample ``sum(weight * error) / sum(weight)``.

    Args:
        error: [B, N, C], averaged over C.
        weight: [B, N], 0 = not supervised.

    Returns:
        The means [B] (0 where nothing is supervised), and which samples have a supervised token [B].
    """
    per_token = error.mean(dim=-1)  # [B, N]
    total_weight = weight.sum(dim=1)
    valid = total_weight > 0
    means = (per_token * weight).sum(dim=1) / torch.where(valid, total_weight, 1.0)
    return means, valid


_UNIT: AV[float] = AV(video=1.0, audio=1.0)


def task_losses(
    prediction: AV[Tensor],
    tokens: AV[NoisedTokens],
    *,
    loss_type: str = "mse",
    huber_delta: float = 1.0,
    weights: AV[float] = _UNIT,
) -> dict[str, LossTerm]:
    """Error of the predicted velocity [B, N, C], in fp32: one term for each modality that was predicted."""
    loss_function = LOSSES[loss_type]

    def term(name: str, t: NoisedTokens) -> LossTerm:
        error = loss_function(prediction[name].float(), t.velocity.float(), huber_delta)
        value, valid = masked_error(error, t.weight)
        return LossTerm(value, weights[name], valid)

    return {name: term(name, t) for name, t in tokens.items() if prediction[name] is not None}


def total(terms: Mapping[str, LossTerm]) -> Tensor:
    """The scalar to differentiate.

    Raises:
        ValueError: there is no term.
    """
    if not terms:
        raise ValueError("no loss term: the batch has nothing to train on")
    return torch.stack([term.weight * term.share * term.mean() for term in terms.values()]).sum()
