"""Causality, tiles and chunks of the video VAE."""

from __future__ import annotations

import pytest
import torch
from components_tiny import write_components
from torch import nn

from musubi_tuner.common.errors import UserError
from musubi_tuner.models.checkpoint import Checkpoint
from musubi_tuner.models.video_vae import VideoVAE, load_video_vae


@pytest.fixture(scope="module", params=["2.0", "2.3"])
def checkpoint(request, tmp_path_factory) -> Checkpoint:
    path = tmp_path_factory.mktemp("vae") / f"{request.param}.safetensors"
    write_components(path, request.param)
    return Checkpoint.open(path)


@pytest.fixture
def vae(checkpoint) -> VideoVAE:
    return load_video_vae(checkpoint, dtype=torch.float32)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_latents_never_see_later_frames(vae):
    pixels = random(1, 3, 17, 32, 64)
    latents = vae.encode(pixels)
    assert latents.shape == (1, 16, 3, 1, 2)
    torch.testing.assert_close(vae.encode(pixels[:, :, :1]), latents[:, :, :1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.encode(pixels[:, :, :9]), latents[:, :, :2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 2, 3, 8])
def test_chunked_encoding_is_exact(vae, chunk):
    pixels = random(1, 3, 17, 32, 64)
    whole = vae.encode(pixels)
    vae.set_chunk_size(chunk)
    assert any("forward" in module.__dict__ for module in vae._encoder_convolutions())
    torch.testing.assert_close(vae.encode(pixels), whole, rtol=1e-4, atol=1e-5)
    vae.set_chunk_size(None)
    assert torch.equal(vae.encode(pixels), whole)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 8, 32, 32), r"8k\+1 frames \(1, 9, 17, \.\.\.\), got 8"),
        ((1, 3, 9, 40, 32), "multiples of 32, got 32x40"),
    ],
)
def test_sizes_that_do_not_fit_are_told(vae, shape, message):
    with pytest.raises(UserError, match=message):
        vae.encode(torch.zeros(shape))


@pytest.mark.parametrize("size", [(2, 2), (3, 5), (4, 7)])
@pytest.mark.parametrize("overlap", [0, 32, 64])
def test_spatial_tiles_are_aligned(vae, size, overlap):
    vae._module.decoder = FrameCounter()
    latents = random(1, 16, 2, *size)
    whole = vae.decode(latents)
    vae.enable_decode_tiling(spatial_tile=96, spatial_overlap=overlap)
    torch.testing.assert_close(vae.decode(latents), whole)


class FrameCounter(nn.Module):
    """A decoder that paints latent k over pixel frames 8k-7 .. 8k, so that a frame shows where it came from."""

    def forward(self, z: torch.Tensor, temb=None, causal=None) -> torch.Tensor:
        z = z[:, :3].repeat_interleave(32, 3).repeat_interleave(32, 4)
        return torch.cat([z[:, :, :1], z[:, :, 1:].repeat_interleave(8, 2)], dim=2)


@pytest.mark.parametrize("count", range(1, 14))
@pytest.mark.parametrize(("tile", "overlap"), [(16, 8), (24, 8), (32, 24), (64, 0)])
def test_temporal_decode_tiles_are_aligned(vae, count, tile, overlap):
    vae._module.decoder = FrameCounter()
    vae._module.latents_mean.zero_()
    vae._module.latents_std.fill_(1.0)
    latents = torch.linspace(-1, 1, count).view(1, 1, -1, 1, 1).expand(1, 16, count, 2, 2).contiguous()
    whole = vae.decode(latents)
    assert whole.shape == (1, 3, 8 * (count - 1) + 1, 64, 64)
    vae.enable_decode_tiling(temporal_tile=tile, temporal_overlap=overlap)
    torch.testing.assert_close(vae.decode(latents), whole)


def test_temporal_decode_tiles_of_the_real_decoder(vae):
    vae._module.decoder.is_causal = True  # so that the first tile does not see what lies behind it
    latents = random(1, 16, 8, 2, 2)
    whole = vae.decode(latents)
    vae.enable_decode_tiling(temporal_tile=40, temporal_overlap=24)
    tiled = vae.decode(latents)
    assert tiled.shape == whole.shape
    # 6 latents a tile, 2 apart: the second one begins at frame 17.
    torch.testing.assert_close(tiled[:, :, :17], whole[:, :, :17], rtol=1e-4, atol=1e-5)
    assert not torch.equal(tiled[:, :, 17:], whole[:, :, 17:])


def test_temporal_encode_tiles_are_aligned(vae):
    """A tile starts without history, so latents near a seam differ; those before the first one do not."""
    pixels = random(1, 3, 41, 32, 32)
    whole = vae.encode(pixels)
    vae.enable_encode_tiling(temporal_tile=24, temporal_overlap=8)
    tiled = vae.encode(pixels)
    assert tiled.shape == whole.shape
    torch.testing.assert_close(tiled[:, :, :3], whole[:, :, :3], rtol=1e-4, atol=1e-5)


def test_spatial_tiles_keep_shape_and_leave_small_inputs_whole(vae):
    pixels = random(1, 3, 1, 96, 128)
    whole = vae.encode(pixels)
    vae.enable_encode_tiling(spatial_tile=64, spatial_overlap=32)
    tiled = vae.encode(pixels)
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole)
    # The top left corner is seen by the first tile only.
    corner = vae.encode(pixels[..., :64, :64])[..., :1, :1]
    assert torch.equal(tiled[..., :1, :1], corner)
    small = pixels[..., :64, :64]
    once = vae.encode(small)
    vae.enable_encode_tiling()
    assert torch.equal(vae.encode(small), once)

    # 5 columns in tiles of 2 without overlap: the last tile moves back, since the 2.0 decoder cannot pad a
    # tile of a single cell.
    latents = random(1, 16, 1, 3, 5)
    picture = vae.decode(latents)
    for overlap in (0, 32):
        vae.enable_decode_tiling(spatial_tile=64, spatial_overlap=overlap)
        assert vae.decode(latents).shape == picture.shape
    picture = vae.decode(whole)
    vae.enable_decode_tiling(spatial_tile=64, spatial_overlap=32)
    assert vae.decode(whole).shape == picture.shape
    assert torch.equal(vae.encode(pixels), whole)  # tiling of one direction leaves the other alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spatial_tile": 32}, "spatial tile size 32: expected a multiple of 32, at least 64"),
        ({"spatial_tile": 64, "spatial_overlap": 64}, "overlap 64: expected a multiple of 32 below"),
        ({"temporal_tile": 20}, "temporal tile size 20: expected a multiple of 8"),
        ({"temporal_tile": 16, "temporal_overlap": 4}, "overlap 4: expected a multiple of 8"),
    ],
)
def test_tile_sizes_that_do_not_fit_are_told(vae, options, message):
    with pytest.raises(UserError, match=message):
        vae.enable_decode_tiling(**options)
