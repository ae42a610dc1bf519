"""What prompts are conditioned on as a file, so that the VAE encoders are not needed when samples are made.

File format (musubi-tuner LTX-2, version 1): ``torch.save`` of ``{version, latent_cache}``, an entry a prompt that is
conditioned, with ``prompt_index`` and for each condition the file as the prompt names it and its latents. Ours adds
``encoder_ids`` (fingerprints of the VAEs) and to each entry the digests of its files' content.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.common.atomic import atomic_path
from musubi_tuner.common.av import Modality
from musubi_tuner.common.errors import UserError
from musubi_tuner.dataset.buckets import reference_scale

from .conditions import Condition, SampleLatents, conditions_of, named_prompt
from .prompts import SamplePrompt
from .sample_media import digest, locate

DEFAULT_NAME = "ltx2_sample_latents_cache.pt"

_VERSION = 1
# Keys of the latents by condition; the second ones are other programs' spellings.
_LATENT_KEYS = {
    "image": ("conditioning_latent",),
    "reference": ("v2v_ref_latent",),
    "reference_audio": ("ref_audio_latent", "reference_audio_latent"),
}


@dataclass(frozen=True)
class CacheOwner:
    """The checkpoint that a cache belongs to, by the fingerprints of its VAEs; ``None`` = it has none."""

    video_vae: str | None
    audio_vae: str | None

    def vae_of(self, modality: Modality) -> str | None:
        return self.video_vae if modality == "video" else self.audio_vae


def write_latent_cache(
    path: str | os.PathLike[str],
    prompts: Sequence[SamplePrompt],
    prompt_file: Path | None,
    latents: Sequence[SampleLatents],
    *,
    owner: CacheOwner,
) -> None:
    """Write the latents of the prompts that have any, atomically."""
    entries = []
    for index, (prompt, of_prompt) in enumerate(zip(prompts, latents, strict=True)):
        entry: dict[str, Any] = {"prompt_index": index}
        for condition, text in conditions_of(prompt):
            entry[condition.path_field] = text
            entry[_LATENT_KEYS[condition.name][0]] = getattr(of_prompt, condition.name).contiguous()
            entry[_digest_key(condition)] = digest(locate(text, prompt_file))
        if len(entry) > 1:
            entries.append(entry)
    encoder_ids = {"video_vae": owner.video_vae, "audio_vae": owner.audio_vae}
    with atomic_path(path) as temporary:
        torch.save({"version": _VERSION, "latent_cache": entries, "encoder_ids": encoder_ids}, temporary)


def load_latent_cache(
    path: str | os.PathLike[str],
    prompts: Sequence[SamplePrompt],
    prompt_file: Path | None,
    *,
    rebuild: str,
    owner: CacheOwner,
) -> list[SampleLatents]:
    """Latents for every prompt, checked to belong to it.

    Args:
        rebuild: the command that makes the file, for messages.
        owner: the checkpoint that samples are made with.

    Raises:
        UserError: the file is missing, damaged, or made for other prompts, files, sizes or another checkpoint.
    """
    path = Path(path)
    try:
        opened = _open(path, prompt_file, owner)
        return [
            SampleLatents(
                **{
                    condition.name: opened.latents(condition, text, prompt, index)
                    for condition, text in conditions_of(prompt)
                }
            )
            for index, prompt in enumerate(prompts)
        ]
    except _Unfit as unfit:
        raise UserError(
            f"{path}: {unfit}; rebuild it: {rebuild} (or encode at every start: --no_use_precached_sample_latents)"
        ) from None


class _Unfit(Exception):
    """Why a cache cannot be used."""


@dataclass(frozen=True)
class _Opened:
    """A cache that has been read, and what it is compared with."""

    entries: Mapping[Any, Mapping[str, Any]]  # by prompt index
    encoder_ids: Mapping[str, str | None]
    prompt_file: Path | None
    owner: CacheOwner

    def latents(self, condition: Condition, text: str, prompt: SamplePrompt, index: int) -> Tensor:
        """The latents of one condition of one prompt, fp32."""
        where = f"{named_prompt(index, prompt)}, {condition.option}"
        entry = self.entries.get(index, {})
        found = next((entry[key] for key in _LATENT_KEYS[condition.name] if entry.get(key) is not None), None)
        cached = next((entry[key] for key in _path_keys(condition) if entry.get(key)), None)
        if cached is None or not isinstance(found, Tensor):
            raise _Unfit(f"{where}: has nothing of {text}")
        if _plain(str(cached)) != _plain(text):
            raise _Unfit(f"{where}: was made of {cached}, the prompt has {text}")
        source, made_of = locate(text, self.prompt_file), entry.get(_digest_key(condition))
        if made_of and source.is_file() and digest(source) != made_of:
            raise _Unfit(f"{where}: {text} has changed since")
        made_by, own = self.encoder_ids.get(f"{condition.modality}_vae"), self.owner.vae_of(condition.modality)
        if made_by and own and made_by != own:
            raise _Unfit(f"{where}: was made with the {condition.modality} VAE of another checkpoint")
        _check_size(condition, found, prompt, where)
        return found.float()


def _open(path: Path, prompt_file: Path | None, owner: CacheOwner) -> _Opened:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise _Unfit("not found") from None
    except Exception as error:  # the restricted unpickler fails in many ways on bytes that are none of its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise _Unfit(f"not a readable cache of sample latents ({reason})") from None
    entries = content.get("latent_cache") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise _Unfit("not a cache of sample latents")
    if content.get("version") != _VERSION:
        raise _Unfit(f"has version {content.get('version')}, expected {_VERSION}")
    by_index = {entry.get("prompt_index"): entry for entry in entries}
    return _Opened(by_index, content.get("encoder_ids") or {}, prompt_file, owner)


def _check_size(condition: Condition, latents: Tensor, prompt: SamplePrompt, where: str) -> None:
    shape, (frames, rows, columns) = tuple(latents.shape), prompt.latent_grid
    dims = 4 if condition.modality == "audio" else 5
    if len(shape) != dims or shape[0] != 1:
        raise _Unfit(f"{where}: latents {list(shape)}, expected {dims} dimensions, the first of size 1")
    if condition.modality == "audio":
        return
    fits = shape[2] <= frames
    if condition.name == "image":
        fits = shape[2:] == (1, rows, columns)
    else:
        fits = fits and reference_scale((frames, rows, columns), shape[2:]) is not None
    if not fits:
        raise _Unfit(
            f"{where}: made for {32 * shape[4]}x{32 * shape[3]} pixels and {8 * shape[2] - 7} frames, the prompt has "
            f"{prompt.width}x{prompt.height} and {prompt.frame_count}"
        )


def _path_keys(condition: Condition) -> tuple[str, ...]:
    others = ("reference_audio_path",) if condition.name == "reference_audio" else ()
    return (condition.path_field, *others)


def _digest_key(condition: Condition) -> str:
    return f"{condition.path_field}_sha256"


def _plain(path: str) -> str:
    """The same for both kinds of slashes."""
    return path.replace("\\", "/").removeprefix("./")
