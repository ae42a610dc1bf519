"""Rules across the flags of ``ltx2_quantize_model.py``, checked before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .loftq_names import loftq_rank
from .quantize import QuantizeModelConfig, QuantizeOptions
from .rules_common import missing
from .rules_memory import loftq_iterations, nf4_block_size


def _files(config: QuantizeModelConfig) -> Iterable[str]:
    source, target = config.files.input_model, config.files.output_model
    for name, path in (("input_model", source), ("output_model", target)):
        if path is None:
            yield f"--{name} is required"
    yield from missing({"input_model": source})
    if target is not None and target.is_dir():
        yield f"--output_model {target}: is a folder, expected the name of a .safetensors file"
    if source is not None and target is not None and source.resolve() == target.resolve():
        yield f"--input_model and --output_model are the same file, {target}; choose another name for the result"
    elif source is not None and target is not None and _named_as_factors(source, target):
        yield (
            f"--input_model {source} has the name of a file of factors beside --output_model {target.name}, which "
            "would be overwritten; choose another name for the result"
        )


def _named_as_factors(path: Path, checkpoint: Path) -> bool:
    """Whether ``path`` is named like the LoftQ factors of ``checkpoint``, of any rank."""
    return path.resolve().parent == checkpoint.resolve().parent and loftq_rank(path, checkpoint) is not None


def _options(config: QuantizeModelConfig) -> Iterable[str]:
    options = config.options
    yield from nf4_block_size(options.nf4_block_size)
    if options.format != "nf4" and options.nf4_block_size != QuantizeOptions().nf4_block_size:
        yield "--nf4_block_size needs --format nf4"
    if options.format != "nf4" and options.loftq_init:
        yield "--loftq_init needs --format nf4"
    yield from loftq_iterations(options.loftq_iters)
    if options.network_dim < 0:
        yield f"--network_dim: expected 0 or more, got {options.network_dim}"
    if options.loftq_init and options.network_dim == 0:
        yield "--loftq_init needs --network_dim, the rank of the LoRA that will be trained"
    if not options.loftq_init and options.network_dim != 0:
        yield "--network_dim needs --loftq_init"
    if not options.loftq_init and options.loftq_iters != QuantizeOptions().loftq_iters:
        yield "--loftq_iters needs --loftq_init"
    yield from _own_base(options)


def _own_base(options: QuantizeOptions) -> Iterable[str]:
    if not options.loftq_own_base:
        if options.lora_target_preset != QuantizeOptions().lora_target_preset:
            yield "--lora_target_preset needs --loftq_own_base: other files serve every preset"
        return
    if not options.loftq_init:
        yield "--loftq_own_base needs --loftq_init"
    if options.loftq_iters == 1:
        yield "--loftq_own_base needs --loftq_iters 2 or more: one round gives the NF4 file that serves every rank"


def quantize_rules(parsed: Any) -> list[str]:
    """Every violation."""
    return [v for rule in (_files, _options) for v in rule(parsed.config)]
