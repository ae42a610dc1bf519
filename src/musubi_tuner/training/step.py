"""One batch to its losses: the five calls that everything else hangs on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from musubi_tuner.common.av import AV
from musubi_tuner.common.devices import upload
from musubi_tuner.conditioning.caption_dropout import drop_captions
from musubi_tuner.conditioning.intrinsic import condition_first_frame, condition_masks
from musubi_tuner.conditioning.reference import AudioReferenceRules, prepend_references
from musubi_tuner.conditioning.silence import fill_silence, part_silence
from musubi_tuner.dataset.batch import Batch, SampleKey, TextEmbeds
from musubi_tuner.diffusion.level_pool import LevelPool
from musubi_tuner.diffusion.losses import LossTerm, task_losses
from musubi_tuner.diffusion.noising import noise_batch, sample_generators
from musubi_tuner.diffusion.timesteps import NoiseLevelSampler
from musubi_tuner.diffusion.tokens import NoisedTokens
from musubi_tuner.models.ltx2.inputs import ModalityInput, Perturbations
from musubi_tuner.models.ltx2.transformer import LTX2Transformer


@dataclass(frozen=True)
class TaskSettings:
    """How a batch becomes a training problem and its error a loss."""

    sampler: NoiseLevelSampler
    seed: int
    device: torch.device
    dtype: torch.dtype  # compute dtype of the transformer
    loss_type: str = "mse"
    huber_delta: float = 1.0
    weights: AV[float] = AV(video=1.0, audio=1.0)
    first_frame_p: float = 0.0
    caption_dropout_rate: float = 0.0
    independent_audio_timestep: bool = False
    audio_reference: AudioReferenceRules = AudioReferenceRules()
    level_pool: LevelPool | None = None  # spreads the levels of an epoch evenly
    silence_weight: float | None = None  # factor of the audio loss of clips without sound; None = no audio for them
    audio_only_side: int | None = None  # mode audio: latent cells of a side of the virtual video; None = as cached


@dataclass(frozen=True)
class TrainingView:
    """What one forward pass of training reads and is judged by, on the device."""

    inputs: AV[ModalityInput]
    tokens: AV[NoisedTokens]
    weights: AV[float]
    perturbations: Perturbations | None = None
    keys: tuple[SampleKey, ...] = ()
    silent: Tensor | None = None  # [B] bool on the CPU: samples whose sound is silence put in its place

    @property
    def sigma(self) -> Tensor:
        """[B] noise level of each sample: the video's, without video the sound's."""
        tokens = self.tokens.video if self.tokens.video is not None else self.tokens.audio
        return tokens.sigma

    @property
    def num_tokens(self) -> int:
        return sum(t.clean.shape[0] * t.clean.shape[1] for _, t in self.tokens.items())


def prepare_view(
    batch: Batch, settings: TaskSettings, *, epoch: int, num_blocks: int, quantiles: Tensor | None = None
) -> TrainingView:
    """Noise and condition a batch. Runs ahead of the device; every draw is keyed by sample and epoch.

    ``quantiles`` [B] in (0, 1) are those of the noise levels to take, instead of drawing them.
    """

    def draws(purpose: str) -> list[torch.Generator]:
        return sample_generators(settings.seed, purpose, epoch, batch.keys)

    batch, silent = (batch, None) if settings.silence_weight is None else fill_silence(batch)
    tokens = noise_batch(
        with_virtual_side(batch, settings.audio_only_side),
        sampler=settings.sampler,
        generators=draws("noise"),
        independent_audio=settings.independent_audio_timestep,
        shares=None if settings.level_pool is None else settings.level_pool.deal(epoch, batch.keys),
        quantiles=quantiles,
        device=settings.device,
    )
    tokens = condition_first_frame(tokens, settings.first_frame_p, draws("first_frame"))
    tokens = condition_masks(tokens, batch.masks, None if batch.audio is None else batch.audio.lengths)
    tokens = prepend_references(tokens, batch.references, settings.audio_reference)
    text = drop_captions(batch.text, settings.caption_dropout_rate, draws("caption_dropout"))
    overrides = batch.loss_weights
    weights = settings.weights.map_named(lambda name, w: w if overrides[name] is None else overrides[name])
    return TrainingView(
        inputs=model_inputs(tokens, text, device=settings.device, dtype=settings.dtype),
        tokens=tokens,
        weights=weights,
        perturbations=_silence_absent_audio(batch, tokens, num_blocks, settings.device),
        keys=batch.keys,
        silent=silent,
    )


def with_virtual_side(batch: Batch, side: int | None) -> Batch:
    """Give the virtual video of an audio batch ``side`` x ``side`` latent cells a frame.

    The timestep shift grows with the tokens of the virtual video; a small fixed side makes the length of the sound
    decide, not a resolution that it does not have.
    """
    if side is None or batch.video is not None or batch.audio is None or batch.audio.virtual_grid is None:
        return batch
    grid = batch.audio.virtual_grid.clone()
    grid[:, 1:] = side
    return replace(batch, audio=replace(batch.audio, virtual_grid=grid))


def model_inputs(
    tokens: AV[NoisedTokens], text: TextEmbeds, *, device: torch.device, dtype: torch.dtype
) -> AV[ModalityInput]:
    """The transformer's inputs for the modalities that are present, each with its own text embeddings."""
    mask = None if text.mask is None or bool(text.mask.all()) else upload(text.mask, device)
    contexts = AV(video=text.video, audio=text.audio)
    others = AV(video=tokens.audio, audio=tokens.video)

    def one(name: str, t: NoisedTokens) -> ModalityInput:
        context = upload(contexts[name], device).to(dtype)
        return t.as_input(context, mask, other=others[name], dtype=dtype)

    return tokens.map_named(one)


def view_losses(transformer: LTX2Transformer, view: TrainingView, settings: TaskSettings) -> Mapping[str, LossTerm]:
    """One forward pass and its loss terms: ``video``, ``audio`` and/or ``audio_silence``."""
    prediction = transformer(view.inputs, view.perturbations)
    terms = task_losses(
        prediction,
        view.tokens,
        loss_type=settings.loss_type,
        huber_delta=settings.huber_delta,
        weights=view.weights,
    )
    return part_silence(terms, view.silent, settings.silence_weight)


def _silence_absent_audio(
    batch: Batch, tokens: AV[NoisedTokens], num_blocks: int, device: torch.device
) -> Perturbations | None:
    # In a mixed batch a sample without sound still has audio tokens (of nothing): what its video would read of
    # them is switched off, so that it is trained as if it were alone.
    if batch.audio is None or tokens.audio is None or tokens.video is None:
        return None
    present = batch.audio.lengths > 0
    if bool(present.all()):
        return None
    keep = upload(present, device).to(torch.float32)
    return Perturbations(a2v=dict.fromkeys(range(num_blocks), keep))
