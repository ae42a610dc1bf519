"""Adapter files from format to format: the way there and back gives the same bits."""

from __future__ import annotations

import itertools
import json

import ltx2_tiny
import pytest
import torch
from checkpoint_files import save_checkpoint, tiny_weights
from lora_samples import random_lora, random_network

from musubi_tuner.common.safetensors_io import SafetensorsFile, save_safetensors
from musubi_tuner.ltx2_convert_lora import main
from musubi_tuner.networks.file_tools.merge import concat_method, merge_loras
from musubi_tuner.networks.files.alpha_notes import AlphaNote, fold, unfold
from musubi_tuner.networks.files.hashes import sshs_hashes
from musubi_tuner.networks.files.lora_reader import load_lora
from musubi_tuner.networks.files.lora_writer import save_lora
from musubi_tuner.networks.lora_ltx2 import create_network
from musubi_tuner.networks.names import comfy_name, diffusers_name, flat_name

FORMATS = ("native", "musubi", "comfy", "diffusers")
Q, CROSS, AUDIO = (
    f"transformer_blocks.{n}" for n in ("0.attn1.to_q", "0.video_to_audio_attn.to_out.0", "1.audio_ff.net.2")
)
# alpha / r is a power of two, is none, and is 1.
MIXED = {
    Q: (4, 32, 32, 2.0),
    CROSS: (5, 32, 24, 1.0),
    "transformer_blocks.1.audio_to_video_attn.to_k": (3, 24, 32, 7.0),
    AUDIO: (8, 96, 24, None),
    "audio_patchify_proj": (2, 6, 24, 3.0),
}


def convert(source, fmt, target=None, *options):
    target = target or source.with_name(f"to_{fmt}.safetensors")
    main(["--lora_weight", str(source), "--format", fmt, "--save_converted_lora", str(target), *options])
    return target


def contents(path):
    return dict(SafetensorsFile(path).read())


def assert_same_tensors(a, b):
    first, second = contents(a), contents(b)
    assert set(first) == set(second)
    for key, tensor in first.items():
        assert (tensor.dtype, tensor.shape) == (second[key].dtype, second[key].shape), key
        assert torch.equal(tensor, second[key]), key


def assert_same_product(a, b, tolerance=0.0):
    first, second = load_lora(a).modules, load_lora(b).modules
    assert set(first) == set(second)
    for name, module in first.items():
        torch.testing.assert_close(module.delta(), second[name].delta(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("source", "target"), itertools.permutations(FORMATS, 2))
def test_there_and_back_is_bitwise_equal(tmp_path, source, target, dtype):
    first = save_lora(random_lora(MIXED), tmp_path / "a.safetensors", source, dtype=dtype)
    middle = convert(first, target)
    assert load_lora(middle).format == target
    assert_same_product(first, middle, 1e-6)
    assert convert(middle, source, tmp_path / "b.safetensors").read_bytes() == first.read_bytes()


def test_chain_through_all_formats_ends_where_it_began(tmp_path):
    first = path = save_lora(random_lora(MIXED), tmp_path / "a.safetensors", dtype=torch.bfloat16)
    for step, fmt in enumerate(("comfy", "diffusers", "musubi", "diffusers", "comfy", "native")):
        path = convert(path, fmt, tmp_path / f"{step}.safetensors")
    assert path.read_bytes() == first.read_bytes()


def test_float32_returns_exactly_where_the_scale_is_a_power_of_two(tmp_path):
    powers = {Q: (4, 32, 32, 2.0), AUDIO: (8, 96, 24, 16.0)}
    first = save_lora(random_lora(powers), tmp_path / "a.safetensors")
    assert_same_tensors(convert(convert(first, "comfy"), "native"), first)


def test_float32_of_another_scale_is_told_and_keeps_every_bit_with_its_alpha(tmp_path, capsys):
    first = save_lora(random_lora({CROSS: (5, 32, 24, 1.0)}), tmp_path / "a.safetensors")
    assert_same_product(convert(convert(first, "comfy"), "native"), first, 1e-6)
    assert "1 modules: alpha / rank is no power of two" in capsys.readouterr().out
    kept = convert(first, "comfy", None, "--keep_alpha")
    assert f"{comfy_name(CROSS)}.alpha" in contents(kept)
    assert "no power of two" not in capsys.readouterr().out
    assert_same_tensors(convert(kept, "native"), first)


def test_alpha_of_a_dotted_file_comes_back(tmp_path):
    key = comfy_name(Q)
    tensors = {f"{key}.lora_A.weight": torch.randn(4, 3), f"{key}.lora_B.weight": torch.randn(5, 4)}
    first = tmp_path / "a.safetensors"
    save_safetensors({**tensors, f"{key}.alpha": torch.tensor(3.0, dtype=torch.bfloat16)}, first)
    assert_same_tensors(convert(convert(first, "native"), "comfy"), first)


def test_peft_configuration_comes_back(tmp_path):
    config = {"transformer.r": 4, "transformer.lora_alpha": 6, "transformer.alpha_pattern": {"to_out.0": 2}}
    names = (Q, CROSS)
    tensors = {f"{diffusers_name(n)}.lora_{s}.weight": torch.randn(4, 4) for n in names for s in "AB"}
    first = tmp_path / "a.safetensors"
    save_safetensors(tensors, first, {"lora_adapter_metadata": json.dumps(config)})
    for fmt in ("native", "comfy"):
        middle = convert(first, fmt)
        assert_same_product(middle, first, 1e-6)
        assert "lora_adapter_metadata" not in SafetensorsFile(middle).metadata
    back = convert(convert(first, "native"), "diffusers")
    assert_same_tensors(back, first)
    assert SafetensorsFile(back).metadata["lora_adapter_metadata"] == json.dumps(config)


def test_native_file_without_alpha_stays_one(tmp_path):
    flat = f"lora_unet_{flat_name(Q)}"
    tensors = {f"{flat}.lora_down.weight": torch.randn(4, 3), f"{flat}.lora_up.weight": torch.randn(5, 4)}
    save_safetensors(tensors, tmp_path / "a.safetensors")
    assert_same_tensors(convert(convert(tmp_path / "a.safetensors", "comfy"), "native"), tmp_path / "a.safetensors")


def test_weights_changed_since_the_conversion_are_not_undone(tmp_path):
    """The note on alpha stands in the metadata of a file whose B is another now: B counts."""
    middle = convert(save_lora(random_lora(MIXED), tmp_path / "a.safetensors", dtype=torch.bfloat16), "comfy")
    tensors = {k: torch.randn_like(t.float()) for k, t in contents(middle).items()}
    changed = tmp_path / "changed.safetensors"
    save_safetensors(tensors, changed, SafetensorsFile(middle).metadata)
    assert_same_product(convert(changed, "native"), changed)


@pytest.mark.parametrize("scale", [0.5, 1 / 3, 7 / 3, 1 / 64])
def test_folding_in_float32_is_undone_exactly(scale):
    up = torch.randn(999, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    note = AlphaNote(scale * 64, torch.float32, torch.bfloat16)
    assert torch.equal(unfold(fold(up, note.scale(64), torch.float32), note, 64), up)


def test_metadata_is_kept_and_hashes_are_renewed(tmp_path):
    first = save_lora(
        random_lora(MIXED), tmp_path / "a.safetensors", metadata={"ss_steps": "7", "modelspec.title": "x"}
    )
    path = convert(first, "diffusers")
    metadata = SafetensorsFile(path).metadata
    assert metadata["ss_steps"] == "7"
    assert metadata["modelspec.title"] == "x"
    assert metadata["sshs_model_hash"] == sshs_hashes(contents(path), metadata)["sshs_model_hash"]
    assert metadata["sshs_model_hash"] != SafetensorsFile(first).metadata["sshs_model_hash"]


def test_dtype(tmp_path):
    path = convert(save_lora(random_lora(MIXED), tmp_path / "a.safetensors"), "comfy", None, "--dtype", "float16")
    assert {t.dtype for t in contents(path).values()} == {torch.float16}


@pytest.mark.parametrize("fmt", ["comfy", "diffusers"])
@pytest.mark.parametrize("alpha", [4.0, 3.0])
def test_diffusers_renders_the_same_with_the_converted_file(tmp_path, fmt, alpha):
    """Every key is used, and the output is that of our own network."""
    pytest.importorskip("peft")
    loader = pytest.importorskip("diffusers.loaders.lora_pipeline").LTX2LoraLoaderMixin
    model = ltx2_tiny.tiny_model(ltx2_tiny.tiny_config("2.3"))
    inputs = ltx2_tiny.tiny_inputs(model.config)
    network = random_network(model, 4, alpha, lora_target_preset="full", audio_dim=8, rank_pattern={"ff": 2})
    path = convert(network.save_weights(tmp_path / "a.safetensors", None), fmt)
    twin = ltx2_tiny.diffusers_twin(model)
    network.apply_to(model)
    network.eval()
    state, metadata = loader.lora_state_dict(str(path), return_lora_metadata=True)
    loader.load_lora_into_transformer(dict(state), twin, metadata=metadata)
    assert sum("lora_" in key for key in twin.state_dict()) == len(state) == 2 * len(network.modules_by_name)
    with torch.no_grad():
        theirs = ltx2_tiny.run_diffusers(twin, inputs)
        for name, ours in model(inputs).items():
            assert ltx2_tiny.relative_error(ours, theirs[name]) < 1e-5


@pytest.mark.parametrize("fmt", FORMATS)
def test_training_starts_from_every_converted_file(tmp_path, fmt):
    model = ltx2_tiny.tiny_model(ltx2_tiny.tiny_config("2.3"))
    network = random_network(model, 4, 2.0)
    path = convert(network.save_weights(tmp_path / "a.safetensors", None), fmt)
    other = create_network(1.0, 4, 1.0, model)
    assert len(other.load_weights(path).matched) == len(network.modules_by_name)
    for name, module in other.as_lora_file().modules.items():
        torch.testing.assert_close(module.delta(), network.as_lora_file().modules[name].delta())


# --- DoRA and LyCORIS ---


def dora_file(path, magnitude):
    flat = f"lora_unet_{flat_name(Q)}"
    save_lora(random_lora({Q: (4, 32, 32, 2.0)}), path)
    save_safetensors({**contents(path), f"{flat}.dora_scale": magnitude}, path)
    return path


def test_magnitudes_of_dora_go_to_peft_and_back(tmp_path):
    magnitude = torch.rand(32, 1) + 0.5
    first = dora_file(tmp_path / "a.safetensors", magnitude)
    middle = convert(first, "diffusers")
    assert torch.equal(contents(middle)[f"{diffusers_name(Q)}.lora_magnitude_vector"], magnitude.view(32))
    assert_same_tensors(convert(middle, "native"), first)


def test_magnitudes_of_dora_in_comfy_give_the_same_layer(tmp_path, capsys):
    """m (W + dW) / |W + dW|, which ComfyUI computes from its own magnitude as m' (W + dW) / |W|."""
    magnitude = torch.rand(32, 1) + 0.5
    first = dora_file(tmp_path / "a.safetensors", magnitude)
    with pytest.raises(SystemExit):
        convert(first, "comfy")
    assert "give --ltx2_checkpoint" in capsys.readouterr().err
    weights = tiny_weights()
    base = save_checkpoint(tmp_path / "base.safetensors", weights)
    middle = convert(first, "comfy", None, "--ltx2_checkpoint", str(base))
    tensors, weight = contents(middle), weights[f"{Q}.weight"]
    key = comfy_name(Q)
    adapted = weight + tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
    theirs = tensors[f"{key}.dora_scale"] * adapted / weight.norm(dim=1, keepdim=True)
    ours = magnitude * adapted / adapted.norm(dim=1, keepdim=True)
    torch.testing.assert_close(theirs, ours)
    back = contents(convert(middle, "native", None, "--ltx2_checkpoint", str(base)))
    torch.testing.assert_close(back[f"lora_unet_{flat_name(Q)}.dora_scale"], magnitude)


def test_magnitudes_of_inputs_are_not_taken_for_those_of_outputs(tmp_path, capsys):
    """A square layer's [1, 32] is no [32, 1]."""
    first = dora_file(tmp_path / "a.safetensors", torch.rand(1, 32) + 0.5)
    middle = convert(first, "comfy")
    assert contents(middle)[f"{comfy_name(Q)}.dora_scale"].shape == (1, 32)
    assert_same_tensors(convert(middle, "native"), first)
    with pytest.raises(SystemExit):
        convert(first, "diffusers", tmp_path / "no.safetensors")
    assert "a magnitude for each input" in capsys.readouterr().err


def test_magnitudes_are_not_rounded_with_the_factors(tmp_path):
    magnitude = torch.rand(32, 1) + 0.5
    path = convert(dora_file(tmp_path / "a.safetensors", magnitude), "diffusers", None, "--dtype", "bfloat16")
    assert torch.equal(contents(path)[f"{diffusers_name(Q)}.lora_magnitude_vector"], magnitude.view(32))
    assert contents(path)[f"{diffusers_name(Q)}.lora_A.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "suffixes",
    [
        ("lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha"),
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"),
        ("diff", "diff_b"),
        ("weight", "on_input"),
        ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"),
        ("oft_blocks", "alpha"),
    ],
)
def test_lycoris_keeps_tensors_and_alpha(tmp_path, suffixes, capsys):
    flat = f"lora_unet_{flat_name(CROSS)}"
    first = tmp_path / "a.safetensors"
    save_safetensors({f"{flat}.{s}": torch.tensor(2.5) if s == "alpha" else torch.randn(2, 2) for s in suffixes}, first)
    middle = convert(first, "comfy")
    assert ("ComfyUI does not read" in capsys.readouterr().err) == ("on_input" in suffixes)
    assert set(contents(middle)) == {f"{comfy_name(CROSS)}.{s}" for s in suffixes}
    assert_same_tensors(convert(middle, "native"), first)
    with pytest.raises(SystemExit):
        convert(first, "diffusers", tmp_path / "no.safetensors")
    assert "diffusers has no such format" in capsys.readouterr().err
    assert not (tmp_path / "no.safetensors").exists()


# --- parts ---


def test_parts_add_up_to_the_whole(tmp_path):
    first = save_lora(random_lora(MIXED), tmp_path / "a.safetensors", dtype=torch.bfloat16)
    convert(first, "comfy", tmp_path / "b.safetensors", "--split_modalities")
    video, audio = (tmp_path / f"b.{m}.safetensors" for m in ("video", "audio"))
    assert set(load_lora(video).modules) == {Q, "transformer_blocks.1.audio_to_video_attn.to_k"}
    assert set(load_lora(audio).modules) == {CROSS, AUDIO, "audio_patchify_proj"}
    assert SafetensorsFile(audio).metadata["ss_modality_part"] == "audio"
    merge_loras([video, audio], tmp_path / "both.safetensors", concat_method())
    assert_same_product(tmp_path / "both.safetensors", first, 1e-6)


def test_part_without_modules_is_refused(tmp_path, capsys):
    first = save_lora(random_lora({Q: (4, 32, 32, 2.0)}), tmp_path / "a.safetensors")
    with pytest.raises(SystemExit):
        convert(first, "comfy", tmp_path / "b.safetensors", "--split_modalities")
    assert "holds nothing for b.audio.safetensors" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [first]


# --- bad requests ---

PAIR = {f"{comfy_name(Q)}.lora_A.weight": torch.ones(2, 3), f"{comfy_name(Q)}.lora_B.weight": torch.ones(4, 2)}
BAD = {
    "checkpoint": (tiny_weights(), [], "is no LoRA"),
    "other model": ({"lora_unet_double_blocks_0.lora_up.weight": torch.ones(2, 2)}, [], "a LoRA of another model"),
    "half": (dict([next(iter(PAIR.items()))]), [], "has lora_down but no lora_up weight"),
    "half of a LoKr": ({f"{comfy_name(Q)}.lokr_w1": torch.ones(2, 2)}, [], "the file is incomplete"),
    "LoKr of rank 0": (
        {
            f"{comfy_name(Q)}.lokr_w1": torch.ones(2, 2),
            f"{comfy_name(Q)}.lokr_w2_a": torch.ones(2, 0),
            f"{comfy_name(Q)}.lokr_w2_b": torch.ones(0, 2),
        },
        [],
        "lokr_w2_a has rank 0",
    ),
    "empty alpha": ({**PAIR, f"{comfy_name(Q)}.alpha": torch.ones(0)}, [], "expected one number"),
    "alpha alone": ({**PAIR, f"{comfy_name(AUDIO)}.alpha": torch.tensor(1.0)}, [], "but no weights"),
    "rank 0": ({k: torch.ones([0 if n == 2 else n for n in t.shape]) for k, t in PAIR.items()}, [], "has rank 0"),
    "nan": ({k: t * float("nan") for k, t in PAIR.items()}, [], "holds NaN or infinity"),
    "integers": ({k: t.int() for k, t in PAIR.items()}, [], "expected floating point"),
    "stray": ({**PAIR, "something": torch.ones(1)}, [], "1 of 3 tensors are of no adapter, such as something"),
    "overflow": ({k: t * 1e6 for k, t in PAIR.items()}, ["--dtype", "float16"], "choose a wider --dtype"),
    "itself": (PAIR, ["--save_converted_lora", "{source}"], "this is one of the inputs"),
    "suffix": (PAIR, ["--save_converted_lora", "x.pt"], "has to end in .safetensors"),
    "format": (PAIR, ["--format", "comfyui"], "did you mean 'comfy'?"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_give_one_message_and_no_file(tmp_path, capsys, case):
    tensors, arguments, message = BAD[case]
    source = tmp_path / "a.safetensors"
    save_safetensors(tensors, source)
    before = source.read_bytes()
    with pytest.raises(SystemExit) as status:
        convert(source, "native", None, *(a.format(source=source) for a in arguments))
    assert status.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error:") == 1
    assert list(tmp_path.iterdir()) == [source]
    assert source.read_bytes() == before


def test_name_of_the_result_where_none_is_given(tmp_path):
    first = save_lora(random_lora({Q: (4, 32, 32, 2.0)}), tmp_path / "a.comfy.safetensors", "comfy")
    for fmt, name in (("native", "a.safetensors"), ("diffusers", "a.diffusers.safetensors")):
        main(["--lora_weight", str(first), "--format", fmt])
        assert load_lora(tmp_path / name).format == fmt
