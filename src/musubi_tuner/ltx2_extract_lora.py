"""Make a LoRA of the difference of two LTX-2 checkpoints."""

from __future__ import annotations

from musubi_tuner.cli.entry import entry
from musubi_tuner.cli.parser import Parsed
from musubi_tuner.config.extract import ExtractConfig, extract_rules


@entry(ExtractConfig, "Make a LoRA of the difference of two LTX-2 checkpoints.", rules=(extract_rules,))
def main(parsed: Parsed[ExtractConfig]) -> None:
    from musubi_tuner.common.devices import choose_device
    from musubi_tuner.common.dtypes import parse_dtype
    from musubi_tuner.common.tables import format_bytes, format_table
    from musubi_tuner.networks.file_tools.extract import RankRule, extract_lora

    files, options = parsed.config.files, parsed.config.options
    target = files.save_extracted_lora
    targets = [(target, "native")]
    if options.convert_to_comfy:
        targets.append((target.with_name(f"{target.stem}.comfy{target.suffix}"), "comfy"))
    done = extract_lora(
        files.base_model,
        files.tuned_model,
        targets,
        RankRule(options.network_dim, options.energy, options.singular_ratio),
        dtype=parse_dtype(options.save_precision),
        device=choose_device(options.device),
        exact=options.exact_svd,
    )
    low, high = done.ranks
    rows = [[path.name, fmt, done.changed, format_bytes(path.stat().st_size)] for path, fmt in targets]
    print(format_table(["file", "format", "modules", "size"], rows))
    rank = f"{low}" if low == high else f"{low}-{high}"
    print(f"{done.changed} weights changed, {done.unchanged} did not")
    print(f"rank {rank} holds {done.kept:.2%} of the change's squared norm")
    for path, _ in targets:
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
