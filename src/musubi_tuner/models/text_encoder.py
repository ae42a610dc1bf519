"""Prompts to the embeddings that the transformer reads: tokenizer, Gemma, connectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from musubi_tuner.common.errors import UserError

from .checkpoint import Checkpoint
from .connectors import Connectors, load_connectors
from .gemma import MAX_LENGTH, Gemma, Quantization, load_gemma

Mode = Literal["video", "av", "audio"]


@dataclass(frozen=True)
class PromptEmbeds:
    """Embeddings of some prompts, after the connectors."""

    video: Tensor  # [B, S, Dv]
    audio: Tensor | None  # [B, S, Da]; None in video mode
    mask: Tensor  # [B, S] bool, all true: the connectors replace padding by registers


class TextEncoder:
    """Gemma and the connectors of one checkpoint."""

    def __init__(self, gemma: Gemma, connectors: Connectors) -> None:
        if (gemma.hidden_size, gemma.num_states) != (connectors.hidden_size, connectors.num_states):
            raise UserError(
                f"the text encoder has {gemma.num_states} states of width {gemma.hidden_size}, the checkpoint's "
                f"connectors expect {connectors.num_states} of width {connectors.hidden_size}; use the Gemma "
                "model that belongs to this checkpoint"
            )
        if gemma.max_length % connectors.num_registers:
            raise UserError(
                f"prompts are padded to {gemma.max_length} tokens; the connectors need a multiple of "
                f"{connectors.num_registers}"
            )
        self.gemma = gemma
        self.connectors = connectors

    def encode(self, prompts: Sequence[str], mode: Mode) -> PromptEmbeds:
        """Embed prompts; ``mode`` decides whether audio embeddings are kept. S is 1024."""
        states, mask = self.gemma.encode(prompts)
        video, audio, mask = self.connectors(states, mask)
        return PromptEmbeds(video=video, audio=None if mode == "video" else audio, mask=mask)

    def excess_tokens(self, prompt: str) -> int:
        """Tokens of a prompt beyond those that are read."""
        return self.gemma.excess_tokens(prompt)

    def to(self, device: torch.device | str) -> TextEncoder:
        """Move the weights; a quantised Gemma stays where it is."""
        self.gemma.to(device)
        self.connectors.to(device)
        return self


def load_text_encoder(
    checkpoint: Checkpoint,
    *,
    gemma_root: str | Path | None = None,
    gemma_safetensors: str | Path | None = None,
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    quant_type: Literal["nf4", "fp4"] = "nf4",
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
    offload_weights: bool = True,
    max_length: int = MAX_LENGTH,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> TextEncoder:
    """Load Gemma and the connectors of ``checkpoint``.

    Args:
        checkpoint: the file with the connectors.
        gemma_root: Hugging Face folder of Gemma.
        gemma_safetensors: or a single file.
        load_in_8bit: quantise Gemma with bitsandbytes (CUDA only).
        load_in_4bit: the same to 4 bits, by ``quant_type``, ``double_quant`` and ``compute_dtype``.
        offload_weights: keep fp8 weights of a single file on the CPU between uses.
        max_length: tokens to which prompts are padded.
        dtype: of all weights that are not quantised.
        device: where both run.

    Raises:
        UserError: a part is missing, parts do not fit together, or options exclude each other.
    """
    if load_in_8bit and load_in_4bit:
        raise UserError("--gemma_load_in_8bit and --gemma_load_in_4bit exclude each other; give one")
    checkpoint.require("connectors", "encoding prompts")
    quantization = None
    if load_in_8bit or load_in_4bit:
        quantization = Quantization(8 if load_in_8bit else 4, quant_type, double_quant, compute_dtype)
    gemma = load_gemma(
        gemma_root,
        safetensors=gemma_safetensors,
        dtype=dtype,
        device=device,
        quantization=quantization,
        offload_weights=offload_weights,
        max_length=max_length,
    )
    connectors = load_connectors(checkpoint, dtype=dtype, device=device, hidden_size=gemma.hidden_size)
    return TextEncoder(gemma, connectors)
