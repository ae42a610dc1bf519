"""A tiny random Gemma 3 with a tokenizer of its own: the folder layout of the real one in half a megabyte."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from musubi_tuner.common.atomic import atomic_path
from musubi_tuner.common.seeding import derive_seed

HIDDEN_SIZE = 32
NUM_LAYERS = 4
VOCABULARY = 600

_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")  # ids 0 to 4, as in Gemma

_SENTENCES = (
    "A slow tracking shot through a quiet forest at dawn, mist between the trees.",
    "A woman in a red coat walks along the beach while waves roll in.",
    "Close-up of a cat that opens its eyes and looks at the camera.",
    "A cyclist rides down a narrow street in the rain, neon lights in the puddles.",
    "An old man plays the violin in a small kitchen, warm light from the window.",
    "Timelapse of clouds over a mountain lake, bright colours.",
    "A dog jumps into the water and swims towards a wooden boat.",
    "Animated film, a robot paints a picture and steps back to look at it.",
    "The camera pans from left to right over a green meadow under a blue sky.",
    "Two children laugh and throw autumn leaves into the air.",
    "Steam rises from a cup of coffee on a table beside an open book.",
    "worst quality, blurry, jittery, distorted, inconsistent motion, low resolution",
)


def write_gemma(folder: Path, captions: Iterable[str] = ()) -> None:
    """Write config, weights (bf16) and tokenizer to ``folder``; the same bytes each time.

    Args:
        folder: is created or replaced.
        captions: text on which the tokenizer is trained besides a few built-in sentences.
    """
    with atomic_path(folder) as temporary:
        temporary.mkdir(parents=True)
        tokenizer = train_tokenizer(captions)
        tokenizer.save_pretrained(temporary)
        with _no_progress_bar():
            build_model(len(tokenizer)).save_pretrained(temporary)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Transformers shows a bar even for half a megabyte."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def train_tokenizer(captions: Iterable[str]) -> PreTrainedTokenizerFast:
    """BPE with byte fallback over SentencePiece-like pieces; beginning-of-sequence first, padded on the left."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator([*_SENTENCES, *captions], trainer)
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=1024,
    )


def build_model(vocab_size: int) -> Gemma3ForConditionalGeneration:
    """A multimodal Gemma 3 of four layers; the vision tower is there because real folders have one."""
    text = Gemma3TextConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=64,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=64,
        sliding_window_pattern=2,
        max_position_embeddings=2048,
        initializer_range=0.15,  # about 1 / sqrt(hidden size): prompts get distinct states
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    config = Gemma3Config(
        text_config=text.to_dict(),
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        image_token_index=4,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("demo gemma"))
        model = Gemma3ForConditionalGeneration(config)
    return model.to(torch.bfloat16)
