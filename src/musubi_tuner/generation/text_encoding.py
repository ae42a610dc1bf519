"""The text encoder that the ``--gemma_*`` flags describe."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence

import torch

from musubi_tuner.common.dtypes import parse_dtype
from musubi_tuner.common.errors import UserError
from musubi_tuner.config.model import GemmaConfig, Mode
from musubi_tuner.models.checkpoint import Checkpoint
from musubi_tuner.models.gemma import MAX_LENGTH
from musubi_tuner.models.text_encoder import TextEncoder, load_text_encoder

from .prompt_cache import EncodedPrompt, encode_prompts
from .prompts import SamplePrompt


def load_encoder(
    checkpoint: Checkpoint, gemma: GemmaConfig, *, dtype: torch.dtype, device: torch.device
) -> TextEncoder:
    """Gemma and the checkpoint's connectors.

    Raises:
        UserError: a part is missing, parts do not fit together, or flags exclude each other.
    """
    compute = gemma.gemma_bnb_4bit_compute_dtype
    return load_text_encoder(
        checkpoint,
        gemma_root=gemma.gemma_root,
        gemma_safetensors=gemma.gemma_safetensors,
        load_in_8bit=gemma.gemma_load_in_8bit,
        load_in_4bit=gemma.gemma_load_in_4bit,
        quant_type=gemma.gemma_bnb_4bit_quant_type,
        double_quant=not gemma.gemma_bnb_4bit_disable_double_quant,
        compute_dtype=dtype if compute == "auto" else parse_dtype(compute),
        offload_weights=os.environ.get("LTX2_GEMMA_SAFETENSORS_WEIGHT_OFFLOAD", "1") != "0",
        max_length=prompt_length() or MAX_LENGTH,
        dtype=dtype,
        device=device,
    )


def prompt_length() -> int | None:
    """Tokens to which prompts are padded if the environment variable LTX2_GEMMA_MAX_LENGTH asks for another number
    than the usual one; else ``None``.

    Raises:
        UserError: it is no positive integer.
    """
    value = os.environ.get("LTX2_GEMMA_MAX_LENGTH", "").strip()
    if not value:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"the environment variable LTX2_GEMMA_MAX_LENGTH is {value!r}; expected a number of tokens")
    return int(value) if int(value) != MAX_LENGTH else None


def load_encoder_and_encode(
    checkpoint: Checkpoint,
    gemma: GemmaConfig,
    prompts: Sequence[SamplePrompt],
    mode: Mode,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> list[EncodedPrompt]:
    """Encode prompts with the text encoder of the flags, which is gone afterwards."""
    encoder = load_encoder(checkpoint, gemma, dtype=dtype, device=device)
    encoded = encode_prompts(encoder, prompts, mode)
    del encoder
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return encoded
