"""Which flags would let a run fit, found by trying them in the estimate, those that cost the least speed first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from .estimate import Estimate, Request, Weights, estimate, with_settings

# Cheapest first: a GPU computes in FP8 almost as fast, dequantising 4 bit takes a little longer.
BASES = ("dense", "fp8", "int8", "nf4")
_PART = 1024  # tokens

# Ways to hold the base weights, by names of ``BASES``: what they weigh, and the flags to add for them.
PossibleBases: TypeAlias = Mapping[str, tuple[Weights, tuple[str, ...]]]


@dataclass(frozen=True)
class Limits:
    """Bytes that are free on the device and in host memory; the same number twice where there is no GPU."""

    device: int
    host: int

    def hold(self, found: Estimate) -> bool:
        return found.needed <= self.device and found.host <= self.host


@dataclass(frozen=True)
class Proposal:
    """Flags to add, and what the run would take with them."""

    flags: tuple[str, ...]
    estimate: Estimate

    def __str__(self) -> str:
        return " ".join(self.flags)


@dataclass(frozen=True)
class _Step:
    """One rung: settings to change, and their flags."""

    changes: Mapping[str, object]
    flags: tuple[str, ...]


def propose(request: Request, bases: PossibleBases, limits: Limits) -> list[Proposal]:
    """The first that fits for each way to hold the base weights; those that cost the least speed first.

    Args:
        request: the run as it is.
        bases: the ways that the checkpoint allows. The run's own has no flags.
    """
    found: list[tuple[int, Proposal]] = []
    for base in BASES:
        if base in bases:
            weights, flags = bases[base]
            found += _first_fit(with_settings(request, weights=weights), flags, limits)
    return [proposal for _, proposal in sorted(found, key=lambda pair: pair[0])]  # stable: BASES in order


def smallest(request: Request, bases: PossibleBases) -> Proposal:
    """What takes the least of the device, whether it fits or not."""
    tried = [
        Proposal((*flags, *step.flags), estimate(with_settings(request, weights=weights, **step.changes)))
        for weights, flags in bases.values()
        for step in _ladder(with_settings(request, weights=weights))
    ]
    return min(tried, key=lambda proposal: proposal.estimate.device)


def _first_fit(request: Request, base_flags: tuple[str, ...], limits: Limits) -> Iterator[tuple[int, Proposal]]:
    for cost, step in enumerate(_ladder(request)):
        taken = estimate(with_settings(request, **step.changes))
        flags = (*base_flags, *step.flags)
        if flags and limits.hold(taken):
            yield cost, Proposal(flags, taken)
            return


def _ladder(request: Request) -> Iterator[_Step]:
    """From what costs no speed to what costs the most; each rung keeps what the run asks for already."""
    own = request.settings
    nothing = _Step({}, ())
    yield nothing
    recompute = nothing
    if not own.checkpointing:
        recompute = _Step({"checkpointing": True, "blocks_to_checkpoint": None}, ("--gradient_checkpointing",))
    elif own.blocks_to_checkpoint is not None:
        recompute = _Step({"blocks_to_checkpoint": None}, ("--blocks_to_checkpoint -1",))
    yield recompute
    in_parts = _Step({}, ())
    if own.chunk_feed_forward is None:
        flags = (f"--ffn_chunk_target all --ffn_chunk_size {_PART}",)
        in_parts = _Step({"chunk_feed_forward": "all", "chunk_tokens": _PART}, flags)
    if not request.on_gpu:  # what goes to host memory is there already
        yield _both(recompute, in_parts)
        return
    offload = recompute
    if not own.offload_inputs:
        changes = {"checkpointing": True, "blocks_to_checkpoint": None, "offload_inputs": True}
        of_all = () if own.blocks_to_checkpoint is None else ("--blocks_to_checkpoint -1",)
        offload = _Step(changes, ("--gradient_checkpointing_cpu_offload", *of_all))
    yield offload
    for before in (recompute, offload, _both(offload, in_parts)):
        for count in range(own.blocks_to_swap + 1, len(request.weights.blocks)):
            yield _both(before, _swapping(count))


def _swapping(count: int) -> _Step:
    flags = (f"--blocks_to_swap {count}", "--use_pinned_memory_for_block_swap")
    return _Step({"blocks_to_swap": count, "pin_swapped": True}, flags)


def _both(first: _Step, second: _Step) -> _Step:
    return _Step({**first.changes, **second.changes}, (*first.flags, *second.flags))
