"""Options of LyCORIS networks: the TOML file, ``--network_args``, which layer gets what, and what is refused."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from lora_samples import full_skeleton

from musubi_tuner.common.errors import UserError
from musubi_tuner.networks import resolve
from musubi_tuner.networks.lycoris.bridge import create_network, planned_sizes
from musubi_tuner.networks.lycoris.options import LayerOptions, class_names, read_lycoris_options
from musubi_tuner.networks.resolve import resolve_network_module
from musubi_tuner.networks.targets import linear_names

GUIDE = """
[network]
base_algo = "lokr"
base_factor = 16

[network.modules."*audio*"]
algo = "lora"
dim = 64
alpha = 32

[network.init]
lokr_norm = 1e-3
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "x.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_file_of_the_guide(tmp_path: Path):
    options = read_lycoris_options(8, 4.0, lycoris_config=write(tmp_path, GUIDE))
    block = "transformer_blocks.3."
    assert options.of(f"{block}attn1.to_q") == LayerOptions("lokr", 8, 4.0, factor=16)
    assert options.of(f"{block}audio_attn1.to_q") == LayerOptions("lora", 64, 32.0, factor=16)
    assert options.of(f"{block}video_to_audio_attn.to_q").algo == "lora"
    assert options.lokr_norm == 1e-3


def test_arguments_win_over_the_file(tmp_path: Path):
    options = read_lycoris_options(
        None,
        1.0,
        lycoris_config=write(tmp_path, GUIDE),
        **{
            "factor": "8",
            "dropout": "0.2",
            "modules.*audio*.dim": "2",
            "modules.*.ff.*.algo": "loha",
            "init.lokr_norm": "0.5",
            "exclude_patterns": "['.*to_v$']",
            "loraplus_lr_ratio": "4",
        },
    )
    block = "transformer_blocks.3."
    assert options.of(f"{block}attn1.to_q") == LayerOptions("lokr", 4, 1.0, factor=8, dropout=0.2)
    assert options.of(f"{block}audio_attn1.to_q").dim == 2
    assert options.of(f"{block}audio_ff.net.2").algo == "lora", "the first pattern that matches counts"
    assert options.of(f"{block}ff.net.2").algo == "loha"
    assert options.lokr_norm == 0.5
    assert options.args.exclude_patterns == (".*to_v$",)
    assert options.args.loraplus_lr_ratio == 4.0
    said = options.described()
    assert said["algo"] == "lokr"
    assert said["modules.*audio*.dim"] == 2


def test_classes_known_from_names_are_those_of_the_model():
    model = full_skeleton("2.3", "av")
    modules = dict(model.named_modules())
    for path in linear_names(model)[:100]:
        parts = path.split(".")
        inside = [".".join(parts[:length]) for length in range(2, len(parts))]
        assert class_names(path) == tuple(
            type(modules[p]).__name__ for p in inside if type(modules[p]).__name__ not in ("Sequential", "ModuleList")
        )


def test_classes_choose_layers():
    options = read_lycoris_options(
        4, 1.0, **{"algo": "lokr", "modules.FeedForward.dim": "9", "modules.Attention.dim": "2"}
    )
    assert options.of("transformer_blocks.0.ff.net.0.proj").dim == 9
    assert options.of("transformer_blocks.0.audio_attn2.to_out.0").dim == 2


BAD_FILES = {
    "unknown key 'base_algoo' (did you mean 'base_algo'?)": '[network]\nbase_algoo = "lokr"',
    "unknown key 'netwrk' (did you mean 'network'?)": "[netwrk]\nx = 1",
    "unknown key 'facter' (did you mean 'factor'?)": '[network.modules."*attn1*"]\nfacter = 4',
    "unknown key 'lokr_nrm' (did you mean 'lokr_norm'?)": '[network]\nbase_algo = "lokr"\n[network.init]\nlokr_nrm = 1',
    "base_algo = lokrr: unknown algorithm (did you mean 'lokr'?)": '[network]\nbase_algo = "lokrr"',
    "base_algo = boft: this algorithm of LyCORIS is not offered": '[network]\nbase_algo = "boft"',
    '[network.modules."*a*"] dim = 0: expected at least 1': '[network.modules."*a*"]\ndim = 0',
    "dim = 1.5: expected an integer": '[network.modules."*a*"]\ndim = 1.5',
    "base_factor = 0: expected -1 or at least 1": "[network]\nbase_factor = 0",
    "base_dim: use --network_dim": "[network]\nbase_dim = 4",
    "expected a table of options, got 4": '[network.modules]\n"*attn*" = 4',
    "modules: expected a table, got 'x'": '[network]\nmodules = "x"',
    "lokr_norm -1: expected a number above 0": '[network]\nbase_algo = "lokr"\n[network.init]\nlokr_norm = -1',
    "needs algo lokr; got loha": '[network]\nbase_algo = "loha"\n[network.init]\nlokr_norm = 0.1',
    "algo ia3 has no dora_wd": '[network]\nbase_algo = "ia3"\nbase_dora_wd = true',
    "not valid TOML": "[network",
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_bad_files(message, tmp_path: Path):
    with pytest.raises(UserError) as caught:
        read_lycoris_options(4, 1.0, lycoris_config=write(tmp_path, BAD_FILES[message]))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"algo": "lokr", "facter": "4"}, "--network_args: unknown key 'facter' (did you mean 'factor'?)"),
        ({"modules.*attn*.dimm": "4"}, "unknown key 'dimm' (did you mean 'dim'?)"),
        ({"algo": "full"}, "this algorithm of LyCORIS is not offered; expected one of lora, locon, loha, lokr, ia3"),
        ({"preset": "full"}, "which layers are adapted is chosen by --lora_target_preset"),
        ({"bypass_mode": "False"}, "leave it out"),
        ({"decompose_both": "nein"}, "expected True or False"),
        ({"dropout": "1.5"}, "expected a number in [0, 1)"),
        ({"lora_target_preset": "t3v"}, "t3v"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError) as caught:
        create_network(1.0, 4, 1.0, full_skeleton("2.0", "audio"), **arguments)
    assert message in str(caught.value)


def test_problems_are_told_together(tmp_path: Path):
    text = '[network]\nbase_algo = "x"\nbase_facter = 4\n[network.modules."*a*"]\ndim = 0'
    with pytest.raises(UserError) as caught:
        read_lycoris_options(4, 1.0, lycoris_config=write(tmp_path, text), oops="1")
    assert str(caught.value).count("\n  - ") == 4


def test_a_pattern_without_a_layer_is_told():
    with pytest.raises(UserError, match=r"'\*attn7\*': matches none of the 480 adapted layers"):
        create_network(
            1.0, 4, 1.0, full_skeleton("2.0", "audio"), lora_target_preset="audio", **{"modules.*attn7*.dim": 2}
        )


def test_a_missing_library_is_told(monkeypatch):
    monkeypatch.setattr(resolve, "_exists", lambda name: name != "lycoris")
    with pytest.raises(UserError, match=r'not installed; pip install "lycoris-lora>='):
        resolve_network_module("lycoris.kohya")


def test_the_library_is_imported_only_when_asked_for():
    """Nor those of the VAEs and the text encoder, which take seconds and are not for a run from caches."""
    code = (
        "import sys, musubi_tuner.training.run, musubi_tuner.generation.script\n"
        "print(*{'lycoris', 'diffusers', 'transformers'} & set(sys.modules), 'of those')"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "of those"


@pytest.mark.parametrize(
    ("algo", "decomposed"), [*itertools.product(["lora", "loha", "lokr"], [False, True]), ("ia3", False)]
)
def test_planned_sizes_have_the_parameters_of_the_network(algo: str, decomposed: bool):
    model = full_skeleton("2.3", "audio")
    shapes = {n: tuple(model.get_submodule(n).weight.shape) for n in linear_names(model)}
    arguments = {"lora_target_preset": "audio", "algo": algo, "factor": "8", "dora_wd": str(decomposed)}
    planned = planned_sizes(shapes, 16, 1.0, arguments)
    modules = create_network(1.0, 16, 1.0, model, **arguments).modules_by_name
    assert {name: params for name, (params, _) in planned.items()} == {
        name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()
    }
