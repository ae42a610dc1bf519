"""Peak memory and speed of merging LoRAs into a big checkpoint, and of extracting one from two.

Writes a synthetic bf16 checkpoint of the size asked for and a LoRA of every attention layer, then, each in a process
of its own: merges it into bf16 and into FP8, merges it into that FP8 file, and merges two LoRAs. What counts is the
peak of the process's own memory over what it had before, against the largest weight in float32. ``--extract`` also
extracts the LoRA again, which takes minutes on a CPU.

    python benchmarks/merge_memory.py --size_gb 2 --limit_gb 1
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from load_checkpoint import write_synthetic
from resident import GB, measured

from musubi_tuner.common.tables import format_table
from musubi_tuner.networks.base_weights import BaseWeights
from musubi_tuner.networks.file_tools.extract import RankRule, extract_lora
from musubi_tuner.networks.file_tools.merge import concat_method, merge_loras
from musubi_tuner.networks.file_tools.merge_model import merge_into_model
from musubi_tuner.networks.files.lora_file import LoraModule, ModuleInfo
from musubi_tuner.networks.files.lora_reader import LoraReader
from musubi_tuner.networks.files.lora_writer import write_lora
from musubi_tuner.networks.targets import select_targets

RANK = 32


def write_lora_for(base: Path, path: Path) -> None:
    """A LoRA of the attention layers of a checkpoint, as large as a trained one."""
    shapes = BaseWeights(base).weights()
    infos = {n: ModuleInfo(RANK, shapes[n][1], shapes[n][0], torch.bfloat16) for n in select_targets(shapes)}

    def produce(name: str) -> LoraModule:
        info = infos[name]
        down, up = torch.randn(RANK, info.in_features), torch.randn(info.out_features, RANK)
        return LoraModule(down.bfloat16(), (up * 0.1).bfloat16())

    write_lora(path, "native", infos, produce, metadata={})


def work(name: str, folder: Path) -> Path:
    """Do one of the things measured; the file that it wrote."""
    base, fp8, lora = folder / "base.safetensors", folder / "fp8.safetensors", LoraReader(folder / "lora.safetensors")
    target = folder / f"{name.replace(' ', '-')}.safetensors"
    if name == "bf16 + LoRA":
        merge_into_model(base, [(lora, 1.0)], target)
    elif name == "bf16 + 2 LoRAs":
        merge_into_model(base, [(lora, 1.0), (lora, -0.5)], target)
    elif name == "bf16 + LoRA to fp8":
        target = fp8
        merge_into_model(base, [(lora, 1.0)], target, output="fp8")
    elif name == "fp8 + LoRA":
        merge_into_model(fp8, [(lora, 1.0)], target)
    elif name == "LoRA + LoRA":
        merge_loras([lora.path, lora.path], target, concat_method())
    else:
        extract_lora(base, folder / "bf16-+-LoRA.safetensors", [(target, "native")], RankRule(RANK))
    return target


def measure(name: str, folder: Path, limit_gb: float | None) -> dict[str, float]:
    """Bytes written, peak bytes above the start, seconds."""
    torch.ones(8, 8) @ torch.ones(8, 8)
    target, found = measured(lambda: work(name, folder), limit_gb=limit_gb)
    return {"size": target.stat().st_size, **found}


def main() -> None:
    names = ["bf16 + LoRA", "bf16 + 2 LoRAs", "bf16 + LoRA to fp8", "fp8 + LoRA", "LoRA + LoRA", "extract"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size_gb", type=float, default=4.0, help="size of the synthetic checkpoint")
    parser.add_argument("--limit_gb", type=float, default=None, help="memory that a process may have")
    parser.add_argument("--extract", action="store_true", help="also extract the LoRA")
    parser.add_argument("--folder", type=Path, default=None, help="where files are written (default: a temporary one)")
    parser.add_argument("--one", choices=names, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(measure(args.one, args.folder, args.limit_gb)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        base = folder / "base.safetensors"
        write_synthetic(base, args.size_gb * GB)
        write_lora_for(base, folder / "lora.safetensors")
        for path in folder.iterdir():
            with path.open("rb+", buffering=0) as file:
                os.fsync(file.fileno())
        report(folder, [n for n in names if args.extract or n != "extract"], args.limit_gb)


def report(folder: Path, names: list[str], limit_gb: float | None) -> None:
    rows = []
    for name in names:
        command = [sys.executable, __file__, "--one", name, "--folder", str(folder)]
        command += [] if limit_gb is None else ["--limit_gb", str(limit_gb)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        run = json.loads(done.stdout)
        size, peak = f"{run['size'] / GB:.2f} GB", f"{run['peak'] / GB:.2f} GB"
        rows.append([name, size, peak, f"{run['seconds']:.1f} s"])
    weights = BaseWeights(folder / "base.safetensors").weights()
    largest = 4 * max(n * k for n, k in weights.values())
    size = (folder / "base.safetensors").stat().st_size
    limit = "" if limit_gb is None else f", limit {limit_gb:g} GB"
    title = f"a checkpoint of {size / GB:.2f} GB, largest weight {largest / GB:.2f} GB in float32{limit}"
    print(format_table(["what", "written", "peak", "time"], rows, title))


if __name__ == "__main__":
    main()
