"""Peak memory and speed of loading a third of a big checkpoint.

Writes a synthetic file in the official single-file layout (transformer of both streams and the other sections,
bf16), then loads the video-only transformer from it, each way in a process of its own:

* ours: header, then only the wanted tensors, read into their final memory;
* safetensors: ``safetensors.torch.load_file``, then the wanted tensors are kept and the rest is dropped.

The peak is that of the resident set over what the process had before loading; pages of a mapped file count,
as they do for the limits of a container. The file is on the disk and has been read once before anything is
measured, so both read from the page cache where that is large enough. Times are the best of three.

    python benchmarks/load_checkpoint.py --size_gb 4
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from resident import GB, measured

from musubi_tuner.common.safetensors_io import write_streamed
from musubi_tuner.common.tables import format_table
from musubi_tuner.models.checkpoint import Checkpoint
from musubi_tuner.models.ltx2.config import TransformerConfig
from musubi_tuner.models.ltx2.keys import in_mode, transformer_keys
from musubi_tuner.models.ltx2.load import build_transformer, load_transformer

REPEATS = 3
PREFIX = "model.diffusion_model."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size_gb", type=float, default=4.0, help="size of the synthetic file")
    parser.add_argument("--folder", type=Path, default=None, help="where it is written (default: a temporary one)")
    parser.add_argument("--one", choices=WAYS, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(measure(WAYS[args.one], args.file)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "synthetic.safetensors"
        write_synthetic(path, args.size_gb * GB)
        report(path)


def write_synthetic(path: Path, size: float) -> None:
    """A 2.3 transformer with as many blocks as fit, then tensors of the other sections in true proportion."""
    config = TransformerConfig(
        apply_gated_attention=True, cross_attention_adaln=True, caption_proj_before_connector=True
    )
    one, two = (
        sum(p.numel() * 2 for p in build_transformer(replace(config, num_layers=n), "av").parameters()) for n in (1, 2)
    )
    others = 0.18 * size  # connectors, text projection, VAEs, vocoder: 7 of 46 GB, and what a block leaves over
    layers = max(1, int((size - others - one) // (two - one)) + 1)
    model = build_transformer(replace(config, num_layers=layers), "av")
    infos = {PREFIX + name: (torch.bfloat16, tuple(p.shape)) for name, p in model.named_parameters()}
    chunk = (4096, 4096)
    for index in range(int(others // (2 * chunk[0] * chunk[1]))):
        infos[f"vae.encoder.filler.{index}"] = (torch.bfloat16, chunk)
    pool = torch.randn(2**22).bfloat16()  # cheap to repeat, and no file system stores it as a hole

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, (_, shape) in infos.items():
            count = torch.Size(shape).numel()
            yield name, pool.repeat(-(-count // pool.numel()))[:count].view(shape)

    section = {
        "num_layers": layers,
        "apply_gated_attention": True,
        "cross_attention_adaln": True,
        "caption_proj_before_connector": True,
    }
    write_streamed(path, infos, tensors(), {"config": json.dumps({"transformer": section})})


def load_ours(path: Path) -> int:
    model = load_transformer(Checkpoint.open(path), mode="video", dtype=torch.bfloat16, device="cpu")
    return sum(p.nbytes for p in model.parameters())


def load_safetensors(path: Path) -> int:
    from safetensors.torch import load_file

    tensors = load_file(path)
    wanted = {key for name, key in transformer_keys(tensors).items() if in_mode(name, "video")}
    # Touch what is kept: a mapped tensor is not in memory before it is used.
    kept = {key: tensors.pop(key).clone() for key in list(tensors) if key in wanted}
    return sum(tensor.nbytes for tensor in kept.values())


WAYS = {"ours": load_ours, "safetensors": load_safetensors}


def measure(load: Callable[[Path], int], path: Path) -> dict[str, float]:
    """Bytes kept, peak resident bytes above the start, seconds."""
    # What torch imports and allocates for the first operation and the first model is not the loader's.
    torch.ones(8).sum()
    build_transformer(TransformerConfig(num_layers=1), "video")
    kept, found = measured(lambda: load(path))
    return {"kept": kept, **found}


def report(path: Path) -> None:
    with path.open("rb+", buffering=0) as file:
        os.fsync(file.fileno())  # or the first one measured shares the disk with the writing
        buffer = bytearray(2**24)
        while file.readinto(buffer):
            pass
    rows = []
    for way in WAYS:
        command = [sys.executable, __file__, "--one", way, "--file", str(path)]
        runs = [
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            for _ in range(REPEATS)
        ]
        kept, peak = runs[0]["kept"], max(run["peak"] for run in runs)
        seconds = min(run["seconds"] for run in runs)
        rows.append(
            [
                way,
                f"{kept / GB:.2f} GB",
                f"{peak / GB:.2f} GB",
                f"{peak / kept:.2f}",
                f"{seconds:.2f} s",
                f"{kept / GB / seconds:.2f} GB/s",
            ]
        )
    title = f"video-only transformer out of a file of {path.stat().st_size / GB:.2f} GB"
    print(format_table(["loader", "kept", "peak", "peak / kept", "time", "rate of kept"], rows, title))


if __name__ == "__main__":
    main()
