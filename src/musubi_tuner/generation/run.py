"""Prompts to files; shared by previews during training and by ``ltx2_generate_video.py``."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from musubi_tuner.common.av import AV
from musubi_tuner.common.safetensors_io import save_safetensors
from musubi_tuner.config.model import Mode
from musubi_tuner.config.sampling import SampleConditioningConfig, SampleDecodeConfig
from musubi_tuner.models.ltx2.transformer import LTX2Transformer
from musubi_tuner.models.video_vae import Tiling

from .conditions import UNCONDITIONED, SampleLatents
from .decode import Decoders
from .pipeline import generate_latents
from .prompt_cache import EncodedPrompt
from .prompts import SamplePrompt
from .write import write_mp4, write_png, write_wav

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One prompt to render; ``index`` is its place in the prompt file."""

    index: int
    prompt: SamplePrompt
    encoded: EncodedPrompt
    latents: SampleLatents = UNCONDITIONED


@dataclass(frozen=True)
class RenderSettings:
    """What to render of each prompt, and how.

    Attributes:
        mode: what the transformer generates together.
        audio_only: the sound alone, without a video stream beside it (modes av and audio).
        decode_audio: whether sound is decoded and written.
        merge_audio: also write ``*_av.mp4``.
        fixed_level: tell the transformer that the tokens of a given first frame are clean.
        negative_positions: audio references lie before time 0.
        offload: keep the transformer on the CPU while the decoders run.
        write_media, write_latents: decoded files, and latents as safetensors.
    """

    mode: Mode
    device: torch.device
    dtype: torch.dtype
    audio_only: bool = False
    decode_audio: bool = True
    merge_audio: bool = False
    fixed_level: bool = True
    negative_positions: bool = False
    offload: bool = False
    write_media: bool = True
    write_latents: bool = False

    @property
    def generated(self) -> Mode:
        return "audio" if self.audio_only else self.mode

    @property
    def has_video(self) -> bool:
        return self.generated != "audio"

    @property
    def has_audio(self) -> bool:
        return self.generated != "video" and self.decode_audio


@dataclass(frozen=True)
class Rendered:
    """What became of one job."""

    job: Job
    paths: tuple[Path, ...] = ()
    error: str | None = None


def render_settings(
    decode: SampleDecodeConfig,
    conditioning: SampleConditioningConfig,
    *,
    mode: Mode,
    device: torch.device,
    dtype: torch.dtype,
    **others: bool,
) -> RenderSettings:
    """Settings from the flags of previews and generation."""
    return RenderSettings(
        mode=mode,
        device=device,
        dtype=dtype,
        audio_only=decode.sample_audio_only,
        decode_audio=not decode.sample_disable_audio,
        merge_audio=decode.sample_merge_audio,
        fixed_level=conditioning.sample_i2v_token_timestep_mask,
        negative_positions=conditioning.audio_ref_use_negative_positions,
        offload=decode.sample_with_offloading,
        **others,
    )


def decode_tiling(decode: SampleDecodeConfig) -> Tiling:
    """Tiles of the video decoder from the flags."""
    return Tiling(
        spatial_tile=decode.sample_vae_tile_size if decode.sample_tiled_vae else 0,
        spatial_overlap=decode.sample_vae_tile_overlap,
        temporal_tile=decode.sample_vae_temporal_tile_size,
        temporal_overlap=decode.sample_vae_temporal_tile_overlap,
    )


def preview_stem(output_name: str, position: int, *, index: int, seed: int, epoch_end: bool) -> str:
    """File name of a preview without suffix; ``position`` is the epoch (``e000003``) or the step."""
    return f"{preview_prefix(output_name, position, index=index, epoch_end=epoch_end)}{_timestamp()}_{seed}"


def preview_prefix(output_name: str, position: int, *, index: int, epoch_end: bool) -> str:
    """What the names of a preview's files start with, whenever it is rendered."""
    return f"{output_name}_{'e' if epoch_end else ''}{position:06d}_{index:02d}_"


def generation_stem(output_name: str, *, index: int, seed: int) -> str:
    """File name of a generated sample without suffix."""
    return f"{output_name}_{index:02d}_{_timestamp()}_{seed}"


def render_prompts(
    transformer: LTX2Transformer,
    jobs: Sequence[Job],
    decoders: Decoders,
    *,
    settings: RenderSettings,
    output_dir: Path,
    stem: Callable[[Job], str],
) -> list[Rendered]:
    """Render jobs and write their files to ``output_dir``; a job that fails is logged and the next one runs.

    With offloading everything is denoised before the transformer makes room for the decoders; else each job is
    finished before the next. The transformer comes back to its device, modes and global random state are left
    as they were.
    """
    device = settings.device
    devices = [device] if device.type == "cuda" else []
    was_training = transformer.training
    transformer.eval()
    results: list[Rendered] = []
    try:
        with torch.random.fork_rng(devices=devices):
            for group in [jobs] if settings.offload else [[job] for job in jobs]:
                results += _render_group(transformer, group, decoders, settings, output_dir, stem)
    finally:
        decoders.to_cpu()
        transformer.train(was_training)
    return results


def _render_group(
    transformer: LTX2Transformer,
    jobs: Sequence[Job],
    decoders: Decoders,
    settings: RenderSettings,
    output_dir: Path,
    stem: Callable[[Job], str],
) -> list[Rendered]:
    results: list[Rendered] = []
    latents: list[tuple[Job, AV[Tensor]]] = []
    for job in jobs:
        with _Guarded(job, results):
            latents.append((job, _denoise(transformer, job, settings).map(lambda x: x.cpu())))
    if settings.offload:
        _move(transformer, "cpu")
    try:
        for job, sample in latents:
            with _Guarded(job, results):
                paths = _write(sample, job, decoders, settings=settings, base=output_dir / stem(job))
                logger.info("sample %d: %s", job.index, ", ".join(str(p) for p in paths))
                results.append(Rendered(job, tuple(paths)))
    finally:
        if settings.offload:
            decoders.to_cpu()
            _move(transformer, settings.device)
    return results


class _Guarded:
    """Turns an exception of one job into a logged :class:`Rendered`."""

    def __init__(self, job: Job, results: list[Rendered]) -> None:
        self._job, self._results = job, results

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if error is None or not isinstance(error, Exception):
            return False
        text = str(error) or type(error).__name__
        logger.error("sample %d (%.60s) failed: %s", self._job.index, self._job.prompt.prompt, text)
        logger.debug("traceback", exc_info=error)
        self._results.append(Rendered(self._job, error=text))
        return True


def _denoise(transformer: LTX2Transformer, job: Job, settings: RenderSettings) -> AV[Tensor]:
    return generate_latents(
        transformer,
        job.encoded,
        job.prompt,
        mode=settings.generated,
        device=settings.device,
        dtype=settings.dtype,
        latents=job.latents,
        fixed_level=settings.fixed_level,
        negative_positions=settings.negative_positions,
        description=f"sample {job.index}",
    )


def _write(
    latents: AV[Tensor], job: Job, decoders: Decoders, *, settings: RenderSettings, base: Path
) -> Iterable[Path]:
    """Write the files of one sample; their paths."""
    paths: list[Path] = []

    def file(suffix: str) -> Path:
        paths.append(base.with_name(base.name + suffix))
        return paths[-1]

    if settings.write_latents:
        save_safetensors({name: x.contiguous() for name, x in latents.items()}, file(".safetensors"))
    if not settings.write_media:
        return paths
    frames = decoders.frames(latents.video) if settings.has_video else None
    if frames is not None and len(frames) == 1:
        write_png(file(".png"), frames[0])
    elif frames is not None:
        write_mp4(file(".mp4"), frames, job.prompt.frame_rate)
    if settings.has_audio:
        sound = decoders.sound(latents.audio)
        write_wav(file(".wav"), sound)
        if settings.merge_audio and frames is not None and len(frames) > 1:
            write_mp4(file("_av.mp4"), frames, job.prompt.frame_rate, sound)
    return paths


def _move(transformer: LTX2Transformer, device: torch.device | str) -> None:
    transformer.to(device)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _timestamp() -> str:
    return time.strftime("%Y%m%d%H%M%S")
