"""Training without the caption now and then, which is what classifier-free guidance contrasts with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Generator, Tensor

from musubi_tuner.dataset.batch import TextEmbeds

from .intrinsic import draw_gates


def drop_captions(text: TextEmbeds, rate: float, generators: Sequence[Generator]) -> TextEmbeds:
    """Blank the caption of each sample with probability ``rate``, each drawn from its own generator.

    The embeddings become 0 and the mask shows position 0 alone; a mask that shows nothing would make the
    attention an average over everything.
    """
    if rate == 0:
        return text
    dropped = draw_gates(rate, generators)
    if not bool(dropped.any()):
        return text
    present = text.video if text.video is not None else text.audio
    if present is None:
        return text

    def blank(embeds: Tensor | None) -> Tensor | None:
        return None if embeds is None else embeds.masked_fill(dropped.to(embeds.device)[:, None, None], 0.0)

    shape, device = present.shape[:2], present.device
    mask = torch.ones(shape, dtype=torch.bool, device=device) if text.mask is None else text.mask.bool()
    only_first = torch.zeros(shape, dtype=torch.bool, device=device)
    only_first[:, 0] = True
    mask = torch.where(dropped.to(device)[:, None], only_first, mask)
    return replace(text, video=blank(text.video), audio=blank(text.audio), mask=mask)
