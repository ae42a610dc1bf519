"""How long a run looks at its caches before the first batch, and what a batch costs beyond its bytes.

Writes a dataset of many cached clips (sources with captions, latents, sound and text, in the real file structure
with small tensors), then measures

* the start: configuration, discovery, check of the caches, and the batches of the first epoch, against opening
  every cache file once and reading its header;
* batches: reading and stacking, against reading the bytes of the same tensors into memory that is there already.
  Small tensors show what is not bandwidth; a few clips of real size (49 frames of 768x512 with sound, 1024 text
  tokens) show what is.

Everything has been read once before it is measured, so files come from the page cache. Times are the best of
``--rounds`` for the start, and lower quartiles over batches. The CPU time of the start beside its wall time tells how
much of it was waiting for other programs.

    python benchmarks/batch_loading.py --items 20000
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from musubi_tuner.common.av import AV
from musubi_tuner.common.safetensors_io import SafetensorsFile
from musubi_tuner.common.tables import format_table
from musubi_tuner.dataset.cache import CacheName, clip_base, write_audio, write_latents, write_text
from musubi_tuner.dataset.collate import load_batch
from musubi_tuner.dataset.discovery import discover
from musubi_tuner.dataset.fingerprint import EncoderIds, RepairCommands, check_caches, provenance
from musubi_tuner.dataset.frame_store import BlockPool
from musubi_tuner.dataset.items import EncoderRecord, TrainingSet
from musubi_tuner.dataset.loader import BatchLoader
from musubi_tuner.dataset.sampling import BatchPlan, BatchSpec
from musubi_tuner.dataset.schema import load_dataset_config

CAPTION = "A big grey rabbit yawns in a green meadow, then looks into the camera."
TOML = """
[general]
resolution = [{width}, {height}]
batch_size = {batch_size}
[[datasets]]
{source}
cache_directory = "cache"
target_frames = [{frames}]
"""


@dataclass(frozen=True)
class Shapes:
    """Of one clip's tensors."""

    size: tuple[int, int]
    frames: int
    steps: int
    tokens: int
    widths: AV[int]


SMALL = Shapes((64, 32), 9, 10, 8, AV(16, 8))
REAL = Shapes((768, 512), 49, 50, 1024, AV(4096, 2048))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=20_000, help="clips with small tensors")
    parser.add_argument("--real_items", type=int, default=48, help="clips of real size, about 27 MB each")
    parser.add_argument("--batches", type=int, default=500, help="batches that are timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where the files go (default: a temporary folder)")
    args = parser.parse_args()
    if min(args.items, args.real_items) < 8 or args.batches < 2:
        parser.error("expected at least 8 clips of each size and 2 batches")
    logging.disable(logging.CRITICAL)  # tables of the discovery
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        small = write_dataset(Path(folder) / "small", args.items, SMALL)
        print(format_table(*start_table(small, args.items, args.rounds)))
        real = write_dataset(Path(folder) / "real", args.real_items, REAL)
        rows = [batch_row(name, path, args.batches) for path, name in ((small, "small"), (real, "real size"))]
        rows = [row for rows_of_one in rows for row in rows_of_one]
        headers = ("tensors", "batch size", "bytes alone, ms", "batch, ms", "overhead, ms", "MB a batch")
        print(format_table(headers, rows))


# --- the files ----------------------------------------------------------------------------------------------


def write_dataset(folder: Path, items: int, shapes: Shapes) -> Path:
    """A folder of sources and one of caches; every clip has the bytes of the first."""
    media, cache = folder / "media", folder / "cache"
    media.mkdir(parents=True)
    cache.mkdir()
    (media / "00000.mp4").write_bytes(b"not decoded")
    contents = template(media / "00000.mp4", cache, shapes)
    lines = []
    for index in range(items):
        stem = f"{index:05d}"
        (media / f"{stem}.mp4").write_bytes(b"not decoded")
        (media / f"{stem}.txt").write_text(CAPTION, encoding="utf-8")
        lines.append(f'{{"video_path": "media/{stem}.mp4", "caption": "{CAPTION}"}}\n')
        for name, content in contents.items():
            (cache / name.replace("00000", stem, 1)).write_bytes(content)
    (folder / "list.jsonl").write_text("".join(lines), encoding="utf-8")
    if hasattr(os, "sync"):
        os.sync()  # else the disk is still busy with them while they are read
    return folder


def template(media: Path, cache: Path, shapes: Shapes) -> dict[str, bytes]:
    """File name to bytes of the first clip, as the caching scripts write them."""
    width, height = shapes.size
    clip = {
        "bucket": f"{width}x{height}",
        "target_fps": 25.0,
        "source_fps": None,
        "start_frame": 0,
        "frames": shapes.frames,
        "dtype": "bfloat16",
    }
    base = CacheName(clip_base(media.stem, 0, shapes.frames), "latents", shapes.size)
    grid = ((shapes.frames - 1) // 8 + 1, height // 32, width // 32)
    write_latents(
        cache / str(base),
        torch.randn(128, *grid).bfloat16(),
        provenance(media, EncoderRecord("v"), clip) | {"frame_extraction": "head"},
        frame_count=shapes.frames,
    )
    sound = torch.randn(8, shapes.steps, 16).half()
    write_audio(cache / str(base.sibling("audio")), sound, provenance(media, EncoderRecord("a"), clip))
    write_text(
        cache / str(CacheName(media.stem, "text")),
        shapes.widths.map(lambda width: torch.randn(shapes.tokens, width).bfloat16()),
        torch.ones(shapes.tokens),
        provenance(media, EncoderRecord("t"), {"caption": CAPTION}) | {"ltx2_mode": "av"},
        caption=CAPTION,
    )
    return {path.name: path.read_bytes() for path in cache.iterdir()}


# --- the start ----------------------------------------------------------------------------------------------


def start_table(folder: Path, items: int, rounds: int) -> tuple[tuple[str, ...], list[list[object]]]:
    files = sorted((folder / "cache").iterdir())
    rows: list[list[object]] = []
    for name, source in (("folder", 'video_directory = "media"'), ("JSONL list", 'video_jsonl_file = "list.jsonl"')):
        seconds = best(lambda source=source: start(folder, source, 1, SMALL), rounds)
        rows.append([name, items, len(files), *seconds])
    rows.append(["opening every file", items, len(files), *best(lambda: [read_start(f) for f in files], rounds)])
    return ("start from a", "clips", "cache files", "s to the first batches", "of it CPU"), rows


def start(folder: Path, source: str, batch_size: int, shapes: Shapes) -> TrainingSet:
    """All that training does with its data before the first batch."""
    path = folder / "data.toml"
    width, height = shapes.size
    path.write_text(
        TOML.format(source=source, batch_size=batch_size, frames=shapes.frames, width=width, height=height),
        encoding="utf-8",
    )
    training_set = discover(load_dataset_config(path, need_sources=False), "av")
    commands = RepairCommands(path, Path("ltx2.safetensors"), "av")
    check_caches(training_set, encoders=EncoderIds("v", "a", "t"), commands=commands, text_widths=shapes.widths)
    plan = BatchPlan(training_set, seed=0)
    assert next(iter(plan.for_epoch(0)))
    BatchLoader(plan)
    return training_set


def read_start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4096)


# --- batches ------------------------------------------------------------------------------------------------


def batch_row(name: str, folder: Path, batches: int) -> Iterator[list[object]]:
    shapes = SMALL if name == "small" else REAL
    for batch_size in (1, 4):
        training_set = start(folder, 'video_directory = "media"', batch_size, shapes)
        specs = BatchPlan(training_set, seed=0).for_epoch(0)[:batches]
        pool = BlockPool()
        reader = BytesReader(training_set)
        ways = {"batch": lambda spec: load_batch(training_set, spec, pool), "bytes": reader.read}  # noqa: B023
        times: dict[str, list[float]] = {way: [] for way in ways}
        for way in ways.values():  # once, so that the files are in the page cache
            way(specs[0])
        for spec in specs:
            for way in (*ways, *ways):  # in turn, each twice; the second is warm
                begin = time.perf_counter()
                ways[way](spec)
                times[way].append(time.perf_counter() - begin)
        whole, alone = (1e3 * statistics.quantiles(times[way][1::2])[0] for way in ("batch", "bytes"))
        size = reader.read(specs[0]) / 1e6
        yield [name, batch_size, f"{alone:.2f}", f"{whole:.2f}", f"{whole - alone:.2f}", f"{size:.2f}"]


class BytesReader:
    """Reads the bytes of a batch's tensors into memory that it has already; where they lie is known beforehand."""

    def __init__(self, training_set: TrainingSet) -> None:
        self._items = training_set.datasets[0].items
        self._ranges: dict[Path, list[tuple[int, int]]] = {}
        self._memory: dict[tuple[int, int, int], bytearray] = {}

    def read(self, spec: BatchSpec) -> int:
        """Bytes read."""
        total = 0
        for row, (position, _) in enumerate(spec.samples):
            item = self._items[position]
            for which, path in enumerate((item.latents, item.audio, item.text)):
                with path.open("rb", buffering=0) as file:
                    for place, (begin, size) in enumerate(self._used(path)):
                        file.seek(begin)
                        total += file.readinto(self._memory.setdefault((row, which, place), bytearray(size)))
        return total

    def _used(self, path: Path) -> list[tuple[int, int]]:
        if path not in self._ranges:
            tensors = SafetensorsFile(path).tensors
            # text_* repeats the embeddings, for older readers
            self._ranges[path] = [(t.start, t.nbytes) for key, t in tensors.items() if not key.startswith("text_")]
        return self._ranges[path]


def best(work: Callable[[], object], rounds: int) -> tuple[str, str]:
    """Seconds of the fastest round, by the wall and of the CPU."""
    seconds = []
    for _ in range(rounds):
        begin, cpu = time.perf_counter(), time.process_time()
        work()
        seconds.append((time.perf_counter() - begin, time.process_time() - cpu))
    wall, cpu = min(seconds)
    return f"{wall:.2f}", f"{cpu:.2f}"


if __name__ == "__main__":
    main()
