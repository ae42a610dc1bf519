"""Quantise the transformer of a checkpoint to NF4 once, instead of at every start."""

from __future__ import annotations

import logging

from musubi_tuner.cli.entry import entry
from musubi_tuner.cli.parser import Parsed
from musubi_tuner.config.quantize import QuantizeModelConfig
from musubi_tuner.config.rules_quantize import quantize_rules

logger = logging.getLogger(__name__)

_ONE_ROUND = "files get one round, which fits the same NF4 weights at every rank; training from the bf16 file does more"


@entry(
    QuantizeModelConfig,
    "Quantise the transformer of an LTX-2 checkpoint to NF4, for --nf4_base.",
    rules=[quantize_rules],
)
def main(parsed: Parsed[QuantizeModelConfig]) -> None:
    from musubi_tuner.common.devices import choose_device
    from musubi_tuner.common.tables import format_bytes
    from musubi_tuner.models.ltx2.quantize_file import quantize_file

    files, options = parsed.config.files, parsed.config.options
    how = {"block_size": options.nf4_block_size, "device": choose_device(options.calc_device)}
    if options.loftq_init:
        from musubi_tuner.networks.loftq import write_loftq

        if "loftq_iters" in parsed.explicit and options.loftq_iters > 1:
            logger.warning("--loftq_iters %d: %s", options.loftq_iters, _ONE_ROUND)
        path = write_loftq(files.input_model, files.output_model, rank=options.network_dim, **how)
        print(f"wrote {path}: LoftQ factors of rank {options.network_dim}")
    count = quantize_file(files.input_model, files.output_model, **how)
    before, after = files.input_model.stat().st_size, files.output_model.stat().st_size
    print(
        f"wrote {files.output_model}: {count} weights in NF4, {format_bytes(after)} of {format_bytes(before)} "
        f"({after / before:.0%})"
    )


if __name__ == "__main__":
    main()
