"""Ways of saving memory, what the rules say of two of them together, and the page that lists it.

    PYTHONPATH=src:tests/memory:tests/models python tests/memory/memory_pairs.py

writes the page anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path

from stored_bases import table

from musubi_tuner.cli.parser import Parsed, parse
from musubi_tuner.config.rules_optimizer import fused_backward
from musubi_tuner.config.rules_training import all_rules
from musubi_tuner.config.training import TrainNetworkConfig

PAGE = Path(__file__).parents[2] / "docs" / "memory_combinations.md"


@dataclass(frozen=True)
class Technique:
    """A way of saving memory.

    Attributes:
        changes: it makes other weights: another base, network or optimizer. The rest computes the same.
        rounds: it sums in another order, so that results agree to rounding.
    """

    name: str
    flags: str = ""
    processes: int = 1
    changes: bool = False
    rounds: bool = False


TECHNIQUES = (
    Technique("FP8", "--fp8_base --fp8_scaled", changes=True),
    Technique("int8", "--int8_base", changes=True),
    Technique("NF4", "--nf4_base", changes=True),
    Technique("LyCORIS LoKr", "--network_module lycoris.kohya --network_args algo=lokr", changes=True),
    Technique("LyCORIS LoHa", "--network_module lycoris.kohya --network_args algo=loha", changes=True),
    Technique("swap", "--blocks_to_swap 2"),
    Technique("swap, pinned", "--blocks_to_swap 2 --use_pinned_memory_for_block_swap"),
    Technique("checkpointing", "--gradient_checkpointing"),
    Technique("of some blocks", "--gradient_checkpointing --blocks_to_checkpoint 1"),
    Technique("offload", "--gradient_checkpointing_cpu_offload"),
    Technique("FFN in parts", "--ffn_chunk_target all --ffn_chunk_size 4", rounds=True),
    Technique(
        "attention in parts",
        "--split_attn_target all --split_attn_mode query --split_attn_chunk_size 4",
        rounds=True,
    ),
    Technique("compile", "--compile --compile_backend eager", rounds=True),
    Technique("fused backward", "--fused_backward_pass --max_grad_norm 0"),
    Technique("accumulation", "--gradient_accumulation_steps 2"),
    Technique("8-bit optimizer", "--optimizer_type AdamW8bit", changes=True),
    Technique("paged optimizer", "--optimizer_type PagedAdamW8bit", changes=True),
    Technique("average", "--ema_decay 0.9"),
    Technique("2 processes", processes=2),
)
PAIRS = tuple(combinations(TECHNIQUES, 2))

# What is no pair of those: flags that need, exclude or outdo others.
REFUSED = (
    "--flash_attn --xformers",
    "--sage_attn",
    "--split_attn_mode query",
    "--split_attn_target all --split_attn_chunk_size 512",
    "--split_attn_target all --split_attn_mode query --split_attn_chunk_size -1",
    "--ffn_chunk_target all --ffn_chunk_size -1",
    "--blocks_to_swap -1",
    "--use_pinned_memory_for_block_swap",
    "--blocks_to_checkpoint 2",
    "--gradient_checkpointing --blocks_to_checkpoint -2",
    "--fp8_scaled",
    "--nf4_base --fp8_w8a8",
    "--fp8_base --fp8_w8a8_backward dense",
    "--quantize_device cpu",
    "--nf4_block_size 64",
    "--nf4_base --nf4_block_size 48",
    "--loftq_init --network_dim 8",
    "--nf4_base --loftq_init",
    "--nf4_base --loftq_init --network_module lycoris.kohya --network_dim 8",
    "--nf4_base --loftq_init --network_dim 8 --network_weights lora.safetensors",
    "--nf4_base --loftq_init --network_dim 8 --scale_weight_norms 1",
    "--nf4_base --loftq_init --network_dim 8 --loftq_iters 0",
    "--nf4_base --loftq_iters 5",
    "--awq_calibration",
    "--nf4_base --awq_alpha 0.5",
    "--nf4_base --awq_num_batches 4",
    "--nf4_base --awq_calibration --awq_alpha 2",
    "--nf4_base --awq_calibration --awq_num_batches 0",
    "--compile --dynamo_backend INDUCTOR",
    "--compile_mode max-autotune",
    "--compile --compile_cache_size_limit 0",
    "--dynamo_fullgraph",
    "--cuda_memory_fraction 1.5",
    "--fused_backward_pass --mixed_precision fp16",
    "--full_bf16 --full_fp16",
    "--full_bf16 --mixed_precision fp16",
)


def parsed(techniques: Iterable[Technique]) -> Parsed[TrainNetworkConfig]:
    """The configuration of their flags, one after the other."""
    return given(" ".join(technique.flags for technique in techniques))


def given(flags: str) -> Parsed[TrainNetworkConfig]:
    """The configuration of a command line."""
    return parse(TrainNetworkConfig, flags.split(), prog="x", description="")


def share_a_value(first: Technique, second: Technique) -> bool:
    """Whether they are two values of one flag."""
    values = [dict(zip(t.flags.split()[::2], t.flags.split()[1::2], strict=False)) for t in (first, second)]
    return any(
        name.startswith("--") and not value.startswith("--") and values[1].get(name, value) != value
        for name, value in values[0].items()
    )


@cache
def refusals(techniques: tuple[Technique, ...]) -> list[str]:
    """What the rules say, but for the files that every run needs."""
    request = parsed(techniques)
    found = said_of(request)
    optimizer, processes = request.config.optimizer, max((t.processes for t in techniques), default=1)
    if optimizer.fused_backward_pass:
        said = fused_backward(optimizer.gradient_accumulation_steps, None, processes)
        found += [message for message in said if message not in found]
    return found


def said_of(request: Parsed[TrainNetworkConfig]) -> list[str]:
    """What the rules say of flags, but for files: those that every run needs, and those that are not here."""
    always = all_rules(given(""))
    return [said for said in all_rules(request) if said not in always and ": not found" not in said]


def page() -> str:
    """The page: a table of all pairs, and the refusals that it numbers."""
    messages: list[str] = []
    rows = [
        [a.name, *(_cell(a, b, messages) if a is not b else "" for b in TECHNIQUES[: i + 1])]
        for i, a in enumerate(TECHNIQUES)
    ]
    header = ["", *(str(i + 1) for i, _ in enumerate(TECHNIQUES))]
    lines = [_HEAD, f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for number, row in enumerate(rows, start=1):
        row += [""] * (len(header) - len(row))
        lines.append(f"| {number}. {' | '.join(row)} |")
    lines += ["", "Refused before anything is loaded:", ""]
    lines += [f"- {_letter(i)}: `{message}`" for i, message in enumerate(messages)]
    lines += ["", "As flags:", "", "| | |", "|---|---|"]
    for number, technique in enumerate(TECHNIQUES, start=1):
        flags = f"`{technique.flags}`" if technique.flags else "`accelerate launch --num_processes 2`"
        lines.append(f"| {number}. {technique.name} | {flags} |")
    lines += [_CPU, "## What else is refused", "", "| flags | message |", "|---|---|"]
    lines += [f"| `{flags}` | {'; '.join(f'`{said}`' for said in said_of(given(flags)))} |" for flags in REFUSED]
    lines += [_STORED, *table()]
    return "\n".join(lines) + "\n"


def _cell(first: Technique, second: Technique, messages: list[str]) -> str:
    if share_a_value(first, second):
        return "/"
    found = refusals((first, second))
    messages += [message for message in found if message not in messages]
    if found:
        return ", ".join(_letter(messages.index(message)) for message in found)
    return "≈" if (first.rounds or second.rounds) else "="


def _letter(index: int) -> str:
    return chr(ord("A") + index)


_HEAD = """# Ways of saving memory, two by two

What else is refused, and what becomes of a quantised checkpoint, is [below](#what-else-is-refused). Every pair of them,
as the rules answer and a test shows. `=`: works, and loss, gradients and weights after two steps are bit for bit those
of the plain model with the same base, network and optimizer; halves of a batch and equal processes count as the whole.
`≈`: works, and loss and gradients agree to rounding, since sums are taken in another order. `/`: two values of a flag.
A letter: refused, with the message below. This page is made from the rules; `tests/memory/test_memory_pairs.py` fails
where it is not current, and trains every pair that is not refused on a tiny model.
"""

_STORED = """
## Checkpoints that are quantised already

Known from the header. NF4 with `--loftq_init` also needs the factors of that rank beside the file.
"""

_CPU = """
On a CPU memory is never pinned and optimizers are never paged: there the test shows that the flags go together, with
the same results. Attention kernels (`--flash_attn` and others) are compared with PyTorch's at the start of each run.
What FP8, int8 and NF4 themselves change is in [quantisation](quantisation.md), with what goes with LoftQ, AWQ and FP8
products; what each way saves is in [performance](performance.md).
"""

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
