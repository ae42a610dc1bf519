"""What loading answers to a checkpoint that is quantised already, by what is asked for; part of the page of pairs."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from memory_models import CPU
from safetensors.torch import save_file

from musubi_tuner.assembly.quantization import quantization_settings
from musubi_tuner.cli.parser import parse
from musubi_tuner.common.errors import UserError
from musubi_tuner.config.training import TrainNetworkConfig
from musubi_tuner.models.checkpoint import Checkpoint
from musubi_tuner.models.ltx2.quantize import check_quantization, plan_weights, quantize_plainly
from musubi_tuner.models.ltx2.quantize_file import Alternation, quantize_file
from musubi_tuner.quantization.fp8 import quantize_fp8
from musubi_tuner.quantization.packed import Int8, Nf4
from musubi_tuner.quantization.stored import OwnBase

ASKED = (
    "",
    "--fp8_base",
    "--fp8_base --fp8_scaled",
    "--fp8_base --fp8_w8a8",
    "--int8_base",
    "--nf4_base",
    "--nf4_base --awq_calibration",
    "--nf4_base --loftq_init --network_dim 8",
)
KINDS = ("bf16", "FP8", "int8", "NF4", "NF4 of `--loftq_own_base`, rank 8")

_LAYER = "transformer_blocks.0.attn1.to_q"
_PREFIX = "model.diffusion_model."


def answer(file: Path, asked: str) -> str:
    """What becomes of the weights of a file, or the message that refuses it."""
    config = parse(TrainNetworkConfig, asked.split(), prog="x", description="").config
    quantization = quantization_settings(config.quantization, CPU, config.calibration)
    checkpoint = Checkpoint.open(file)
    try:
        stored = check_quantization(checkpoint, quantization)
    except UserError as error:
        return f"refused: `{str(error).replace(str(file), 'FILE')}`"
    infos = {f"{_LAYER}.weight": checkpoint.tensors[f"{_PREFIX}{_LAYER}.weight"]}
    plan = plan_weights(stored, infos, quantization, file.name)
    if plan.quantised:
        return "quantised while it is loaded"
    return "as they are" if plan.kept or stored.kind == "dense" else "made dense, with a warning"


def write(folder: Path, kind: str) -> Path:
    """A checkpoint of one weight."""
    file, dense = folder / f"{KINDS.index(kind)}.safetensors", folder / "dense.safetensors"
    weight = torch.ones(64, 64, dtype=torch.bfloat16)
    save_file({f"{_PREFIX}{_LAYER}.weight": weight}, dense)
    if kind == "bf16":
        return dense
    if kind == "FP8":
        quantised, scale = quantize_fp8(weight, (1, 1))
        names = (f"{_PREFIX}{_LAYER}.weight", f"{_PREFIX}{_LAYER}.weight_scale")
        save_file(dict(zip(names, (quantised, scale.reshape(())), strict=True)), file)
        return file
    alternation = Alternation(OwnBase(8, 2), (), quantize_plainly) if "own_base" in kind else None
    quantize_file(dense, file, method=Int8() if kind == "int8" else Nf4(), device=CPU, alternation=alternation)
    return file


def table() -> list[str]:
    """Lines of the page: what is asked for, by the kinds of files; what is answered alike is in one row."""
    found: dict[tuple[str, str], list[str]] = {}
    with tempfile.TemporaryDirectory() as name:
        for kind in KINDS:
            file = write(Path(name), kind)
            for asked in ASKED:
                found.setdefault((kind, answer(file, asked)), []).append(f"`{asked}`" if asked else "nothing")
    rows = [f"| {kind} | {', '.join(asked)} | {said} |" for (kind, said), asked in found.items()]
    return ["| weights of the file | asked for | answer |", "|---|---|---|", *rows]
