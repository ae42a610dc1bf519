"""Weights that make the demo's video VAE a working, if coarse, autoencoder.

Latents hold the mean colours of blocks of 8x8 pixels and 4 frames: 3 colours x 4x4 blocks x 2 times, 96 of the
128 channels of a latent cell. So previews are mosaics in which a scene can be recognised, and latents of real
clips are as correlated as latents are. The networks stay those of the real VAE; residual blocks are switched
off and the resampling layers gather and spread blocks.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLLTX2Video
from torch import Tensor, nn

_COLOURS = 3
_LEVEL = 8.0  # of constants beside the colours in [-1, 1], so that the final norm divides by almost a constant
_FIRST = 96  # channels of the colours in the first levels: clear of those that later levels read
_GATHERED = 13  # convolution channels into which the third level gathers, for the same reason
_NOW, _BEFORE = 2, 1  # taps of a causal kernel
_CENTRE = 1
_GAIN = 4.0  # of the colours beside the constants, in the last level of the decoder


@torch.no_grad()
def make_mosaic(vae: AutoencoderKLLTX2Video) -> None:
    """Set the weights of a VAE with 128 latent channels and the demo's layout (see :mod:`.sections`)."""
    for module in vae.modules():
        if hasattr(module, "conv1") and hasattr(module, "conv2"):  # residual blocks become the identity
            _clear(module.conv2.conv)
    _make_encoder(vae.encoder, vae.config.patch_size)
    _make_decoder(vae.decoder)


def _make_encoder(encoder: nn.Module, patch: int) -> None:
    """Two levels of averaging, which the residual path of a downsampler does by itself, then two of gathering."""
    conv_in = _clear(encoder.conv_in.conv)
    for colour in range(_COLOURS):
        pixels = slice(colour * patch**2, (colour + 1) * patch**2)
        conv_in.weight[_FIRST + colour, pixels, _NOW, _CENTRE, _CENTRE] = 1 / patch**2
    levels = [_clear(block.downsamplers[0].conv.conv) for block in encoder.down_blocks]
    for colour in range(_COLOURS):  # mean of two times, gathered over 2x2
        levels[2].weight[_GATHERED + colour, _FIRST + colour, [_BEFORE, _NOW], _CENTRE, _CENTRE] = 0.5
    for index, channel in enumerate(_gathered_channels()):  # gathered over two times and 2x2
        levels[3].weight[index, channel, _NOW, _CENTRE, _CENTRE] = 1.0
    levels[3].bias[_FIRST // 8 :] = _LEVEL
    conv_out = _clear(encoder.conv_out.conv)
    for channel in range(128):
        conv_out.weight[channel, channel, _NOW, _CENTRE, _CENTRE] = 1.0


def _gathered_channels() -> list[int]:
    """Channels of (colour, row, column) after the third level; of its two times the later one holds the mean."""
    return [(_GATHERED + colour) * 8 + 4 + block for colour in range(_COLOURS) for block in range(4)]


def _make_decoder(decoder: nn.Module) -> None:
    """The gathering undone, then every colour spread; the last level keeps each colour with both signs.

    ``silu(x) - silu(-x) = x`` lets the last convolution read it through norm and activation, and constants in
    the other channels keep the norm steady.
    """
    conv_in = _clear(decoder.conv_in.conv)
    for channel in range(128):
        conv_in.weight[channel, channel, _CENTRE, _CENTRE, _CENTRE] = 1.0
    samplers = [block.upsamplers[0] for block in decoder.up_blocks]
    _set_upsampler(samplers[0], _ungather_times(samplers[0]))
    _set_upsampler(samplers[1], _ungather_blocks(samplers[1]))
    for sampler in samplers[2:-1]:
        _set_upsampler(sampler, _spread(sampler))
    _set_upsampler(samplers[-1], _with_both_signs(_spread(samplers[-1]), samplers[-1]))
    bias = samplers[-1].conv.conv.bias.view(-1, _offsets(samplers[-1]))
    bias[2 * _COLOURS :] = 1.0


def _with_both_signs(wanted: Tensor, sampler: nn.Module) -> Tensor:
    rows = _COLOURS * _offsets(sampler)
    wanted[rows : 2 * rows] = -wanted[:rows]
    return _GAIN * wanted


def _ungather_times(sampler: nn.Module) -> Tensor:
    """(colour, block, time, row, column) channels to (colour, block) channels, finer in time and space."""
    wanted = _nothing(sampler)
    for row in range(_COLOURS * 4 * 8):  # (colour, block), offset
        wanted[row, row] = 1.0
    return wanted


def _ungather_blocks(sampler: nn.Module) -> Tensor:
    """(colour, block) channels to colour channels, finer in space; both times get the same."""
    wanted = _nothing(sampler)
    for colour in range(_COLOURS):
        for offset in range(8):  # time, row, column
            wanted[colour * 8 + offset, colour * 4 + offset % 4] = 1.0
    return wanted


def _spread(sampler: nn.Module) -> Tensor:
    """Every colour to all places it covers."""
    wanted = _nothing(sampler)
    offsets = _offsets(sampler)
    for row in range(_COLOURS * offsets):
        wanted[row, row // offsets] = 1.0
    return wanted


def _offsets(sampler: nn.Module) -> int:
    return sampler.stride[0] * sampler.stride[1] * sampler.stride[2]


def _nothing(sampler: nn.Module) -> Tensor:
    return torch.zeros(sampler.conv.conv.weight.shape[:2])


def _set_upsampler(sampler: nn.Module, wanted: Tensor) -> None:
    """Make the layer ``wanted`` [channels x offsets, inputs], less what its residual path adds."""
    conv = _clear(sampler.conv.conv)
    wanted = wanted.clone()
    if sampler.residual:
        inputs = wanted.shape[1]
        for row in range(wanted.shape[0]):
            wanted[row, row % inputs] -= 1.0  # (channel mod inputs / offsets) x offsets + offset
    conv.weight[:, :, _CENTRE, _CENTRE, _CENTRE] = wanted


def _clear(conv: nn.Conv3d) -> nn.Conv3d:
    conv.weight.zero_()
    conv.bias.zero_()
    return conv
