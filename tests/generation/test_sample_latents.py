"""What prompts are conditioned on: reading the files, encoding, and the cache with all that may not fit."""

import hashlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from media_files import index_frame, read_index, tone, write_sound, write_video
from PIL import Image

from musubi_tuner.common.errors import UserError
from musubi_tuner.dataset.clip_sound import read_sound
from musubi_tuner.generation.conditions import SampleLatents
from musubi_tuner.generation.latent_cache import CacheOwner, load_latent_cache, write_latent_cache
from musubi_tuner.generation.prompts import SamplePrompt
from musubi_tuner.generation.sample_latents import CacheChoice, encode_sample_latents, obtain_sample_latents
from musubi_tuner.generation.sample_media import locate, read_reference, read_still, require_media
from musubi_tuner.generation.script import reference_downscale

SMALL = SamplePrompt(prompt="a cat", width=128, height=64, frame_count=17)
OWNER = CacheOwner("video", "audio")


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    Image.fromarray(index_frame(5)).save(folder / "first.png")
    write_video(folder / "ref.mp4", 40, fps=50)
    write_sound(folder / "voice.wav", tone(0.7))
    return folder


@pytest.fixture
def prompts() -> list[SamplePrompt]:
    return [
        SMALL,
        replace(SMALL, image_path="first.png", v2v_ref_path="ref.mp4"),
        replace(SMALL, ref_audio_path="voice.wav"),
    ]


class Cells:
    """A VAE whose latents are the mean of each cell's first frame, or the number of samples."""

    device = torch.device("cpu")

    def encode(self, content: torch.Tensor) -> torch.Tensor:
        if content.ndim == 3:
            return torch.full((1, 8, 3, 16), float(content.shape[2]))
        assert content.min() >= -1
        assert content.max() <= 1
        cells = torch.nn.functional.avg_pool3d(content.mean(1, keepdim=True), (1, 32, 32))
        return cells[:, :, ::8].expand(-1, 4, -1, -1, -1)


def encode(prompts, folder) -> list[SampleLatents]:
    return encode_sample_latents(prompts, folder / "prompts.txt", video_vae=Cells(), audio_vae=Cells())


# --- files ---


def test_a_still_covers_the_size_and_is_cut_around_its_centre(tmp_path):
    picture = np.zeros((100, 300, 3), dtype=np.uint8)
    picture[:, 50:250] = 255  # what remains of 3:1 in 2:1
    Image.fromarray(picture).save(tmp_path / "wide.png")
    still = read_still(tmp_path / "wide.png", (128, 64))
    assert still.shape == (1, 64, 128, 3)
    assert still.min() > 200


def test_a_still_is_turned_as_its_camera_says(tmp_path):
    stored = np.zeros((64, 128, 3), dtype=np.uint8)
    stored[:, :64] = 255  # left as stored = top as shown
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees clockwise to be shown
    Image.fromarray(stored).save(tmp_path / "turned.png", exif=exif)
    still = read_still(tmp_path / "turned.png", (64, 128))[0]
    assert still[:60].min() == 255
    assert still[68:].max() == 0


def test_references_follow_the_frame_rule_of_datasets(media):
    """40 frames at 50 fps are 20 at 25 fps, every other one; 17 of them are 8k + 1."""
    pixels = read_reference(media / "ref.mp4", (128, 64), frames=97, fps=25)
    assert [read_index(frame) for frame in pixels] == list(range(0, 34, 2))
    assert len(read_reference(media / "ref.mp4", (128, 64), frames=9, fps=25)) == 9
    assert len(read_reference(media / "ref.mp4", (128, 64), frames=97, fps=50)) == 33
    still = read_reference(media / "first.png", (128, 64), frames=97, fps=25)
    assert [read_index(frame) for frame in still] == [5]


def test_sound_keeps_its_true_length(media):
    assert read_sound(media / "voice.wav").shape == (2, round(0.7 * 16_000))


def test_files_without_sound_or_with_too_little(media, tmp_path):
    write_sound(tmp_path / "click.wav", tone(0.02))
    for path, message in (
        (media / "ref.mp4", "no audio stream"),
        (tmp_path / "click.wav", "at least 32 ms are needed; name another"),
    ):
        with pytest.raises(UserError, match=message):
            read_sound(path, advice="name another file")


def test_files_lie_beside_the_prompt_file_or_in_the_working_directory(media, tmp_path, monkeypatch):
    assert locate("first.png", media / "p.txt") == media / "first.png"
    monkeypatch.chdir(media)
    assert locate("first.png", tmp_path / "p.txt") == Path("first.png")
    assert locate("first.png", None) == Path("first.png")
    assert locate(str(media / "first.png"), tmp_path / "p.txt") == media / "first.png"


def test_all_missing_files_are_named_with_their_prompts(media):
    prompts = [
        replace(SMALL, image_path="first.png"),
        replace(SMALL, image_path="no.png", ref_audio_path="bad\0.wav"),
        replace(SMALL, image_path="ref.mp4", v2v_ref_path="voice.wav", ref_audio_path="first.png"),
    ]
    with pytest.raises(UserError) as error:
        require_media(prompts, media / "p.txt")
    for expected in (
        "prompt 1 (a cat): --i no.png: not found",
        "prompt 1 (a cat): --ra bad",
        "prompt 2 (a cat): --i ref.mp4: is a video, expected an image",
        "prompt 2 (a cat): --v voice.wav: is a sound, expected an image or a video",
        "prompt 2 (a cat): --ra first.png: is an image, expected a sound",
    ):
        assert expected in str(error.value)
    assert "prompt 0" not in str(error.value)


def test_latents_have_the_size_of_their_prompt(prompts, media):
    nothing, pictures, sound = encode(prompts, media)
    assert nothing == SampleLatents()
    assert pictures.image.shape == (1, 4, 1, 2, 4)
    assert pictures.reference.shape == (1, 4, 3, 2, 4)
    assert sound.reference_audio.unique().tolist() == [0.7 * 16_000]
    expected = torch.from_numpy(index_frame(5)).float().view(2, 32, 4, 32, 3).mean((1, 3, 4)) / 127.5 - 1
    torch.testing.assert_close(pictures.image[0, 0, 0], expected)


@pytest.mark.parametrize("option", ["image_path", "v2v_ref_path", "ref_audio_path"])
def test_a_damaged_file_is_named_with_its_prompt(tmp_path, option):
    name = {"image_path": "x.png", "v2v_ref_path": "x.mp4", "ref_audio_path": "x.wav"}[option]
    (tmp_path / name).write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=rf"prompt 1 \(a cat\): --\w+: .*{name}: cannot be decoded"):
        encode([SMALL, replace(SMALL, **{option: name})], tmp_path)


def test_values_that_are_not_finite_are_refused(media, prompts):
    class Broken(Cells):
        def encode(self, content):
            return super().encode(content) * float("nan")

    with pytest.raises(UserError, match=r"prompt 1 \(a cat\): --i first.png: .* not finite"):
        encode_sample_latents(prompts, media / "p.txt", video_vae=Broken(), audio_vae=Cells())


# --- the cache ---


@pytest.fixture
def cached(prompts, media, tmp_path):
    """The file, and a function that reads it for other prompts."""
    path = tmp_path / "c.pt"
    write_latent_cache(path, prompts, media / "p.txt", encode(prompts, media), owner=OWNER)

    def load(prompts=prompts, prompt_file=media / "p.txt", owner=OWNER, path=path):
        return load_latent_cache(path, prompts, prompt_file, rebuild="run this", owner=owner)

    return path, load


def same(a: SampleLatents, b: SampleLatents) -> bool:
    pairs = [(getattr(a, n), getattr(b, n)) for n in ("image", "reference", "reference_audio")]
    return all(torch.equal(x, y) if x is not None and y is not None else x is y for x, y in pairs)


def test_cache_round_trip(cached, prompts, media):
    _, load = cached
    assert all(same(a, b) for a, b in zip(encode(prompts, media), load(), strict=True))


def test_cache_is_in_the_known_format(cached, media):
    content = torch.load(cached[0], weights_only=True)
    assert content["version"] == 1
    pictures, sound = content["latent_cache"]
    assert (pictures["prompt_index"], pictures["image_path"], pictures["v2v_ref_path"]) == (1, "first.png", "ref.mp4")
    assert pictures["conditioning_latent"].shape == (1, 4, 1, 2, 4)
    assert pictures["v2v_ref_latent"].shape == (1, 4, 3, 2, 4)
    assert (sound["prompt_index"], sound["ref_audio_path"]) == (2, "voice.wav")
    assert sound["ref_audio_latent"].shape == (1, 8, 3, 16)
    assert sound["ref_audio_path_sha256"] == hashlib.sha256((media / "voice.wav").read_bytes()).hexdigest()


def test_files_of_other_programs_are_read(prompts, media, tmp_path):
    latents = encode(prompts, media)
    entries = [
        {"prompt_index": 0},
        {"prompt_index": 2, "reference_audio_path": "voice.wav", "reference_audio_latent": latents[2].reference_audio},
        {
            "prompt_index": 1,
            "image_path": ".\\first.png",
            "conditioning_latent": latents[1].image.to(torch.bfloat16),
            "v2v_ref_path": "ref.mp4",
            "v2v_ref_latent": latents[1].reference,
        },
    ]
    torch.save({"version": 1, "latent_cache": entries}, tmp_path / "f.pt")
    loaded = load_latent_cache(tmp_path / "f.pt", prompts, media / "p.txt", rebuild="", owner=OWNER)
    assert torch.equal(loaded[2].reference_audio, latents[2].reference_audio)
    assert torch.equal(loaded[1].image, latents[1].image.to(torch.bfloat16).float())
    assert same(loaded[0], SampleLatents())


def test_the_files_need_not_be_there_any_more(cached, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    assert cached[1](prompt_file=tmp_path / "elsewhere" / "p.txt")[1].image is not None


def changed(prompts, index, **values):
    return [replace(p, **values) if i == index else p for i, p in enumerate(prompts)]


@pytest.mark.parametrize(
    ("index", "values", "message"),
    [
        (1, {"image_path": "other.png"}, r"prompt 1 \(a cat\), --i: was made of first.png, the prompt has other.png"),
        (0, {"image_path": "first.png"}, r"prompt 0 \(a cat\), --i: has nothing of first.png"),
        (2, {"v2v_ref_path": "ref.mp4"}, "prompt 2 .*--v: has nothing of ref.mp4"),
        (1, {"width": 192}, "--i: made for 128x64 pixels and 1 frames, the prompt has 192x64 and 17"),
        (1, {"image_path": None, "frame_count": 9}, "--v: made for 128x64 pixels and 17 frames, the prompt has"),
        (1, {"image_path": None, "height": 32}, "--v: made for 128x64 pixels"),
    ],
)
def test_a_cache_of_other_prompts_says_how_to_rebuild_it(cached, prompts, index, values, message):
    with pytest.raises(UserError, match=message) as error:
        cached[1](changed(prompts, index, **values))
    assert "rebuild it: run this (or encode at every start: --no_use_precached_sample_latents)" in str(error.value)
    assert str(cached[0]) in str(error.value)


def test_another_order_of_the_prompts_is_noticed(cached, prompts):
    with pytest.raises(UserError, match="rebuild it"):
        cached[1](prompts[1:])


def test_prompts_that_ask_for_less_can_use_the_cache(cached, prompts):
    assert cached[1](changed(prompts, 1, v2v_ref_path=None))[1].reference is None


def test_a_changed_file_is_noticed(cached, media, tmp_path):
    for name in ("first.png", "ref.mp4", "voice.wav"):
        (tmp_path / name).write_bytes((media / name).read_bytes())
    cached[1](prompt_file=tmp_path / "p.txt")
    Image.fromarray(index_frame(6)).save(tmp_path / "first.png")
    with pytest.raises(UserError, match=r"first.png has changed since; rebuild"):
        cached[1](prompt_file=tmp_path / "p.txt")


def test_a_cache_of_another_vae_is_refused_where_it_was_used(cached, prompts):
    with pytest.raises(UserError, match="the video VAE of another checkpoint; rebuild"):
        cached[1](owner=CacheOwner("other", "audio"))
    with pytest.raises(UserError, match="the audio VAE of another checkpoint; rebuild"):
        cached[1](owner=CacheOwner("video", "other"))
    cached[1](changed(prompts, 2, ref_audio_path=None), owner=CacheOwner("video", "other"))
    cached[1](owner=CacheOwner(None, None))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not found; rebuild"),
        (b"no such format", "not a readable cache of sample latents"),
        ([1, 2], "not a cache of sample latents"),
        ({"version": 1, "latent_cache": [3]}, "not a cache of sample latents"),
        ({"version": 7, "latent_cache": []}, "has version 7, expected 1"),
        ({"version": 1, "latent_cache": [{"prompt_index": 1, "image_path": "first.png"}]}, "has nothing of first.png"),
    ],
)
def test_missing_damaged_and_foreign_files(cached, tmp_path, content, message):
    path = tmp_path / "x.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=message):
        cached[1](path=path)


# --- the size of references ---


def test_references_are_as_much_smaller_as_those_of_training(prompts, media):
    whole = encode(prompts, media)[1]
    half = encode_sample_latents(prompts, media / "p.txt", video_vae=Cells(), audio_vae=Cells(), reference_downscale=2)[
        1
    ]
    assert whole.reference.shape == (1, 4, 3, 2, 4)
    assert half.reference.shape == (1, 4, 3, 1, 2)
    # A cell of the smaller picture shows what four cells of the larger one show.
    pooled = torch.nn.functional.avg_pool3d(whole.reference, (1, 2, 2))
    torch.testing.assert_close(half.reference, pooled, atol=0.02, rtol=0)
    assert torch.equal(half.image, whole.image), "a first frame has the sample's size"


def test_samples_that_no_reference_can_be_smaller_than_are_refused(prompts, media):
    with pytest.raises(UserError, match=r"prompt 1 .*--v: .*must be multiples of 128, got 128x64"):
        encode_sample_latents(prompts, media / "p.txt", video_vae=Cells(), audio_vae=Cells(), reference_downscale=4)


def test_a_cache_with_references_of_another_size_is_refused(cached, prompts, media):
    class Owned:
        def owner(self):
            return OWNER

    path, _ = cached

    def obtain(downscale: int | None) -> list[SampleLatents]:
        choice = CacheChoice(path, use=True, rebuild="run this")
        return obtain_sample_latents(
            prompts, media / "p.txt", "av", vaes=Owned(), cache=choice, reference_downscale=downscale
        )

    assert len(obtain(None)) == len(obtain(1)) == 3
    with pytest.raises(UserError, match=r"prompt 1 .*reference_downscale 1, the LoRA has 2; rebuild it: run this"):
        obtain(2)


def test_the_size_of_references_is_read_from_the_loras():
    def lora(name: str, **metadata: str) -> SimpleNamespace:
        return SimpleNamespace(path=Path(name), metadata=metadata)

    ours = lora("a", reference_downscale_factor="2", ss_reference_downscale_factor="2")
    assert reference_downscale([]) is None
    assert reference_downscale([lora("style"), ours]) == 2
    assert reference_downscale([lora("old", ss_reference_downscale_factor="3")]) == 3
    with pytest.raises(UserError, match=r"different sizes of references: 2 \(a\), 1 \(b\)"):
        reference_downscale([ours, lora("b", reference_downscale_factor="1")])
    with pytest.raises(UserError, match="'half', expected a number"):
        reference_downscale([lora("c", reference_downscale_factor="half")])
