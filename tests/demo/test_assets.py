"""What ``write_assets`` writes is complete, loads, and behaves as a first run needs it."""

from __future__ import annotations

import av
import pytest
import torch

from musubi_tuner.common.av import AV
from musubi_tuner.dataset.schema import load_dataset_config
from musubi_tuner.demo.checkpoint import write_checkpoint
from musubi_tuner.demo.clips import CLIPS_DIR, shipped_clips
from musubi_tuner.demo.fit import _read_pixels, read_sound
from musubi_tuner.demo.gemma import write_gemma
from musubi_tuner.diffusion.tokens import audio_coords, patchify_audio, patchify_video, video_coords
from musubi_tuner.models.audio_vae import load_audio_vae, load_vocoder
from musubi_tuner.models.checkpoint import Checkpoint
from musubi_tuner.models.ltx2.inputs import ModalityInput
from musubi_tuner.models.ltx2.load import load_transformer
from musubi_tuner.models.text_encoder import load_text_encoder
from musubi_tuner.models.video_vae import load_video_vae


@pytest.fixture(scope="module", params=["2.0", "2.3"])
def assets(request, demo_assets):
    """Version, and what ``write_assets`` made for all tests. Read only."""
    return request.param, demo_assets(request.param)


def test_shipped_clips_are_small_attributed_and_have_sound():
    clips = shipped_clips()
    assert len(clips) == 4
    assert sum(file.stat().st_size for file in CLIPS_DIR.iterdir()) < 1.2e6
    assert "Blender Foundation" in (CLIPS_DIR / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for clip in clips:
        assert clip.with_suffix(".txt").read_text(encoding="utf-8").strip()
        with av.open(str(clip)) as container:
            stream = container.streams.video[0]
            assert (stream.average_rate, stream.width, stream.height) == (25, 384, 216)
            assert container.streams.audio[0].layout.name == "stereo"
            assert sum(1 for _ in container.decode(video=0)) == 33


def test_everything_is_there_and_the_dataset_is_valid(assets):
    version, paths = assets
    assert Checkpoint.open(paths.checkpoint).version == version
    config = load_dataset_config(paths.dataset)
    (entry,) = config.datasets
    assert entry.source == paths.videos.resolve()
    assert entry.cache_directory == paths.cache.resolve()
    assert len(list(entry.source.glob("*.mp4"))) == len(list(entry.source.glob("*.txt"))) == 4
    assert sum(not line.startswith("#") for line in paths.prompts.read_text(encoding="utf-8").splitlines()) == 2


def test_latents_of_the_clips_have_unit_variance(assets):
    _, paths = assets
    checkpoint = Checkpoint.open(paths.checkpoint)
    vae = load_video_vae(checkpoint, dtype=torch.float32, decoder=False)
    video = torch.cat([vae.encode(_read_pixels(clip)) for clip in shipped_clips()])
    assert video.shape[1] == 128
    assert abs(video.mean()) < 0.1
    assert 0.8 < video.std() < 1.2
    audio_vae = load_audio_vae(checkpoint, dtype=torch.float32)
    audio = torch.cat([audio_vae.encode(read_sound(clip)[None]) for clip in shipped_clips()])
    assert audio.shape[1::2] == (8, 16)
    assert abs(audio.mean()) < 0.1
    assert 0.8 < audio.std() < 1.2


def test_the_video_vae_shows_what_it_was_given(assets):
    """A clip decodes to a picture of it: most of the variance at 16 pixels, none of it from another clip."""
    _, paths = assets
    vae = load_video_vae(Checkpoint.open(paths.checkpoint), dtype=torch.float32)
    first, second = (_read_pixels(clip) for clip in (shipped_clips()[0], shipped_clips()[2]))
    decoded = vae.decode(vae.encode(first))
    assert decoded.shape == first.shape

    def error(picture):
        return (torch.nn.functional.avg_pool3d(picture - decoded, (1, 16, 16))).square().mean()

    assert error(first) < 0.15 * torch.nn.functional.avg_pool3d(first, (1, 16, 16)).var()
    assert error(second) > 3 * error(first)


def test_decoded_pictures_and_sound_are_neither_flat_nor_saturated(assets):
    _, paths = assets
    checkpoint = Checkpoint.open(paths.checkpoint)
    generator = torch.Generator().manual_seed(0)
    vae = load_video_vae(checkpoint, dtype=torch.float32, encoder=False)
    pixels = vae.decode(torch.randn(1, 128, 2, 4, 6, generator=generator))
    assert 0.05 < pixels.std() < 0.8
    mel = load_audio_vae(checkpoint, dtype=torch.float32).decode(torch.randn(1, 8, 10, 16, generator=generator))
    sound = load_vocoder(checkpoint).to_waveform(mel)
    assert 1e-3 < sound.std() < 0.3


def test_text_encoder_tells_captions_apart(assets):
    _, paths = assets
    encoder = load_text_encoder(Checkpoint.open(paths.checkpoint), gemma_root=paths.gemma, dtype=torch.float32)
    captions = [clip.with_suffix(".txt").read_text(encoding="utf-8") for clip in shipped_clips()]
    embeds = encoder.encode(captions[:2], "av")
    assert (embeds.video[0] - embeds.video[1]).std() > 0.05 * embeds.video.std()


def test_the_transformer_can_be_trained(assets):
    """The base already points the right way, and no parameter of a block is cut off from the loss."""
    _, paths = assets
    checkpoint = Checkpoint.open(paths.checkpoint)
    model = load_transformer(checkpoint, mode="av", dtype=torch.float32, device="cpu")
    generator = torch.Generator().manual_seed(0)
    clean = AV(
        video=patchify_video(torch.randn(1, 128, 2, 2, 3, generator=generator)),
        audio=patchify_audio(torch.randn(1, 8, 9, 16, generator=generator)),
    )
    noise = clean.map(lambda x: torch.randn(x.shape, generator=generator))
    widths = {"2.0": (32, 32), "2.3": (256, 128)}[checkpoint.version]
    coords = AV(video=video_coords((2, 2, 3), torch.tensor([25.0])), audio=audio_coords(9, 1))
    inputs = clean.map_named(
        lambda name, x: ModalityInput(
            tokens=torch.lerp(x, noise[name], 0.7),
            timesteps=torch.full((1, 1), 0.7),
            sigma=torch.full((1,), 0.7),
            coords=coords[name],
            context=torch.randn(1, 128, widths[name == "audio"], generator=generator),
        )
    )
    model.requires_grad_(True)
    prediction = model(inputs)
    loss = sum((prediction[name] - (noise[name] - x)).square().mean() for name, x in clean.items())
    assert loss.item() < 10  # 4 if it predicted nothing, 2 a modality
    loss.backward()
    blocks = dict(model.transformer_blocks.named_parameters())
    dead = [name for name, p in blocks.items() if p.ndim == 2 and (p.grad is None or p.grad.norm() < 1e-7)]
    assert not dead


def test_the_same_assets_twice_are_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_gemma(tmp_path / f"gemma_{name}", ["A caption."])
        write_checkpoint(tmp_path / f"{name}.safetensors", "2.3")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    for file in (tmp_path / "gemma_a").iterdir():
        assert file.read_bytes() == (tmp_path / "gemma_b" / file.name).read_bytes(), file.name
