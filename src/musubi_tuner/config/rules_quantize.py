"""Rules across the flags of ``ltx2_quantize_model.py``, checked before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .quantize import QuantizeModelConfig, QuantizeOptions
from .rules_common import missing
from .rules_memory import nf4_block_size
from .unavailable import unavailable


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


def _options(config: QuantizeModelConfig) -> Iterable[str]:
    yield from nf4_block_size(config.options.nf4_block_size)
    if config.options.format != "nf4" and config.options.nf4_block_size != QuantizeOptions().nf4_block_size:
        yield "--nf4_block_size needs --format nf4"


def quantize_rules(parsed: Any) -> list[str]:
    """Every violation."""
    return [v for rule in (_files, unavailable, _options) for v in rule(parsed.config)]
