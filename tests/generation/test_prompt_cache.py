"""The file of encoded sample prompts: round trips, modes, and what does not match."""

import pickle
from dataclasses import replace

import pytest
import torch

from musubi_tuner.common.errors import UserError
from musubi_tuner.generation.prompt_cache import encode_prompts, load_prompt_cache, write_prompt_cache
from musubi_tuner.generation.prompts import SamplePrompt
from musubi_tuner.models.text_encoder import PromptEmbeds

PROMPTS = [
    SamplePrompt(prompt="A cat"),
    SamplePrompt(prompt="A dog", negative_prompt="bad", cfg_scale=3.0),
    SamplePrompt(prompt="A cat", guidance_scale=2.0),
]


class FakeEncoder:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def excess_tokens(self, prompt):
        return 0

    def encode(self, prompts, mode):
        self.calls += prompts
        g = torch.Generator().manual_seed(len(prompts[0]))
        return PromptEmbeds(
            video=torch.randn(1, 8, 6, generator=g),
            audio=None if mode == "video" else torch.randn(1, 8, 4, generator=g),
            mask=torch.ones(1, 8, dtype=torch.bool),
        )


@pytest.fixture
def cache(tmp_path):
    def make(mode: str, **options):
        path = tmp_path / f"{mode}.pt"
        encoded = encode_prompts(FakeEncoder(), PROMPTS, mode)
        write_prompt_cache(path, mode, PROMPTS, encoded, **options)
        return path, encoded

    return make


def test_each_distinct_text_is_encoded_once():
    encoder = FakeEncoder()
    encoded = encode_prompts(encoder, PROMPTS, "av")
    assert encoder.calls == ["A cat", "A dog", "bad", ""]
    assert [e.negative is not None for e in encoded] == [False, True, True]


@pytest.mark.parametrize("mode", ["video", "av", "audio"])
def test_round_trip(cache, mode):
    path, encoded = cache(mode)
    for before, after in zip(encoded, load_prompt_cache(path, mode, PROMPTS), strict=True):
        for a, b in ((before.positive, after.positive), (before.negative, after.negative)):
            assert (a is None) == (b is None)
            for name in ("video", "audio", "mask") if a else ():
                x, y = getattr(a, name), getattr(b, name)
                assert (x is None and y is None) or torch.equal(x, y)


@pytest.mark.parametrize("mode", ["video", "audio"])
def test_cache_of_both_modalities_serves_one(cache, mode):
    path, encoded = cache("av")
    loaded = load_prompt_cache(path, mode, PROMPTS)[0].positive
    other = "audio" if mode == "video" else "video"
    assert getattr(loaded, other) is None
    assert torch.equal(getattr(loaded, mode), getattr(encoded[0].positive, mode))


def test_joined_embeddings_of_other_programs_are_split_by_width(tmp_path):
    entry = {"prompt": "A cat", "prompt_embeds": torch.randn(4, 6144), "prompt_attention_mask": torch.ones(4)}
    path = tmp_path / "foreign.pt"
    torch.save({"version": 2, "ltx_mode": "av", "audio_video": True, "prompt_cache": [entry]}, path)
    loaded = load_prompt_cache(path, "av", PROMPTS[:1])[0].positive
    assert (loaded.video.shape[-1], loaded.audio.shape[-1]) == (4096, 2048)


def test_whitespace_does_not_count(cache):
    path, _ = cache("video")
    load_prompt_cache(path, "video", [replace(PROMPTS[0], prompt="  A \n cat"), *PROMPTS[1:]])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (PROMPTS[:2], "has 3 prompts, the prompt file 2"),
        ([PROMPTS[1], *PROMPTS[1:]], "prompt 0 is 'A cat', the prompt file has 'A dog'"),
        ([PROMPTS[0], replace(PROMPTS[1], negative_prompt="worse"), PROMPTS[2]], "negative prompt of prompt 1"),
        ([replace(PROMPTS[0], cfg_scale=2.0), *PROMPTS[1:]], "prompt 0 has no negative prompt"),
    ],
)
def test_changed_prompts_ask_for_a_rebuild(cache, prompts, message):
    path, _ = cache("video")
    with pytest.raises(UserError, match=f"{message}.*re-run ltx2_cache_text_encoder_outputs.py"):
        load_prompt_cache(path, "video", prompts)


def test_other_mode_and_other_checkpoint_are_refused(cache):
    path, _ = cache("video", encoder_id="aaa")
    with pytest.raises(UserError, match="made with --ltx2_mode video, this run uses av"):
        load_prompt_cache(path, "av", PROMPTS)
    with pytest.raises(UserError, match="another checkpoint"):
        load_prompt_cache(path, "video", PROMPTS, encoder_id="bbb")
    load_prompt_cache(path, "video", PROMPTS, encoder_id="aaa")


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_missing_damaged_and_foreign_files(tmp_path, capsys):
    with pytest.raises(UserError, match="not found"):
        load_prompt_cache(tmp_path / "nope.pt", "video", PROMPTS)
    (tmp_path / "text.pt").write_text("hello", encoding="utf-8")
    with pytest.raises(UserError, match="not a readable cache"):
        load_prompt_cache(tmp_path / "text.pt", "video", PROMPTS)
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="not a readable cache"):
        load_prompt_cache(tmp_path / "evil.pt", "video", PROMPTS)
    assert "executed" not in capsys.readouterr().out
    torch.save({"version": 1, "prompt_cache": []}, tmp_path / "old.pt")
    with pytest.raises(UserError, match="has version 1, expected 2"):
        load_prompt_cache(tmp_path / "old.pt", "video", PROMPTS)


@pytest.mark.parametrize("entry", [3, {}, {"prompt": "a cat"}, {"prompt": "a cat", "prompt_embeds": [1.0]}])
def test_entries_that_are_none_give_one_message(tmp_path, entry):
    torch.save({"version": 2, "ltx_mode": "video", "prompt_cache": [entry]}, tmp_path / "c.pt")
    with pytest.raises(UserError, match="entries without a prompt and its embeddings"):
        load_prompt_cache(tmp_path / "c.pt", "video", [SamplePrompt(prompt="a cat")])
