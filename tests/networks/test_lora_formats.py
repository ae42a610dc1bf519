"""LoRA files: spellings, conversions, hashes, broken files."""

from __future__ import annotations

import hashlib
import json

import ltx2_tiny
import pytest
import safetensors.torch
import torch
from lora_samples import full_skeleton, random_lora, random_network, run, tiny_transformer
from safetensors import safe_open

from musubi_tuner.common.errors import UserError
from musubi_tuner.networks.files.hashes import TensorSpec, specs_of, sshs_hashes, write_safetensors
from musubi_tuner.networks.files.lora_file import LoraFile, LoraModule
from musubi_tuner.networks.files.lora_reader import detect_format, load_lora
from musubi_tuner.networks.files.lora_writer import save_lora
from musubi_tuner.networks.lora_ltx2 import create_network, create_network_from_weights
from musubi_tuner.networks.names import canonical_name, comfy_name, diffusers_name, flat_name, known_names

MIXED = {
    "transformer_blocks.0.attn1.to_q": (4, 6, 8, 2.0),
    "transformer_blocks.0.audio_to_video_attn.to_out.0": (3, 5, 6, 1.0),
    "transformer_blocks.11.audio_ff.net.0.proj": (2, 6, 7, None),
    "transformer_blocks.1.ff.net.2": (8, 9, 6, 8.0),
    "patchify_proj": (2, 3, 6, 0.5),
    "audio_adaln_single.emb.timestep_embedder.linear_1": (2, 3, 6, 4.0),
    "av_ca_a2v_gate_adaln_single.linear": (2, 3, 6, 4.0),
    "text_embedding_projection.aggregate_embed": (2, 3, 6, 4.0),
}


def contents(path):
    with safe_open(path, framework="pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118


def assert_same_bits(a, b):
    assert set(a) == set(b)
    for key in a:
        assert a[key].dtype == b[key].dtype
        assert torch.equal(a[key], b[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", ["native", "musubi", "comfy", "diffusers"])
def test_save_load_save_is_bitwise_equal(tmp_path, fmt, dtype):
    save_lora(random_lora(MIXED), tmp_path / "a.safetensors", fmt, dtype=dtype)
    loaded = load_lora(tmp_path / "a.safetensors")
    assert loaded.format == fmt
    assert set(loaded.modules) == set(MIXED)
    save_lora(loaded, tmp_path / "b.safetensors", fmt)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("fmt", ["native", "musubi", "comfy", "diffusers"])
def test_every_format_holds_the_same_delta(tmp_path, fmt):
    lora = random_lora(MIXED)
    save_lora(lora, tmp_path / "a.safetensors", fmt)
    for name, module in load_lora(tmp_path / "a.safetensors").modules.items():
        torch.testing.assert_close(module.delta(), lora.modules[name].delta(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("other", ["native", "musubi", "diffusers"])
def test_comfy_to_another_format_and_back_is_bitwise_equal(tmp_path, other):
    first, middle, last = (tmp_path / f"{n}.safetensors" for n in "abc")
    save_lora(random_lora(MIXED), first, "comfy", dtype=torch.bfloat16)
    save_lora(load_lora(first), middle, other)
    save_lora(load_lora(middle), last, "comfy")
    assert_same_bits(contents(first)[0], contents(last)[0])


def test_keys_of_each_format(tmp_path):
    lora = random_lora({"transformer_blocks.0.attn1.to_out.0": (4, 6, 8, 2.0)})
    block = "transformer_blocks.0.attn1.to_out.0"
    flat = "transformer_blocks_0_attn1_to_out_0"
    expected = {
        "native": {f"lora_unet_{flat}.{s}" for s in ("lora_down.weight", "lora_up.weight", "alpha")},
        "musubi": {f"lora_unet_model_{flat}.{s}" for s in ("lora_down.weight", "lora_up.weight", "alpha")},
        "comfy": {f"diffusion_model.{block}.lora_{s}.weight" for s in "AB"},
        "diffusers": {f"transformer.{block}.lora_{s}.weight" for s in "AB"},
    }
    for fmt, keys in expected.items():
        tensors, metadata = contents(save_lora(lora, tmp_path / f"{fmt}.safetensors", fmt))
        assert set(tensors) == keys
        assert detect_format(keys) == fmt
        assert metadata["sshs_model_hash"]
    comfy, _ = contents(tmp_path / "comfy.safetensors")
    module = lora.modules[block]
    assert torch.equal(comfy[f"diffusion_model.{block}.lora_A.weight"], module.down)
    assert torch.equal(comfy[f"diffusion_model.{block}.lora_B.weight"], module.up * 0.5)


def test_emit_alpha_writes_the_rank(tmp_path):
    name = "transformer_blocks.0.attn1.to_q"
    save_lora(random_lora({name: (4, 6, 8, 2.0)}), tmp_path / "a.safetensors", "comfy", emit_alpha=True)
    assert contents(tmp_path / "a.safetensors")[0][f"diffusion_model.{name}.alpha"].item() == 4.0


@pytest.mark.parametrize(
    "spelling",
    [
        "lora_unet_{flat}.lora_down.weight|lora_unet_{flat}.lora_up.weight",
        "lora_unet_model_{flat}.lora_down.weight|lora_unet_model_{flat}.lora_up.weight",
        "diffusion_model.{dotted}.lora_A.weight|diffusion_model.{dotted}.lora_B.weight",
        "diffusion_model.{dotted}.lora_down.weight|diffusion_model.{dotted}.lora_up.weight",
        "transformer.{dotted}.lora_A.default.weight|transformer.{dotted}.lora_B.default.weight",
        "transformer.{dotted}.lora.down.weight|transformer.{dotted}.lora.up.weight",
        "base_model.model.{dotted}.lora_A.weight|base_model.model.{dotted}.lora_B.weight",
        "model.diffusion_model.{dotted}.lora_A.weight|model.diffusion_model.{dotted}.lora_B.weight",
        "{dotted}.lora_A.weight|{dotted}.lora_B.weight",
    ],
)
@pytest.mark.parametrize("name", ["transformer_blocks.13.video_to_audio_attn.to_out.0", "adaln_single.linear"])
def test_spellings_in_the_field_are_read(tmp_path, spelling, name):
    down, up = spelling.format(flat=name.replace(".", "_"), dotted=name).split("|")
    tensors = {down: torch.randn(2, 3), up: torch.randn(4, 2)}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    lora = load_lora(tmp_path / "a.safetensors")
    assert set(lora.modules) == {name}
    assert torch.equal(lora.modules[name].delta(), tensors[up] @ tensors[down])


def test_alpha_of_any_format_is_honoured(tmp_path):
    key = "diffusion_model.transformer_blocks.0.attn1.to_q"
    down, up = torch.randn(4, 3), torch.randn(5, 4)
    tensors = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up, f"{key}.alpha": torch.tensor(1.0)}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    (module,) = load_lora(tmp_path / "a.safetensors").modules.values()
    torch.testing.assert_close(module.delta(), up @ down / 4)


def test_alpha_of_peft_metadata_is_honoured_and_not_kept_after_folding(tmp_path):
    names = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.ff.net.2")
    config = {"transformer.lora_alpha": 8, "transformer.r": 4, "transformer.alpha_pattern": {"ff.net.2": 2}}
    tensors = {f"transformer.{n}.lora_{s}.weight": torch.randn(4, 4) for n in names for s in "AB"}
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", metadata)
    lora = load_lora(tmp_path / "a.safetensors")
    assert [lora.modules[n].info.scale for n in names] == [2.0, 0.5]
    _, written = contents(save_lora(lora, tmp_path / "b.safetensors", "diffusers"))
    assert "lora_adapter_metadata" not in written


def test_alpha_of_a_peft_folder_is_honoured(tmp_path):
    name = "transformer_blocks.0.attn1.to_q"
    tensors = {f"base_model.model.{name}.lora_{s}.weight": torch.randn(4, 4) for s in "AB"}
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = json.dumps({"lora_alpha": 6, "use_rslora": True})
    (tmp_path / "adapter_config.json").write_text(config, encoding="utf-8")
    assert load_lora(tmp_path / "adapter_model.safetensors").modules[name].info.scale == 3.0  # 6 / sqrt(4)


def test_names_are_one_to_one_in_every_format():
    for name in known_names():
        flat = flat_name(name)
        for spelling in (
            f"lora_unet_{flat}",
            f"lora_unet_model_{flat}",
            comfy_name(name),
            diffusers_name(name),
        ):
            assert canonical_name(spelling) == name


def test_diffusers_accepts_comfy_files_and_agrees_on_names(tmp_path):
    loaders = pytest.importorskip("diffusers.loaders")
    lora = random_lora(MIXED)
    comfy, _ = contents(save_lora(lora, tmp_path / "comfy.safetensors", "comfy"))
    ours, _ = contents(save_lora(lora, tmp_path / "diffusers.safetensors", "diffusers"))
    converted = loaders.lora_pipeline.LTX2LoraLoaderMixin.lora_state_dict(comfy)
    converted = {k.replace("connectors.aggregate", "connectors.text_proj"): v for k, v in converted.items()}
    for key in ours:
        assert torch.equal(converted[key], ours[key]), key


def test_diffusers_model_loads_the_diffusers_file(tmp_path):
    pytest.importorskip("peft")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        twin = diffusers.LTX2VideoTransformer3DModel(num_layers=48)
    theirs = {n for n, m in twin.named_modules() if isinstance(m, torch.nn.Linear)}
    network = create_network(1.0, 1, 1.0, full_skeleton("2.0", "av"), lora_target_preset="full")
    written = {diffusers_name(n).removeprefix("transformer.") for n in network.modules_by_name}
    assert written <= theirs


@pytest.mark.parametrize("fmt", ["comfy", "diffusers"])
@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_diffusers_renders_the_same_with_our_file(tmp_path, version, fmt):
    """Every key is used, and alpha != rank, mixed ranks and both streams give the output of our own network."""
    pytest.importorskip("peft")
    diffusers = pytest.importorskip("diffusers")
    model = ltx2_tiny.tiny_model(ltx2_tiny.tiny_config(version))
    inputs = ltx2_tiny.tiny_inputs(model.config)
    network = random_network(model, lora_target_preset="full", audio_dim=8, rank_pattern={"ff": 2})
    path = network.save_weights(tmp_path / "a.safetensors", None, fmt=fmt)
    twin = ltx2_tiny.diffusers_twin(model)
    network.apply_to(model)
    network.eval()
    others = dict.fromkeys(("vae", "audio_vae", "text_encoder", "tokenizer", "connectors", "vocoder"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipeline = diffusers.LTX2Pipeline(scheduler=scheduler, transformer=twin, **others)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    loaded = [key for key in twin.state_dict() if "lora_" in key]
    assert len(loaded) == len(contents(path)[0]) == 2 * len(network.modules_by_name)
    with torch.no_grad():
        theirs = ltx2_tiny.run_diffusers(twin, inputs)
        for name, ours in model(inputs).items():
            assert ltx2_tiny.relative_error(ours, theirs[name]) < 1e-5


# --- hashes ---


def _samples(count: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.float64, torch.uint8]
    return {f"t{i}.é": torch.randint(0, 9, (3, 100, 7), generator=g).to(dtypes[i % 6]) for i in range(count)}


@pytest.mark.parametrize("count", [0, 1, 6, 700])
def test_written_file_and_hashes_equal_those_of_safetensors(tmp_path, count):
    tensors = _samples(count)
    tensors["scalar"] = torch.tensor(0.25)
    metadata = {"ss_note": 'line\n"quoted" \\ é \x01', "modelspec.title": "x"}
    serialised = safetensors.torch.save(tensors, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    start = 8 + int.from_bytes(serialised[:8], "little")
    expected = {
        "sshs_model_hash": hashlib.sha256(serialised[start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(serialised[0x100000:0x110000]).hexdigest()[:8],
    }
    assert len(serialised) > 0x110000 or count < 700
    assert sshs_hashes(tensors, metadata) == expected
    path = write_safetensors(tmp_path / "a.safetensors", specs_of(tensors), tensors.__getitem__, metadata)
    read, read_metadata = contents(path)
    assert_same_bits(read, tensors)
    assert read_metadata == metadata | expected
    written = path.read_bytes()
    assert written[8 + int.from_bytes(written[:8], "little") :] == serialised[start:]


def test_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")

    def fail(name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(path, [TensorSpec("x", torch.float32, (1,))], fail, {})
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    assert path.read_bytes() == b"old"


# --- a network and its files ---


@pytest.mark.parametrize("fmt", ["native", "musubi", "comfy", "diffusers"])
def test_network_reloads_from_every_format(tmp_path, fmt):
    model = tiny_transformer()
    network = random_network(model, dim=4, alpha=2.0, lora_target_preset="full", audio_dim=2)
    path = network.save_weights(tmp_path / "a.safetensors", torch.float32, network.metadata(), fmt=fmt)
    network.apply_to(model)
    expected = run(model)
    network.detach()
    loaded = create_network(1.0, 4, 1.0, model, lora_target_preset="full", audio_dim=2)
    report = loaded.load_weights(path)
    assert (len(report.matched), report.missing, report.unexpected) == (68, (), ())
    for again in (loaded, create_network_from_weights(1.0, path, model)):
        again.apply_to(model)
        for key, value in run(model).items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=0)
        again.detach()


def test_network_file_round_trip_is_bitwise_equal(tmp_path):
    model = tiny_transformer()
    network = random_network(model)
    first = network.save_weights(tmp_path / "a.safetensors", metadata=network.metadata())
    other = create_network(1.0, 4, 1.0, model)
    other.load_weights(first)
    second = other.save_weights(tmp_path / "b.safetensors", metadata=network.metadata())
    assert first.read_bytes() == second.read_bytes()
    tensors, metadata = contents(first)
    assert set(tensors) == set(network.state_dict())
    assert {t.dtype for k, t in tensors.items() if k.endswith("weight")} == {torch.bfloat16}
    assert metadata["ss_network_dim"] == "4"
    assert metadata["ss_network_module"] == "networks.lora_ltx2"


@pytest.mark.parametrize(("saved", "loaded"), [("av", "video"), ("video", "av")])
def test_audio_modules_may_be_missing_on_either_side(tmp_path, caplog, saved, loaded):
    path = random_network(tiny_transformer(mode=saved)).save_weights(tmp_path / "a.safetensors")
    report = create_network(1.0, 4, 1.0, tiny_transformer(mode=loaded)).load_weights(path)
    assert len(report.matched) == 16
    assert len(report.unexpected if saved == "av" else report.missing) == 32
    assert "16 modules loaded, 32" in caplog.text
    assert len(create_network_from_weights(1.0, path, tiny_transformer(mode=loaded)).modules_by_name) == 16


def test_other_mismatches_are_errors(tmp_path):
    model = tiny_transformer()
    path = random_network(model).save_weights(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"a\.safetensors: does not fit.*40 modules|ff\.net"):
        create_network(1.0, 4, 1.0, model, lora_target_preset="v2v").load_weights(path)
    with pytest.raises(UserError, match="has rank 4, the network 8; use --network_dim 4"):
        create_network(1.0, 8, 1.0, model).load_weights(path)
    wide = full_skeleton("2.3", "av")
    with pytest.raises(UserError, match="32 -> 32 features, the model's has 4096 -> 4096"):
        create_network_from_weights(1.0, path, wide)


# --- broken files ---

NAME = "transformer_blocks.0.attn1.to_q"
COMFY = f"diffusion_model.{NAME}"


def pair(prefix=COMFY, down=(2, 3), up=(4, 2)):
    return {f"{prefix}.lora_A.weight": torch.ones(down), f"{prefix}.lora_B.weight": torch.ones(up)}


BROKEN = {
    "not_lora": ({"model.diffusion_model.x.weight": torch.ones(2)}, "no LoRA: 1 tensors such as model.diff"),
    "empty": ({}, "no LoRA: 0 tensors"),
    "other_model": (pair("lora_unet_double_blocks_0_img_attn_qkv"), "another model"),
    "other_dotted": (pair("diffusion_model.blocks.0.attn.q"), "another model: 1 of 1 are unknown to LTX-2"),
    "half": ({f"{COMFY}.lora_A.weight": torch.ones(2, 3)}, "has lora_down but no lora_up weight"),
    "rank_zero": (pair(down=(0, 3), up=(4, 0)), "has rank 0"),
    "no_pair": (pair(down=(2, 3), up=(4, 3)), "are no pair"),
    "conv": (pair(down=(2, 3, 1, 1), up=(4, 2, 1, 1)), "are no pair"),
    "nan": ({**pair(), f"{COMFY}.lora_B.weight": torch.full((4, 2), float("nan"))}, "holds NaN or infinity"),
    "alpha_nan": ({**pair(), f"{COMFY}.alpha": torch.tensor(float("nan"))}, "alpha is nan"),
    "integers": ({k: v.to(torch.int32) for k, v in pair().items()}, "type int32, expected floating point"),
    "twice": ({**pair(), **pair("transformer." + NAME)}, "are the same module"),
    "dora_of_peft": ({**pair(), f"{COMFY}.lora_magnitude_vector": torch.ones(3)}, r"\[3\], expected \[4, 1\]"),
    "dora_by_input": ({**pair(), f"{COMFY}.dora_scale": torch.ones(1, 3)}, r"\[1, 3\], expected \[4, 1\]"),
    "dora_alone": ({**pair(), f"{COMFY[:-1]}k.dora_scale": torch.ones(4, 1)}, "belongs to no pair"),
    "dora_nan": ({**pair(), f"{COMFY}.dora_scale": torch.full((4, 1), float("nan"))}, "holds NaN"),
    "lokr": ({f"lora_unet_{NAME.replace('.', '_')}.lokr_w1": torch.ones(2, 2)}, "LyCORIS LoKr"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file_gives_one_message_with_its_name(tmp_path, case):
    tensors, message = BROKEN[case]
    path = tmp_path / f"{case}.safetensors"
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(UserError, match=message) as error:
        load_lora(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_lora(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="is a folder"):
        load_lora(tmp_path)
    (tmp_path / "text.safetensors").write_text("hello", encoding="utf-8")
    with pytest.raises(UserError, match="not a safetensors file"):
        load_lora(tmp_path / "text.safetensors")
    whole = save_lora(random_lora({NAME: (2, 3, 4, None)}), tmp_path / "cut.safetensors")
    whole.write_bytes(whole.read_bytes()[:-8])
    with pytest.raises(UserError, match="cut.safetensors is truncated.*make, copy or download it again"):
        load_lora(whole)


def test_overflow_of_a_narrow_dtype_is_an_error(tmp_path):
    lora = LoraFile({NAME: LoraModule(torch.full((2, 3), 1e6), torch.ones(4, 2))}, {})
    with pytest.raises(UserError, match=rf"{NAME} holds NaN or infinity as float16; use bfloat16"):
        save_lora(lora, tmp_path / "a.safetensors", dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_training_saves_even_a_broken_network_but_says_so(tmp_path, caplog):
    network = random_network(tiny_transformer())
    with torch.no_grad():
        next(iter(network.modules_by_name.values())).lora_up.weight.fill_(float("nan"))
    assert network.save_weights(tmp_path / "a.safetensors").is_file()
    assert "attn1.to_q holds NaN" in caplog.text
