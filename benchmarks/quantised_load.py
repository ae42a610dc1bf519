"""Peak memory and speed of quantising a big checkpoint while it is loaded, and of doing so once and for all.

Writes a synthetic bf16 file in the official layout with as many blocks as fit, then, each in a process of its own:

* loads the transformer dense, in FP8 and in NF4;
* writes the NF4 file and loads that.

What counts is the peak of the process's own memory over what it had before, against the bytes that it keeps; pages of
files in the system's cache are not its own. ``--limit_gb`` runs each process under that limit of its address space's
data (Linux), which a loader that holds the file cannot meet.

    python benchmarks/quantised_load.py --size_gb 8 --limit_gb 6
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
from musubi_tuner.models.checkpoint import Checkpoint
from musubi_tuner.models.ltx2.config import TransformerConfig
from musubi_tuner.models.ltx2.load import build_transformer, load_transformer
from musubi_tuner.models.ltx2.quantize import Quantization
from musubi_tuner.models.ltx2.quantize_file import quantize_file
from musubi_tuner.quantization.packed import Nf4

REQUESTS = {
    "dense": None,
    "fp8": Quantization("fp8", requantise=True),
    "nf4": Quantization("nf4"),
    "write nf4": None,
    "nf4 from its file": Quantization("nf4"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size_gb", type=float, default=8.0, help="size of the synthetic file")
    parser.add_argument("--limit_gb", type=float, default=None, help="memory that a process may have, but for dense")
    parser.add_argument("--folder", type=Path, default=None, help="where files are written (default: a temporary one)")
    parser.add_argument("--one", choices=REQUESTS, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(measure(args.one, args.file, args.limit_gb)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "synthetic.safetensors"
        write_synthetic(path, args.size_gb * GB)
        report(path, args.limit_gb)


def nf4_path(path: Path) -> Path:
    return path.with_name("synthetic-nf4.safetensors")


def work(name: str, path: Path) -> int:
    """Do one of the things measured; bytes that stay in memory."""
    if name == "write nf4":
        quantize_file(path, nf4_path(path), method=Nf4(), device="cpu")
        return 0
    source = nf4_path(path) if name == "nf4 from its file" else path
    model = load_transformer(
        Checkpoint.open(source), mode="av", dtype=torch.bfloat16, device="cpu", quantization=REQUESTS[name]
    )
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def measure(name: str, path: Path, limit_gb: float | None) -> dict[str, float]:
    """Bytes kept, peak bytes above the start, seconds."""
    torch.ones(8).sum()  # what torch allocates for its first operation and model is not the loader's
    build_transformer(TransformerConfig(num_layers=1), "video")
    kept, found = measured(lambda: work(name, path), limit_gb=None if name == "dense" else limit_gb)
    return {"kept": kept, **found}


def report(path: Path, limit_gb: float | None) -> None:
    size, rows = path.stat().st_size, []
    with path.open("rb+", buffering=0) as file:
        os.fsync(file.fileno())  # or the first one measured shares the disk with the writing
    for name in REQUESTS:
        command = [sys.executable, __file__, "--one", name, "--file", str(path)]
        command += [] if limit_gb is None else ["--limit_gb", str(limit_gb)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        run = json.loads(done.stdout)
        print(name, run, file=sys.stderr)
        rows.append(
            [
                name,
                f"{run['kept'] / GB:.2f} GB",
                f"{run['peak'] / GB:.2f} GB",
                f"{(run['peak'] - run['kept']) / GB:.2f} GB",
                f"{run['seconds']:.1f} s",
                f"{size / GB / run['seconds']:.2f} GB/s",
            ]
        )
    limit = "" if limit_gb is None else f", limit {limit_gb:g} GB but for dense"
    title = f"transformer out of a file of {size / GB:.2f} GB, on {torch.get_num_threads()} threads{limit}"
    print(format_table(["what", "kept", "peak", "peak - kept", "time", "file / time"], rows, title))


if __name__ == "__main__":
    main()
