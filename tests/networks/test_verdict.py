"""The verdict on a LoRA, and files that do not hold what they should."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from musubi_tuner.common.errors import UserError
from musubi_tuner.networks.files.formats import FORMATS
from musubi_tuner.networks.files.lora_file import LoraFile, LoraModule
from musubi_tuner.networks.files.lora_writer import save_lora
from musubi_tuner.networks.verdict import check_file, first_non_finite, measure

VIDEO = "transformer_blocks.0.attn1.to_q"
VIDEO_2 = "transformer_blocks.1.ff.net.2"
AUDIO = "transformer_blocks.0.audio_attn1.to_v"
CROSS = "transformer_blocks.1.audio_to_video_attn.to_k"


def factors(seed: int, *, rank: int = 4, size: tuple[int, int] = (12, 20), alpha: float = 3.0) -> LoraModule:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, size[1], generator=generator)
    return LoraModule(down, 1e-3 * torch.randn(size[0], rank, generator=generator), alpha)


def lora() -> LoraFile:
    still = LoraModule(torch.ones(2, 6), torch.zeros(8, 2), 1.0)
    return LoraFile({VIDEO: factors(1), VIDEO_2: still, AUDIO: factors(2, rank=2, alpha=8.0), CROSS: factors(3)}, {})


def test_norms_are_those_of_the_whole_deltas():
    modules = lora().modules
    verdict = measure(modules.items())
    for stream, names in {"video": (VIDEO, VIDEO_2), "audio": (AUDIO,), "cross": (CROSS,)}.items():
        deltas = torch.cat([modules[name].delta().flatten() for name in names])
        assert verdict.streams[stream].norm == pytest.approx(deltas.norm().item(), rel=1e-5)
        assert verdict.streams[stream].modules == len(names)
    assert {name: s.unchanged for name, s in verdict.streams.items()} == {"video": 1, "audio": 0, "cross": 0}


def test_streams_without_a_change_are_named():
    modules = {VIDEO: factors(1), AUDIO: LoraModule(torch.ones(2, 6), torch.zeros(8, 2))}
    verdict = measure(modules.items())
    assert verdict.untouched(("video", "audio")) == ["audio"]
    assert verdict.untouched(("video", "cross")) == ["cross"], "there is no such module at all"
    assert "audio 0 (1 modules, 1 unchanged)" in str(verdict)
    packed = json.loads(verdict.to_json())
    assert packed["modules"] == 2
    assert packed["streams"]["audio"] == {"modules": 1, "unchanged": 1, "norm": 0.0}


def test_the_first_tensor_that_is_not_finite():
    tensors = {"a": torch.ones(3), "count": torch.tensor(3), "b": torch.tensor([1.0, torch.inf]), "c": torch.ones(1)}
    assert first_non_finite(tensors.items()) == "b"
    assert first_non_finite([("a", torch.ones(3)), ("count", torch.tensor(3))]) is None
    tensors["a"][1] = torch.nan
    assert first_non_finite(tensors.items()) == "a"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", FORMATS)
def test_good_files_of_every_format_pass(tmp_path: Path, fmt: str, dtype: torch.dtype):
    made = lora()
    path = save_lora(made, tmp_path / "a.safetensors", fmt, dtype=dtype)
    check_file(path, made, measure(made.modules.items()))


def test_changes_too_small_for_half_precision_are_no_damage(tmp_path: Path):
    tiny = LoraFile({VIDEO: LoraModule(torch.rand(4, 64), torch.full((64, 4), 1e-9), 1.0)}, {})
    path = save_lora(tiny, tmp_path / "a.safetensors", "comfy", dtype=torch.float16)
    check_file(path, tiny, measure(tiny.modules.items()))


def _rename(tensors: dict[str, torch.Tensor]) -> None:
    for key in [k for k in tensors if "audio_attn1" in k]:
        tensors[key.replace("audio_attn1", "audio_attn2")] = tensors.pop(key)


def _foreign(tensors: dict[str, torch.Tensor]) -> None:
    tensors["something.else"] = torch.ones(1)


def _scale(tensors: dict[str, torch.Tensor]) -> None:
    key = next(k for k in tensors if "audio_attn1" in k and ("lora_up" in k or "lora_B" in k))
    tensors[key] *= 1.1


def _poison(tensors: dict[str, torch.Tensor]) -> None:
    key = next(k for k in tensors if "attn1" in k and k.endswith("weight"))
    tensors[key][0, 0] = torch.nan


def _shrink(tensors: dict[str, torch.Tensor]) -> None:
    for key in [k for k in tensors if "audio_attn1" in k and ("lora_down" in k or "lora_A" in k)]:
        tensors[key] = tensors[key][:, :-1].contiguous()


DAMAGE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None], str]] = {
    "module of another name": (_rename, "modules differ"),
    "key that maps to nothing": (_foreign, "something.else belongs to no module"),
    "another strength": (_scale, "the audio modules change by"),
    "not finite": (_poison, "NaN or infinity"),
    "another size": (_shrink, "modules differ"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("fmt", ["native", "comfy"])
def test_damaged_files_do_not_pass(tmp_path: Path, fmt: str, damage: Callable, message: str):
    made = lora()
    path = save_lora(made, tmp_path / "a.safetensors", fmt)
    tensors = load_file(path)
    damage(tensors)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)
    with pytest.raises(UserError, match=message):
        check_file(path, made, measure(made.modules.items()))


def test_a_file_that_does_not_pass_leaves_the_older_one(tmp_path: Path):
    first, second = lora(), LoraFile({VIDEO: factors(7)}, {})
    path = save_lora(first, tmp_path / "a.safetensors")
    before = path.read_bytes()

    def refuse(written: Path) -> None:
        assert len(load_file(written)) == 3, "the new file is complete when it is looked at"
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        save_lora(second, path, check=refuse)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
