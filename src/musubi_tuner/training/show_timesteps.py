"""What ``--show_timesteps`` shows: the distribution of noise levels for one size of clip, without any model."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from musubi_tuner.common.atomic import atomic_path
from musubi_tuner.common.tables import format_table
from musubi_tuner.config.training import TrainNetworkConfig
from musubi_tuner.dataset.buckets import latent_grid
from musubi_tuner.diffusion.timesteps import NoiseLevelSampler

from .setup import level_sampler

logger = logging.getLogger(__name__)

_QUANTILES = 20_000
_BINS = 20
_BAR = 50  # characters of the longest bar
_SIZE = (800, 400)  # pixels of the picture
_MARGIN = 40


def show_timesteps(config: TrainNetworkConfig) -> int:
    """Print the distribution, or write it as ``timesteps.png`` to the output directory (none: the working one)."""
    preview = config.preview
    grid = latent_grid(preview.sample_num_frames, (preview.width, preview.height))
    levels = level_quantiles(level_sampler(config, config.version.ltx_version), grid)
    shares = bin_shares(levels)
    title = (
        f"{config.timestep.timestep_sampling}, LTX-{config.version.ltx_version}: noise levels for {grid[0]} latent "
        f"frames of {grid[1]} x {grid[2]}; mean {float(levels.mean()):.3f}, median {float(levels.median()):.3f}"
    )
    if config.timestep.show_timesteps == "console":
        print(histogram(shares, title))
    else:
        path = (config.save.output_dir or Path()) / "timesteps.png"
        with atomic_path(path) as temporary:
            _picture(shares, title).save(temporary, format="PNG")
        logger.info("%s\nwrote %s", title, path)
    return 0


def level_quantiles(sampler: NoiseLevelSampler, grid: tuple[int, int, int]) -> Tensor:
    """Evenly spread quantiles of the levels for a latent grid, rising: a sample without chance."""
    shares = (torch.arange(_QUANTILES, dtype=torch.float64) + 0.5) / _QUANTILES
    return sampler.quantile(shares, torch.tensor([grid]))


def bin_shares(levels: Tensor) -> list[float]:
    """Shares of the levels in equal parts of [0, 1]."""
    return (torch.histc(levels.to(torch.float64), _BINS, 0, 1) / len(levels)).tolist()


def histogram(shares: list[float], title: str) -> str:
    rows = []
    for index, share in enumerate(shares):
        bar = "#" * round(_BAR * share / max(shares))
        rows.append([f"{1000 * index // _BINS}-{1000 * (index + 1) // _BINS}", f"{share:.1%}", bar])
    return format_table(["timestep", "share", ""], rows, title=title)


def _picture(shares: list[float], title: str) -> Image.Image:
    image = Image.new("RGB", _SIZE, "white")
    draw = ImageDraw.Draw(image)
    draw.text((_MARGIN, 10), title, fill="black")
    step = (_SIZE[0] - 2 * _MARGIN) / _BINS
    floor, span = _SIZE[1] - _MARGIN, _SIZE[1] - 2 * _MARGIN
    for index, share in enumerate(shares):
        left = _MARGIN + index * step
        draw.rectangle((left, floor - span * share / max(shares), left + step - 2, floor), fill="steelblue")
        draw.text((left, floor + 8), str(1000 * index // _BINS), fill="black")
    return image
