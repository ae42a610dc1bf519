"""Quantise the transformer of a checkpoint to NF4 or int8 once, instead of at every start."""

from __future__ import annotations

import logging

from musubi_tuner.cli.entry import entry
from musubi_tuner.cli.parser import Parsed
from musubi_tuner.config.quantize import QuantizeFiles, QuantizeModelConfig, QuantizeOptions
from musubi_tuner.config.rules_quantize import quantize_rules

logger = logging.getLogger(__name__)

_ONE_ROUND = (
    "files get one round, which fits the same NF4 weights at every rank; add --loftq_own_base for weights of this "
    "rank, or train from the bf16 file"
)


@entry(
    QuantizeModelConfig,
    "Quantise the transformer of an LTX-2 checkpoint, for --nf4_base or --int8_base.",
    rules=[quantize_rules],
)
def main(parsed: Parsed[QuantizeModelConfig]) -> None:
    from musubi_tuner.common.tables import format_bytes

    files, options = parsed.config.files, parsed.config.options
    count = _write_own_base(files, options) if options.loftq_own_base else _write(files, options, parsed.explicit)
    before, after = files.input_model.stat().st_size, files.output_model.stat().st_size
    print(
        f"wrote {files.output_model}: {count} weights in {options.format.upper()}, "
        f"{format_bytes(after)} of {format_bytes(before)} ({after / before:.0%})"
    )


def _write(files: QuantizeFiles, options: QuantizeOptions, explicit: frozenset[str]) -> int:
    from musubi_tuner.common.devices import choose_device
    from musubi_tuner.models.ltx2.quantize_file import quantize_file
    from musubi_tuner.networks.file_tools.write_loftq import write_loftq
    from musubi_tuner.quantization.packed import Int8, Nf4

    size, device = options.nf4_block_size, choose_device(options.calc_device)
    if options.loftq_init:
        if "loftq_iters" in explicit and options.loftq_iters > 1:
            logger.warning("--loftq_iters %d: %s", options.loftq_iters, _ONE_ROUND)
        path = write_loftq(
            files.input_model, files.output_model, rank=options.network_dim, block_size=size, device=device
        )
        print(f"wrote {path}: LoftQ factors of rank {options.network_dim}")
    method = Nf4(size) if options.format == "nf4" else Int8()
    return quantize_file(files.input_model, files.output_model, method=method, device=device)


def _write_own_base(files: QuantizeFiles, options: QuantizeOptions) -> int:
    from musubi_tuner.common.devices import choose_device
    from musubi_tuner.networks.file_tools.write_loftq import write_own_base

    path, count = write_own_base(
        files.input_model,
        files.output_model,
        rank=options.network_dim,
        iterations=options.loftq_iters,
        block_size=options.nf4_block_size,
        preset=options.lora_target_preset,
        device=choose_device(options.calc_device),
    )
    print(f"wrote {path}: LoftQ factors of rank {options.network_dim}, which the weights need")
    return count


if __name__ == "__main__":
    main()
