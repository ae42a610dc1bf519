"""Gemma from folders and single files, and the way of a prompt through both networks."""

from __future__ import annotations

import io
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from components_tiny import write_components
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoModelForImageTextToText

from musubi_tuner.common.errors import UserError
from musubi_tuner.common.safetensors_io import SafetensorsFile, save_safetensors
from musubi_tuner.demo.gemma import write_gemma
from musubi_tuner.generation.text_encoding import prompt_length
from musubi_tuner.models.checkpoint import Checkpoint
from musubi_tuner.models.gemma import load_gemma
from musubi_tuner.models.gemma_parts import language_model_name, load_tokenizer
from musubi_tuner.models.gemma_single_file import Fp8Linear, _config_from_shapes
from musubi_tuner.models.text_encoder import load_text_encoder

PROMPTS = ["A cat looks at the camera.", "A big grey rabbit, " * 60, ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gemma") / "gemma"
    write_gemma(path)
    return path


@pytest.fixture(scope="module", params=["2.0", "2.3"])
def checkpoint(request, tmp_path_factory) -> Checkpoint:
    path = tmp_path_factory.mktemp("text") / f"{request.param}.safetensors"
    write_components(path, request.param)
    return Checkpoint.open(path)


def single_file(folder: Path, path: Path, *, prefix: str = "model.", change=None, tokenizer: bool = True) -> Path:
    """The folder's language model in one file, with its tokenizer and its configuration."""
    source = SafetensorsFile(folder / "model.safetensors")
    tensors = {}
    for key, tensor in source.read():
        if name := language_model_name(key):
            tensors[prefix + name] = tensor
        elif "vision" in key:
            tensors[key] = tensor
    if change is not None:
        change(tensors)
    if tokenizer:
        raw = (folder / "tokenizer.json").read_bytes()
        tensors["tokenizer_json"] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    config = (folder / "config.json").read_text(encoding="utf-8")
    save_safetensors(tensors, path, {"gemma_config": config})
    return path


def test_hidden_states_are_those_of_transformers(folder):
    """Every layer, every valid token, against the multimodal model run on the fully padded row."""
    gemma = load_gemma(folder, dtype=torch.float32)
    ids, mask = gemma.tokenize(PROMPTS)
    reference = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).model.language_model
    with torch.no_grad():
        output = reference(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    expected = torch.stack(output.hidden_states, dim=-1)
    states, state_mask = gemma.encode(PROMPTS)
    assert states.shape == expected.shape == (3, 1024, 32, 5)
    assert torch.equal(state_mask, mask)
    valid = mask.bool()
    torch.testing.assert_close(states[valid], expected[valid], rtol=1e-4, atol=1e-4)


def test_tokens_begin_with_bos_and_are_padded_on_the_left(folder):
    gemma = load_gemma(folder, dtype=torch.float32)
    ids, mask = gemma.tokenize(["  A cat  ", "A cat", "word " * 3000])
    assert torch.equal(ids[0], ids[1])
    lengths = mask.sum(1)
    assert lengths[2] == 1024
    for row, length in enumerate(lengths.tolist()):
        assert ids[row, 1024 - length] == 2
        assert (ids[row, : 1024 - length] == 0).all()
        assert mask[row, 1024 - length :].all()


def test_a_prompt_does_not_depend_on_its_batch(folder, checkpoint):
    encoder = load_text_encoder(checkpoint, gemma_root=folder, dtype=torch.float32)
    together = encoder.encode(PROMPTS, "av")
    for index, prompt in enumerate(PROMPTS):
        alone = encoder.encode([prompt], "av")
        torch.testing.assert_close(together.video[index], alone.video[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together.audio[index], alone.audio[0], rtol=1e-4, atol=1e-4)
    assert together.mask.shape == (3, 1024)
    assert together.mask.all()
    assert not torch.allclose(together.video[0], together.video[2], atol=0.05)
    assert encoder.encode(PROMPTS[:1], "video").audio is None


@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", "language_model.model."])
def test_single_file_equals_folder(folder, tmp_path, prefix):
    path = single_file(folder, tmp_path / "gemma.safetensors", prefix=prefix)
    ours, _ = load_gemma(None, safetensors=path, dtype=torch.float32).encode(PROMPTS)
    expected, _ = load_gemma(folder, dtype=torch.float32).encode(PROMPTS)
    assert torch.equal(ours, expected)


def test_single_file_takes_configuration_and_tokenizer_from_a_folder(folder, tmp_path):
    path = single_file(folder, tmp_path / "gemma.safetensors", tokenizer=False)
    file = SafetensorsFile(path)
    save_safetensors(dict(file.read()), path)  # without metadata
    with pytest.raises(UserError, match="carries no tokenizer.*--gemma_root"):
        load_gemma(None, safetensors=path, dtype=torch.float32)
    ours, _ = load_gemma(folder, safetensors=path, dtype=torch.float32).encode(PROMPTS[:1])
    expected, _ = load_gemma(folder, dtype=torch.float32).encode(PROMPTS[:1])
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("suffix", [".weight_scale", ".scale_weight"])
@pytest.mark.parametrize("offload", [True, False])
def test_fp8_single_file_uses_its_scales(folder, tmp_path, suffix, offload):
    """Against the same model with the weights that fp8 times scale stands for."""
    dequantised = {}

    def to_fp8(tensors):
        for key in [k for k in tensors if k.endswith("_proj.weight") and "vision" not in k]:
            weight = tensors[key].float()
            scale = weight.abs().amax(dim=1, keepdim=True) / 448
            tensors[key] = (weight / scale).to(torch.float8_e4m3fn)
            tensors[key.removesuffix(".weight") + suffix] = scale
            dequantised[language_model_name(key)] = tensors[key].float() * scale

    path = single_file(folder, tmp_path / "fp8.safetensors", change=to_fp8)
    gemma = load_gemma(None, safetensors=path, dtype=torch.float32, offload_weights=offload)
    layers = [m for m in gemma._model.modules() if isinstance(m, Fp8Linear)]
    assert len(layers) == len(dequantised) == 4 * 7
    assert all(layer.weight.dtype == torch.float8_e4m3fn for layer in layers)
    reference = load_gemma(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in dequantised.items():
            reference._model.get_parameter(name).copy_(weight)
    torch.testing.assert_close(gemma.encode(PROMPTS[:1])[0], reference.encode(PROMPTS[:1])[0])
    gemma.to("cpu")
    assert all(layer.weight.dtype == torch.float8_e4m3fn for layer in layers)


def _sentencepiece() -> bytes:
    """A SentencePiece model with Gemma's special ids."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["A cat looks at the camera.", "A big grey rabbit yawns in the meadow."] * 20),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("fp8", [False, True])
def test_single_file_with_a_sentencepiece_tokenizer(folder, tmp_path, dtype, fp8):
    proto = _sentencepiece()

    def change(tensors):
        tensors["spiece_model"] = torch.frombuffer(bytearray(proto), dtype=torch.uint8).view(dtype)
        for key in [k for k in tensors if fp8 and k.endswith("_proj.weight") and "vision" not in k]:
            tensors[key] = tensors[key].to(torch.float8_e4m3fn)

    path = single_file(folder, tmp_path / "gemma.safetensors", change=change, tokenizer=False)
    gemma = load_gemma(None, safetensors=path, dtype=torch.float32)
    ids, mask = gemma.tokenize(["  A cat looks. ", ""])
    pieces = SentencePieceProcessor(model_proto=proto)
    expected = [2, *pieces.encode("A cat looks.")]
    assert ids[0, mask[0].bool()].tolist() == expected
    assert ids[0, : -len(expected)].unique().tolist() == [0]
    assert ids[1, mask[1].bool()].tolist() == [2]
    assert gemma.excess_tokens("A cat looks. " * 50) == 0
    long = "A cat looks at the camera. " * 200
    assert gemma.excess_tokens(long) == 1 + len(pieces.encode(long.strip())) - 1024
    assert gemma.tokenize([long])[1].sum() == 1024
    states, _ = gemma.encode(["A cat"])
    assert states.isfinite().all()


def test_counting_the_tokens_of_a_long_caption_warns_of_no_error_of_the_model(folder, caplog):
    gemma = load_gemma(folder, dtype=torch.float32)
    gemma._tokenizer.model_max_length = 1024
    transformers = logging.getLogger("transformers")  # which hands nothing to the root
    transformers.addHandler(caplog.handler)
    try:
        assert gemma.excess_tokens("word " * 10_000) > 0
    finally:
        transformers.removeHandler(caplog.handler)
    assert "indexing errors" not in caplog.text


def test_tokens_beyond_the_limit_are_counted(folder):
    gemma = load_gemma(folder, dtype=torch.float32, max_length=128)
    per_word = len(gemma._tokenizer("cat " * 100)["input_ids"]) - len(gemma._tokenizer("cat " * 99)["input_ids"])
    full = len(gemma._tokenizer(("cat " * 1000).strip())["input_ids"])
    assert gemma.excess_tokens("cat " * 1000) == full - 128
    assert gemma.excess_tokens("cat " * 1001) == full - 128 + per_word
    assert gemma.excess_tokens("a cat") == 0


@pytest.mark.parametrize(
    ("value", "length"), [(None, None), ("", None), ("1024", None), ("256", 256), ("0", "0"), ("much", "much")]
)
def test_the_length_of_prompts_by_the_environment(monkeypatch, value, length):
    monkeypatch.delenv("LTX2_GEMMA_MAX_LENGTH", raising=False)
    if value is not None:
        monkeypatch.setenv("LTX2_GEMMA_MAX_LENGTH", value)
    if isinstance(length, str):
        with pytest.raises(UserError, match=f"LTX2_GEMMA_MAX_LENGTH is '{length}'"):
            prompt_length()
    else:
        assert prompt_length() == length


def test_packed_weights_are_refused(folder, tmp_path):
    def pack(tensors):
        key = next(k for k in tensors if k.endswith("layers.0.mlp.gate_proj.weight"))
        tensors[key] = tensors[key].view(torch.uint8)

    path = single_file(folder, tmp_path / "nvfp4.safetensors", change=pack)
    with pytest.raises(UserError, match="packed format"):
        load_gemma(None, safetensors=path, dtype=torch.float32)


def test_configuration_from_shapes_has_the_rope_factor(folder, tmp_path):
    file = SafetensorsFile(single_file(folder, tmp_path / "gemma.safetensors"))
    config = _config_from_shapes({n: i for k, i in file.tensors.items() if (n := language_model_name(k))})
    original = json.loads((folder / "config.json").read_text(encoding="utf-8"))["text_config"]
    for key in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ):
        assert getattr(config, key) == original[key]
    assert config.rope_parameters["full_attention"]["factor"] == 8
    assert config.rope_parameters["full_attention"]["rope_theta"] == 1e6
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 1e4


def test_weights_and_tokenizer_may_lie_deeper(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "download" / "text_encoder")
    (tmp_path / "download" / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.move(tmp_path / "download" / "text_encoder" / name, tmp_path / "download" / "tokenizer" / name)
    assert load_gemma(tmp_path / "download", dtype=torch.float32).hidden_size == 32


@pytest.mark.parametrize(
    ("lost", "message"),
    [("tokenizer.json", "no tokenizer"), ("model.safetensors", "weights"), ("config.json", "config.json")],
)
def test_incomplete_folders_are_told(folder, tmp_path, lost, message):
    shutil.copytree(folder, tmp_path / "gemma")
    (tmp_path / "gemma" / lost).unlink()
    with pytest.raises(UserError, match=message):
        load_gemma(tmp_path / "gemma", dtype=torch.float32)


def test_another_gemma_is_told(folder, checkpoint, tmp_path):
    path = tmp_path / "gemma"
    shutil.copytree(folder, path)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["num_hidden_layers"] = 3
    config["text_config"]["layer_types"] = config["text_config"]["layer_types"][:3]
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    source = SafetensorsFile(path / "model.safetensors")
    tensors = {k: t for k, t in source.read() if "language_model.model.layers.3." not in k}
    save_safetensors(tensors, path / "model.safetensors", source.metadata)
    with pytest.raises(UserError, match="4 states of width 32.*expect 5"):
        load_text_encoder(checkpoint, gemma_root=path, dtype=torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_8bit": True, "load_in_4bit": True}, "exclude each other"),
        ({"load_in_8bit": True}, "--gemma_load_in_8bit needs a CUDA device, got cpu"),
        ({"load_in_4bit": True, "gemma_safetensors": "x.safetensors"}, "works with --gemma_root only"),
        ({"gemma_root": None}, "give --gemma_root"),
        ({"max_length": 1000}, "multiple of 128"),
    ],
)
def test_options_that_cannot_work_are_told(folder, checkpoint, options, message):
    with pytest.raises(UserError, match=message):
        load_text_encoder(checkpoint, **{"gemma_root": folder, "dtype": torch.float32, **options})


def test_a_damaged_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer.json: not a readable tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "config.json: not a readable configuration .*model_type"),
        ("no json", "config.json: not a readable configuration"),
        ('{"model_type": "llama"}', "config.json: is of a model of type llama; expected Gemma 3"),
    ],
)
def test_a_configuration_of_no_gemma_is_named(folder, checkpoint, tmp_path, text, message):
    shutil.copytree(folder, tmp_path / "gemma")
    (tmp_path / "gemma" / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_text_encoder(checkpoint, gemma_root=tmp_path / "gemma", dtype=torch.float32)
