"""Prompts as the transformer reads them: encoded now, or read from the file that the caching script wrote.

File format (musubi-tuner LTX-2, version 2): ``torch.save`` of ``{version, ltx_mode, audio_video, prompt_cache}``,
an entry a prompt with its text, embeddings [L, D] and mask [L], and the same for the negative prompt where it is
used. Embeddings are the video's, the audio's (mode audio) or both joined on D (mode av); ``video_dim`` (ours) says
where to split.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from musubi_tuner.common.atomic import atomic_path
from musubi_tuner.common.errors import UserError
from musubi_tuner.common.progress import progress
from musubi_tuner.config.model import Mode
from musubi_tuner.dataset.batch import TextEmbeds
from musubi_tuner.models.text_encoder import PromptEmbeds

from .prompts import SamplePrompt

logger = logging.getLogger(__name__)

DEFAULT_NAME = "ltx2_sample_prompts_cache.pt"

_VERSION = 2
# Widths of joined embeddings of files without video_dim: LTX-2.0, and 2.3 and later.
_VIDEO_DIM_OF = {7680: 3840, 6144: 4096}
_REBUILD = "re-run ltx2_cache_text_encoder_outputs.py with --precache_sample_prompts --sample_prompts"


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt and, where guidance needs it, its negative prompt; batch size 1, on the CPU."""

    positive: TextEmbeds
    negative: TextEmbeds | None = None


class Encoder(Protocol):
    """What is needed of a text encoder."""

    def encode(self, prompts: Sequence[str], mode: Mode) -> PromptEmbeds: ...
    def excess_tokens(self, prompt: str) -> int: ...


def encode_prompts(encoder: Encoder, prompts: Sequence[SamplePrompt], mode: Mode) -> list[EncodedPrompt]:
    """Encode prompts one at a time, each distinct text once."""
    texts: dict[str, TextEmbeds] = {}

    def encoded(text: str) -> TextEmbeds:
        if text not in texts:
            if excess := encoder.excess_tokens(text):
                logger.warning("a prompt is too long, its last %d tokens are not read: %.60s...", excess, text)
            with torch.no_grad():
                embeds = encoder.encode([text], mode)
            texts[text] = TextEmbeds(
                video=None if mode == "audio" else embeds.video.cpu(),
                audio=None if embeds.audio is None else embeds.audio.cpu(),
                mask=embeds.mask.cpu().bool(),
            )
        return texts[text]

    return [
        EncodedPrompt(encoded(p.prompt), encoded(p.negative_prompt) if _keeps_negative(p) else None)
        for p in progress(prompts, desc="encoding", unit="prompt")
    ]


def write_prompt_cache(
    path: str | os.PathLike[str],
    mode: Mode,
    prompts: Sequence[SamplePrompt],
    encoded: Sequence[EncodedPrompt],
    *,
    encoder_id: str | None = None,
) -> None:
    """Write the encoded prompts, atomically. ``encoder_id`` is the fingerprint of the text connectors."""
    entries = []
    for prompt, embeds in zip(prompts, encoded, strict=True):
        entry = {"prompt": prompt.prompt, **_packed(embeds.positive, "prompt")}
        if embeds.negative is not None:
            entry |= {"negative_prompt": prompt.negative_prompt, **_packed(embeds.negative, "negative_prompt")}
        entries.append(entry)
    video = encoded[0].positive.video if encoded else None
    content = {
        "version": _VERSION,
        "ltx_mode": mode,
        "audio_video": mode == "av",
        "prompt_cache": entries,
        "video_dim": 0 if video is None else video.shape[-1],
        "encoder_id": encoder_id,
    }
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def load_prompt_cache(
    path: str | os.PathLike[str],
    mode: Mode,
    prompts: Sequence[SamplePrompt],
    *,
    encoder_id: str | None = None,
) -> list[EncodedPrompt]:
    """Read the encoded prompts of a prompt file. A cache of mode av serves every mode.

    Raises:
        UserError: the file is missing, damaged, or made for other prompts, another mode or another checkpoint.
    """
    path = Path(path)
    content = _read(path)
    check_prompt_cache(path, content, mode, prompts, encoder_id=encoder_id)
    return [
        EncodedPrompt(
            _unpacked(path, content, mode, entry, "prompt"),
            _unpacked(path, content, mode, entry, "negative_prompt") if "negative_prompt_embeds" in entry else None,
        )
        for entry in content["prompt_cache"]
    ]


def check_prompt_cache(
    path: Path,
    content: Mapping[str, Any],
    mode: Mode,
    prompts: Sequence[SamplePrompt],
    *,
    encoder_id: str | None = None,
) -> None:
    """Raise unless a cache belongs to these prompts.

    Raises:
        UserError: with the first difference.
    """
    made_for = content.get("ltx_mode")
    if made_for not in (mode, "av"):
        raise UserError(f"{path}: was made with --ltx2_mode {made_for}, this run uses {mode}; {_REBUILD}")
    made_by = content.get("encoder_id")
    if encoder_id and made_by and encoder_id != made_by:
        raise UserError(f"{path}: was made with the text connectors of another checkpoint; {_REBUILD}")
    entries = content["prompt_cache"]
    if len(entries) != len(prompts):
        raise UserError(f"{path}: has {len(entries)} prompts, the prompt file {len(prompts)}; {_REBUILD}")
    for index, (entry, prompt) in enumerate(zip(entries, prompts, strict=True)):
        if _normalised(entry["prompt"]) != _normalised(prompt.prompt):
            raise UserError(
                f"{path}: prompt {index} is {entry['prompt']!r}, the prompt file has {prompt.prompt!r}; {_REBUILD}"
            )
        if not prompt.needs_negative:
            continue
        if "negative_prompt_embeds" not in entry:
            raise UserError(f"{path}: prompt {index} has no negative prompt, which guidance needs; {_REBUILD}")
        if _normalised(entry.get("negative_prompt") or "") != _normalised(prompt.negative_prompt):
            raise UserError(f"{path}: the negative prompt of prompt {index} has changed; {_REBUILD}")


def _keeps_negative(prompt: SamplePrompt) -> bool:
    return prompt.needs_negative or bool(prompt.negative_prompt)


def _normalised(text: str) -> str:
    return " ".join(text.split())


def _read(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; {_REBUILD}") from None
    except Exception as error:  # the restricted unpickler fails in many ways on bytes that are none of its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: not a readable cache of sample prompts ({reason}); {_REBUILD}") from None
    if not isinstance(content, dict) or not isinstance(content.get("prompt_cache"), list):
        raise UserError(f"{path}: not a cache of sample prompts; {_REBUILD}")
    if content.get("version") != _VERSION:
        raise UserError(f"{path}: has version {content.get('version')}, expected {_VERSION}; {_REBUILD}")
    if not all(_is_entry(entry) for entry in content["prompt_cache"]):
        raise UserError(f"{path}: has entries without a prompt and its embeddings; {_REBUILD}")
    return content


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict):
        return False
    return isinstance(entry.get("prompt"), str) and isinstance(entry.get("prompt_embeds"), Tensor)


def _packed(embeds: TextEmbeds, name: str) -> dict[str, Tensor]:
    parts = [part[0] for part in (embeds.video, embeds.audio) if part is not None]
    joined = torch.cat(parts, dim=-1).contiguous()  # [L, D]
    mask = torch.ones(joined.shape[0]) if embeds.mask is None else embeds.mask[0]
    return {f"{name}_embeds": joined, f"{name}_attention_mask": mask.to(torch.int64)}


def _unpacked(path: Path, content: Mapping[str, Any], mode: Mode, entry: Mapping[str, Any], name: str) -> TextEmbeds:
    joined = entry[f"{name}_embeds"][None]  # [1, L, D]
    mask = entry.get(f"{name}_attention_mask")
    mask = None if mask is None else mask[None].bool()
    if content["ltx_mode"] == "video":
        return TextEmbeds(video=joined, audio=None, mask=mask)
    if content["ltx_mode"] == "audio":
        return TextEmbeds(video=None, audio=joined, mask=mask)
    width = joined.shape[-1]
    video_dim = content.get("video_dim") or _VIDEO_DIM_OF.get(width)
    if not video_dim or video_dim >= width:
        raise UserError(f"{path}: cannot tell the video from the audio part of embeddings of width {width}; {_REBUILD}")
    return TextEmbeds(
        video=None if mode == "audio" else joined[..., :video_dim],
        audio=None if mode == "video" else joined[..., video_dim:],
        mask=mask,
    )
