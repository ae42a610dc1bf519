"""Decoding, resizing and cutting of clips against plain decoding of the same files with PyAV.

Contenders, each over all files:

- decode: PyAV, frames are decoded and dropped
- plain: PyAV, ``frame.to_ndarray(format="rgb24")`` of each frame at its own size
- full frame: plain, then ``cv2.resize(..., INTER_AREA)`` to cover the bucket and a cut: the obvious pipeline
- ours: what the latent caching does: conversion, resize, cut, clips as arrays; the
  frame rate is given, so the times of the frames are not read beforehand

Every contender decodes all frames with one decoder thread; frames are counted at the source. Contenders take
turns in every round. With several workers the files are shared among threads, as the caching does it.

    python benchmarks/media_pipeline.py                          # 720p H.264, rendered
    python benchmarks/media_pipeline.py --size 1920x1080
    python benchmarks/media_pipeline.py --clips my_videos --bucket 768x448 --workers 1 2 4

"Frames per second and core" counts processor time of the process, which other programs on the machine disturb
less than elapsed time; the best round counts.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import av
import cv2
import numpy as np

from musubi_tuner.caching.pipeline import Failed, read_ahead
from musubi_tuner.common.tables import format_table
from musubi_tuner.dataset.clips import iter_clips
from musubi_tuner.dataset.entries import DatasetEntry
from musubi_tuner.dataset.frame_store import BlockPool
from musubi_tuner.dataset.resize import resize_to_bucket
from musubi_tuner.dataset.sources import SourceItem

SUFFIXES = (".mp4", ".mkv", ".mov", ".webm")
CLIP_FRAMES = 41


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, help="a video or a folder of videos (default: four rendered ones)")
    parser.add_argument("--size", default="1280x720", help="WIDTHxHEIGHT of the rendered videos")
    parser.add_argument("--bucket", nargs="+", default=["960x544", "768x448", "640x352"], help="WIDTHxHEIGHT")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.clips is None:
            files = [render(Path(folder) / f"{seed}.mp4", seed, parse_size(args.size)) for seed in range(4)]
        elif args.clips.is_dir():
            files = sorted(path for path in args.clips.iterdir() if path.suffix.lower() in SUFFIXES)
        else:
            files = [args.clips] * 4
        print(f"PyAV {av.__version__}, OpenCV {cv2.__version__}, numpy {np.__version__}, {platform.machine()}")
        print(describe(files))
        buckets = [parse_size(text) for text in args.bucket]
        for workers in args.workers:
            rows = compare(files, buckets, workers, args.rounds)
            headers = ["contender", "ms/frame (CPU)", "frames/s and core", "of plain", "frames/s", "of plain"]
            print(format_table(headers, rows, title=f"{workers} worker(s)"))


def parse_size(text: str) -> tuple[int, int]:
    width, height = text.split("x")
    return int(width), int(height)


def render(path: Path, seed: int, size: tuple[int, int], frames: int = 3 * CLIP_FRAMES) -> Path:
    """A slow pan over a soft texture with film grain, 720p at about 6 Mbit/s; less grain decodes faster."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (60, 100, 3), np.uint8)
    scene = cv2.resize(coarse, (size[0] + 2 * frames, size[1] + frames), interpolation=cv2.INTER_CUBIC)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"crf": "20", "preset": "medium"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for index in range(frames):
            view = scene[index : index + size[1], 2 * index : 2 * index + size[0]]
            grain = generator.integers(-8, 9, (*view.shape[:2], 1))
            picture = np.clip(view + grain, 0, 255).astype(np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
    return path


def describe(files: list[Path]) -> str:
    with av.open(str(files[0])) as container:
        stream = container.streams.video[0]
        rate = (stream.bit_rate or container.bit_rate or 0) / 1e6
        return (
            f"{len(files)} files, the first: {stream.width}x{stream.height} {stream.codec_context.name}, "
            f"{float(stream.average_rate or 0):.2f} fps, {rate:.1f} Mbit/s"
        )


# --- contenders ---------------------------------------------------------------------------------------------


def decoded(path: Path) -> Iterator[av.VideoFrame]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        yield from container.decode(stream)


def decode(path: Path) -> None:
    for _ in decoded(path):
        pass


def plain(path: Path) -> None:
    for frame in decoded(path):
        frame.to_ndarray(format="rgb24")


def full_frame(path: Path, bucket: tuple[int, int]) -> None:
    clip = []
    for frame in decoded(path):
        clip.append(resize_to_bucket(frame.to_ndarray(format="rgb24"), bucket))
        if len(clip) == CLIP_FRAMES:
            np.stack(clip)
            clip = []


def ours(path: Path, bucket: tuple[int, int], pool: BlockPool) -> Iterator[int]:
    folder = path.parent
    entry = DatasetEntry(
        *("benchmark", "video", folder, folder),
        resolution=bucket,
        target_frames=(CLIP_FRAMES,),
        frame_extraction="chunk",
        source_fps=25.0,  # every frame is used, so that all do the same number
    )
    for clip in iter_clips(SourceItem(path, path.stem, "", "video"), entry, with_audio=False, pool=pool):
        yield len(clip.pixels)


def in_threads(work: Callable[[Path], None]) -> Callable[[list[Path], int], None]:
    def run(files: list[Path], workers: int) -> None:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(work, files))

    return run


def our_pipeline(bucket: tuple[int, int]) -> Callable[[list[Path], int], None]:
    pool = BlockPool()  # as in a long run, of which every round is a part

    def run(files: list[Path], workers: int) -> None:
        for _, results in read_ahead(files, lambda path: ours(path, bucket, pool), workers=workers):
            for result in results:
                if isinstance(result, Failed):
                    raise result.error

    return run


# --- measuring ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Seconds per frame."""

    processor: float
    elapsed: float


def compare(files: list[Path], buckets: list[tuple[int, int]], workers: int, rounds: int) -> list[list[object]]:
    contenders = {"decode": in_threads(decode), "plain": in_threads(plain)}
    for bucket in buckets:
        name = f"{bucket[0]}x{bucket[1]}"
        contenders[f"full frame, {name}"] = in_threads(lambda path, bucket=bucket: full_frame(path, bucket))
        contenders[f"ours, {name}"] = our_pipeline(bucket)
    frames = sum(sum(1 for _ in decoded(path)) for path in files)
    costs: dict[str, list[Cost]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            costs[name].append(measure(run, files, workers, frames))
    best = {name: Cost(min(c.processor for c in all_), min(c.elapsed for c in all_)) for name, all_ in costs.items()}
    base = best["plain"]
    return [
        [
            name,
            f"{cost.processor * 1e3:.2f}",
            f"{1 / cost.processor:.0f}",
            f"{base.processor / cost.processor:.2f}",
            f"{1 / cost.elapsed:.0f}",
            f"{base.elapsed / cost.elapsed:.2f}",
        ]
        for name, cost in best.items()
    ]


def measure(run: Callable[[list[Path], int], None], files: list[Path], workers: int, frames: int) -> Cost:
    processor, elapsed = time.process_time(), time.perf_counter()
    run(files, workers)
    return Cost((time.process_time() - processor) / frames, (time.perf_counter() - elapsed) / frames)


if __name__ == "__main__":
    main()
