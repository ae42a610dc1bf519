"""What both caching scripts share: reading ahead, keeping what is current, orphans and the summary."""

from __future__ import annotations

import errno
import logging
import os
import queue
import threading
import time
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from musubi_tuner.common.atomic import is_partial
from musubi_tuner.common.errors import ConfigErrors, UserError
from musubi_tuner.common.safetensors_io import SafetensorsFile, save_safetensors
from musubi_tuner.common.tables import count_text, format_table
from musubi_tuner.dataset.cache import EXTRACTION_KEY, PREPARATION_KEY, CacheKind, CacheName, list_caches
from musubi_tuner.dataset.companion_rules import CACHE_DIRECTORIES
from musubi_tuner.dataset.entries import DatasetConfig
from musubi_tuner.dataset.fingerprint import stale_reason
from musubi_tuner.dataset.sources import Problem, summarize_problems

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

STALL_SECONDS = 60.0  # after which a file that is still being read is named
MISSING = "missing"
_ABANDONED_SECONDS = 600.0  # after which no process is still writing a partial file
_MOST_WORKERS = 8  # by default; each holds a decoded clip or two
_FAILURES_SHOWN = 20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out; nothing here changes what is in the files."""

    batch_size: int | None = None  # None: the dataset's
    workers: int | None = None  # None: by the CPUs
    skip_existing: bool = False
    keep_cache: bool = False
    strict: bool = False  # stop at the first failure


# --- reading ahead ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failed:
    """The work on one item ended with this error."""

    error: Exception


def default_workers() -> int:
    """Threads that decode ahead when none are asked for."""
    return max(1, min((os.cpu_count() or 2) - 1, _MOST_WORKERS))


def read_ahead(
    items: Iterable[T], work: Callable[[T], Iterable[R]], *, workers: int, describe: Callable[[T], str] = str
) -> Iterator[tuple[T, Iterator[R | Failed]]]:
    """Run ``work`` for several items at once in threads and yield the results in the order of the items.

    Each item is working into a queue of one result, so at most ``2 * workers`` results are held however far
    the consumer lags behind. An exception ends its item only, as a last result :class:`Failed`. The results of
    an item must be taken before the next item is.
    """
    stop = threading.Event()
    running: deque[tuple[T, _Stream[R]]] = deque()
    remaining = iter(items)
    try:
        while True:
            while len(running) < max(workers, 1) and (item := next(remaining, _END)) is not _END:
                running.append((item, _Stream(item, work, stop)))  # type: ignore[arg-type]
            if not running:
                return
            item, stream = running.popleft()
            yield item, stream.results(describe(item))
    finally:
        stop.set()


_END = object()


class _Stream(Generic[R]):
    """Results of one item, made in a thread. The thread is a daemon: a decoder that hangs cannot hold the exit."""

    def __init__(self, item: T, work: Callable[[T], Iterable[R]], stop: threading.Event) -> None:
        self._queue: queue.Queue = queue.Queue(maxsize=1)
        self._stop = stop
        threading.Thread(target=self._run, args=(item, work), daemon=True).start()

    def _run(self, item: T, work: Callable[[T], Iterable[R]]) -> None:
        try:
            for result in work(item):
                if not self._put(result):
                    return
        except Exception as error:
            self._put(Failed(error))
        self._put(_END)

    def _put(self, value: object) -> bool:
        """Wait for room; ``False`` when the consumer has gone."""
        while not self._stop.is_set():
            try:
                self._queue.put(value, timeout=0.5)
                return True
            except queue.Full:
                continue
        return False

    def results(self, name: str) -> Iterator[R | Failed]:
        waited = 0.0
        while True:
            try:
                value = self._queue.get(timeout=STALL_SECONDS)
            except queue.Empty:
                waited += STALL_SECONDS
                logger.warning("still reading %s after %.0f s", name, waited)
                continue
            if value is _END:
                return
            yield value
            waited = 0.0


# --- where the files go ------------------------------------------------------------------------------------


def prepare_directories(config: DatasetConfig) -> None:
    """Make the cache directories, also of references, of all datasets that have sources.

    Raises:
        ConfigErrors: those that cannot be written to.
    """
    problems = []
    for entry in config.entries():
        for name in ("cache_directory", *CACHE_DIRECTORIES) if entry.source is not None else ():
            directory: Path | None = getattr(entry, name)
            reason = None if directory is None else _unwritable(directory)
            if reason is not None:
                problems.append(f"{entry.label}.{name}: {directory} ({reason})")
    if problems:
        raise ConfigErrors(problems, f"{config.path}: cache directories that cannot be written; choose others")


def _unwritable(directory: Path) -> str | None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".write_test-{uuid.uuid4().hex[:8]}"  # another run may be trying the same
        probe.touch()
        probe.unlink()
    except OSError as error:
        return error.strerror
    return None


def stop_if_full(error: Exception, directory: Path) -> None:
    """Raise when no file can be written any more, whatever the item: a full disk ends the run."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        raise UserError(
            f"{directory}: {error.strerror}; make room or choose another cache_directory, then continue with "
            "--skip_existing"
        ) from error


def remove_partial(directory: Path, kinds: Collection[CacheKind]) -> None:
    """Delete what an interrupted run left half-written.

    What was written to a moment ago stays: another run may be at work in the same folder. A file takes seconds.
    """
    leftovers = [path for path in directory.iterdir() if is_partial(path)] if directory.is_dir() else []
    for path in leftovers:
        name = CacheName.parse(path.name.split(".partial-")[0] + path.suffix)
        if name is not None and name.kind in kinds:
            with suppress(OSError):  # gone meanwhile or, on Windows, open elsewhere
                if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                    path.unlink()


# --- keeping what is current --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Output:
    """One cache file to be: where, made of what, and whether a foreign file there would fit."""

    path: Path
    metadata: Mapping[str, str]
    fits: Callable[[Path], bool] = field(default=lambda path: False, repr=False)
    also_current: tuple[Mapping[str, str], ...] = ()  # metadata of files that serve as well


def outdated(output: Output) -> str | None:
    """Why a cache file must be made; ``None`` if the one that is there is what would be made."""
    if not output.path.is_file():
        return MISSING
    try:
        cached = SafetensorsFile(output.path).metadata
        if "cache_key" not in cached:
            return None if output.fits(output.path) else "made by another program with other shapes"
    except UserError:
        return "unreadable"
    reasons = [stale_reason(cached, current) for current in (output.metadata, *output.also_current)]
    return None if None in reasons else reasons[0]


def settle_kept(output: Output) -> bool:
    """Note in a clip that is kept under which rule its video was cut now (its tensors are copied).

    Returns:
        Whether its pixels were prepared by an earlier version.
    """
    file = SafetensorsFile(output.path)
    recorded = file.metadata.get(EXTRACTION_KEY)
    if recorded is not None and recorded != output.metadata.get(EXTRACTION_KEY, recorded):
        metadata = {**file.metadata, EXTRACTION_KEY: output.metadata[EXTRACTION_KEY]}
        save_safetensors(dict(file.read()), output.path, metadata)
    ours = "cache_key" in file.metadata
    return ours and file.metadata.get(PREPARATION_KEY) != output.metadata.get(PREPARATION_KEY)


# --- orphans ------------------------------------------------------------------------------------------------


def remove_orphans(directory: Path, produced: Collection[CacheName], kinds: Collection[CacheKind]) -> list[str]:
    """Delete cache files of ``kinds`` in ``directory`` whose clip was not produced; returns their names.

    All kinds of a clip are kept or deleted together. Only names that we give are touched: ``style_ltx2.safetensors``
    may be somebody's LoRA, since clips have their size in the name.
    """
    clips = {(name.base, name.size) for name in produced}
    removed = []
    for name, path in list_caches(directory).items():
        ours = name.size is not None or name.kind == "text"
        if ours and name.kind in kinds and (name.base, name.size) not in clips:
            path.unlink()
            removed.append(path.name)
    return removed


# --- the summary --------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What happened to one modality of one dataset."""

    encoded: int = 0
    current: int = 0  # kept
    failed: int = 0
    no_audio: int = 0
    no_caption: int = 0  # items left out
    too_short: int = 0  # videos that gave no clip at all


class StoppedError(Exception):
    """The run ends at this failure, which the summary holds."""


class Summary:
    """Counts of a run by dataset and modality, and every failure with its reason.

    Args:
        strict: raise :class:`StoppedError` at the first failure.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict
        self._tallies: dict[tuple[str, str], Tally] = defaultdict(Tally)
        self.failures: list[str] = []  # "name: reason"
        self.uncaptioned: list[str] = []  # items left out for it, with the reason
        self.too_short: list[str] = []  # videos that gave no clip
        self.silent: list[str] = []  # clips without sound, where sound was asked for
        self.partly_silent: list[str] = []  # clips whose sound ends before their picture
        self.cut_captions: list[str] = []  # that are longer than what the text encoder reads
        self.reasons: Counter[str] = Counter()  # why files were made again
        self.needless = 0  # files made again although they were current
        self.of_earlier_version = 0  # kept, although their pixels would be prepared a little differently now
        self.empty: list[str] = []  # datasets that gave nothing
        self.missing: list[str] = []  # a line for each kind of reference or mask that some items lack

    def tally(self, dataset: str, modality: str) -> Tally:
        return self._tallies[dataset, modality]

    def fail(self, dataset: str, modality: str, name: str, error: Exception) -> None:
        """Count a failure and log its reason in one line.

        Raises:
            StoppedError: the run is strict.
        """
        self.tally(dataset, modality).failed += 1
        text = str(error) if isinstance(error, (UserError, OSError)) else f"{type(error).__name__}: {error}"
        reason = next(iter(text.strip().splitlines()), type(error).__name__)
        self.failures.append(reason if name in reason else f"{name}: {reason}")
        logger.error("%s", self.failures[-1])
        logger.debug("traceback", exc_info=error)
        if self.strict:
            raise StoppedError

    def leave_out(self, dataset: str, modality: str, problems: Sequence[Problem]) -> None:
        """Count items that have no caption, and warn of them."""
        if not problems:
            return
        self.tally(dataset, modality).no_caption += len(problems)
        self.uncaptioned += [f"{problem.path.name} ({problem.reason})" for problem in problems]
        logger.warning("%s: %s", dataset, summarize_problems(problems))

    def count_short(self, dataset: str, name: str) -> None:
        """Count a video that is shorter than every clip."""
        self.tally(dataset, "video").too_short += 1
        self.too_short.append(name)

    def count_reasons(self, reasons: Iterable[str | None]) -> None:
        """Note why files are made; ``None`` = it was current, but all are made again."""
        for reason in reasons:
            if reason is None:
                self.needless += 1
            elif reason != MISSING:
                self.reasons[reason] += 1

    @property
    def stopped(self) -> bool:
        """Whether the run ended at its first failure."""
        return self.strict and bool(self.failures)

    def failed_in(self, dataset: str) -> int:
        return sum(tally.failed for (label, _), tally in self._tallies.items() if label == dataset)

    def finish(self, *, allow_failed: bool) -> int:
        """Log the table and what needs attention; the exit status of the script."""
        rows = [
            [label, modality, t.encoded, t.current, t.failed, t.no_audio, t.no_caption, t.too_short]
            for (label, modality), t in self._tallies.items()
        ]
        headers = ("dataset", "cache", "encoded", "current", "failed", "no audio", "no caption", "too short")
        logger.info("%s", format_table(headers, rows, title="summary"))
        for reason, count in self.reasons.most_common():
            logger.info("made again, %s: %d", reason, count)
        total = sum(t.encoded for t in self._tallies.values())
        if total and self.needless * 2 > total:
            logger.info("%d of %d files were current already; --skip_existing keeps such files", self.needless, total)
        if self.of_earlier_version:
            logger.info(
                "%s kept from an earlier version, whose pixels differ by about one level of 255; to make them anew, "
                "run once without --skip_existing",
                count_text(self.of_earlier_version, "cache"),
            )
        if self.silent:
            logger.warning("%s without sound: %s", count_text(len(self.silent), "clip"), _shown(self.silent))
        if self.partly_silent:
            logger.warning(
                "%s whose sound ends early, silent from there: %s",
                count_text(len(self.partly_silent), "clip"),
                _shown(self.partly_silent),
            )
        if self.cut_captions:
            logger.warning("%s cut off: %s", count_text(len(self.cut_captions), "caption"), _shown(self.cut_captions))
        if self.too_short:
            logger.warning(
                "%s shorter than every clip: %s", count_text(len(self.too_short), "video"), _shown(self.too_short)
            )
        if self.uncaptioned:
            logger.error(
                "%s without a caption left out: %s", count_text(len(self.uncaptioned), "item"), _shown(self.uncaptioned)
            )
        for failure in self.failures[:_FAILURES_SHOWN]:
            logger.error("failed: %s", failure)
        if len(self.failures) > _FAILURES_SHOWN:
            logger.error("and %d more failed", len(self.failures) - _FAILURES_SHOWN)
        for label in self.empty:
            logger.error("%s: nothing to cache", label)
        for line in self.missing:
            logger.error("missing: %s", line)
        if self.stopped:
            logger.error("stopped at the first failure (--strict); --skip_existing continues from here")
        incomplete = self.failures or self.empty or self.uncaptioned or self.missing
        return 0 if allow_failed else int(bool(incomplete))


def _shown(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
