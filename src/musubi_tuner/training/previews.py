"""Previews during training: the prompt file rendered at the steps and epochs that were asked for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from musubi_tuner.common.dtypes import parse_dtype
from musubi_tuner.config.training import TrainNetworkConfig
from musubi_tuner.dataset.entries import DatasetConfig
from musubi_tuner.dataset.fingerprint import RepairCommands
from musubi_tuner.dataset.items import TrainingSet
from musubi_tuner.generation.conditions import SampleLatents
from musubi_tuner.generation.decode import Decoders
from musubi_tuner.generation.latent_cache import DEFAULT_NAME as LATENTS_NAME
from musubi_tuner.generation.prompt_cache import DEFAULT_NAME, EncodedPrompt, load_prompt_cache
from musubi_tuner.generation.prompts import SamplePrompt, load_prompts
from musubi_tuner.generation.run import (
    Job,
    decode_tiling,
    preview_prefix,
    preview_stem,
    render_prompts,
    render_settings,
)
from musubi_tuner.generation.sample_latents import VaeSource, cache_choice, obtain_sample_latents
from musubi_tuner.generation.text_encoding import load_encoder_and_encode
from musubi_tuner.models.checkpoint import Checkpoint
from musubi_tuner.models.ltx2.attention import plain_attention
from musubi_tuner.models.ltx2.transformer import LTX2Transformer
from musubi_tuner.networks.adapter_network import AdapterNetwork

from .optimizers import evaluation_weights
from .references import reference_modalities
from .reports import StepReport
from .state import Progress
from .tracking import Tracking

logger = logging.getLogger(__name__)


@dataclass
class Previewer:
    """Listens to the loop and renders; ``failures`` counts samples that could not be rendered."""

    config: TrainNetworkConfig
    jobs: Sequence[Job]
    decoders: Decoders
    transformer: LTX2Transformer
    network: AdapterNetwork
    optimizer: torch.optim.Optimizer
    device: torch.device
    dtype: torch.dtype
    tracking: Tracking
    failures: int = 0

    def on_start(self, progress: Progress) -> None:
        if progress.global_step > 0:
            self._catch_up(progress)
        elif self.config.preview.sample_at_first:
            self._render(self.jobs, progress, position=0, epoch_end=True)

    def on_step(self, report: StepReport, progress: Progress) -> None:
        if self._due_after_step(progress.global_step):
            self._render(self.jobs, progress, position=progress.global_step, epoch_end=False)

    def on_epoch_end(self, epoch: int, progress: Progress) -> None:
        if self._due_after_epoch(epoch + 1):
            self._render(self.jobs, progress, position=epoch + 1, epoch_end=True)

    def on_end(self, progress: Progress) -> None:
        if self.failures:
            logger.error("%d samples could not be rendered; the reasons are above", self.failures)

    def _due_after_step(self, step: int) -> bool:
        every = self.config.preview.sample_every_n_steps
        return bool(every) and step % every == 0

    def _due_after_epoch(self, epochs: int) -> bool:
        every = self.config.preview.sample_every_n_epochs
        return bool(every) and epochs % every == 0

    def _catch_up(self, progress: Progress) -> None:
        """Render what is due where a resumed run goes on: states are saved first, so a run may have ended in between.

        Only what has no file yet.
        """
        if self._due_after_step(progress.global_step):
            self._render_missing(progress, position=progress.global_step, epoch_end=False)
        if progress.is_between_epochs and self._due_after_epoch(progress.epoch):
            self._render_missing(progress, position=progress.epoch, epoch_end=True)

    def _render_missing(self, progress: Progress, *, position: int, epoch_end: bool) -> None:
        name, folder = self.config.save.output_name, self.config.save.output_dir / "sample"
        existing = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        missing = []
        for job in self.jobs:
            prefix = preview_prefix(name, position, index=job.index, epoch_end=epoch_end)
            if not any(file.startswith(prefix) for file in existing):
                missing.append(job)
        if missing:
            logger.info("rendering %d previews that the earlier run did not come to", len(missing))
            self._render(missing, progress, position=position, epoch_end=epoch_end)

    def _render(self, jobs: Sequence[Job], progress: Progress, *, position: int, epoch_end: bool) -> None:
        save = self.config.save
        settings = render_settings(
            self.config.decode,
            self.config.conditioning,
            mode=self.config.checkpoint.ltx2_mode,
            device=self.device,
            dtype=self.dtype,
        )
        self.network.eval()
        plain = plain_attention if self.config.preview.sample_disable_flash_attn else nullcontext
        with evaluation_weights(self.optimizer), plain(self.transformer):
            results = render_prompts(
                self.transformer,
                jobs,
                self.decoders,
                settings=settings,
                output_dir=save.output_dir / "sample",
                stem=lambda job: preview_stem(
                    save.output_name, position, index=job.index, seed=job.prompt.seed, epoch_end=epoch_end
                ),
            )
        self.network.train()
        self.tracking.log_samples(results, progress.global_step)
        self.failures += sum(result.error is not None for result in results)


def wants_previews(config: TrainNetworkConfig) -> bool:
    """Whether any flag asks for previews."""
    preview = config.preview
    return bool(preview.sample_at_first or preview.sample_every_n_steps or preview.sample_every_n_epochs)


def prepare_jobs(
    config: TrainNetworkConfig, checkpoint: Checkpoint, datasets: DatasetConfig, *, device: torch.device
) -> list[Job]:
    """Read and encode the prompt file and what it names, before the transformer takes the memory that this needs.

    Raises:
        UserError: what is wrong in the prompt file, the files that it names, the caches of prompts and latents, or the
            text encoder's files.
    """
    preview = config.preview
    defaults = SamplePrompt(
        width=preview.width,
        height=preview.height,
        frame_count=preview.sample_num_frames,
        guidance_scale=preview.guidance_scale,
        audio_cfg_scale=_audio_guidance(config),
    )
    prompts = load_prompts(preview.sample_prompts, defaults)
    latents = _latents(config, checkpoint, datasets, prompts, device)
    encoded = _encoded(config, checkpoint, datasets, prompts, device)
    return [Job(i, p, e, x) for i, (p, e, x) in enumerate(zip(prompts, encoded, latents, strict=True))]


def _audio_guidance(config: TrainNetworkConfig) -> float | None:
    """Guidance scale of the sound where it has its own."""
    if config.references.ic_lora_strategy != "audio_ref_only_ic":
        return None
    return config.references.audio_ref_identity_guidance_scale or None


def warn_of_other_connectors(config: TrainNetworkConfig, training_set: TrainingSet, checkpoint: Checkpoint) -> None:
    """Say that previews read other text embeddings than training does."""
    own = checkpoint.encoder_id("text")
    records = {item.made_by.text for item in training_set.items()}
    replaced = own is not None and any(record and record.id != own and record.replaces == own for record in records)
    if replaced and not config.preview.use_precached_sample_prompts:
        logger.warning(
            "the captions were cached with the connectors of another file (--ltx2_text_encoder_checkpoint), previews "
            "are encoded with those of --ltx2_checkpoint; to see what is trained, cache the prompts with "
            "--precache_sample_prompts and give --use_precached_sample_prompts"
        )


def make_decoders(config: TrainNetworkConfig, checkpoint: Checkpoint, *, device: torch.device) -> Decoders:
    """The decoders that previews need; UserError when the checkpoint lacks one."""
    decode, mode = config.decode, config.checkpoint.ltx2_mode
    decoders = Decoders(
        checkpoint, dtype=parse_dtype(config.precision.vae_dtype), device=device, tiling=decode_tiling(decode)
    )
    decoders.require(
        video=mode != "audio" and not decode.sample_audio_only,
        audio=mode != "video" and not decode.sample_disable_audio,
    )
    return decoders


def _latents(
    config: TrainNetworkConfig,
    checkpoint: Checkpoint,
    datasets: DatasetConfig,
    prompts: Sequence[SamplePrompt],
    device: torch.device,
) -> list[SampleLatents]:
    mode, preview = config.checkpoint.ltx2_mode, config.preview
    downscale = datasets.reference_downscale if "video" in reference_modalities(config) else None
    sizes = {name: getattr(preview, name) for name in ("width", "height", "sample_num_frames")}
    cache = cache_choice(
        config.conditioning,
        preview.sample_prompts,
        RepairCommands(config.data.dataset_config or datasets.made_from, config.checkpoint.ltx2_checkpoint, mode),
        default=datasets.datasets[0].cache_directory / LATENTS_NAME,
        sizes=sizes | ({"reference_downscale": downscale} if (downscale or 1) > 1 else {}),
    )
    vaes = VaeSource(
        checkpoint,
        dtype=parse_dtype(config.precision.vae_dtype),
        device=device,
        tiling=decode_tiling(config.decode),
    )
    generated = "audio" if config.decode.sample_audio_only else mode
    return obtain_sample_latents(
        prompts, preview.sample_prompts, generated, vaes=vaes, cache=cache, reference_downscale=downscale
    )


def _encoded(
    config: TrainNetworkConfig,
    checkpoint: Checkpoint,
    datasets: DatasetConfig,
    prompts: Sequence[SamplePrompt],
    device: torch.device,
) -> list[EncodedPrompt]:
    mode = config.checkpoint.ltx2_mode
    if config.preview.use_precached_sample_prompts:
        path = config.preview.sample_prompts_cache or datasets.datasets[0].cache_directory / DEFAULT_NAME
        return load_prompt_cache(path, mode, prompts, encoder_id=checkpoint.encoder_id("text"))
    return load_encoder_and_encode(
        checkpoint,
        config.gemma,
        prompts,
        mode,
        device=device,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
    )
