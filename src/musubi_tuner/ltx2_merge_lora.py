"""Merge several LTX-2 LoRA files into one."""

from __future__ import annotations

from musubi_tuner.cli.entry import entry
from musubi_tuner.cli.parser import Parsed
from musubi_tuner.config.merge import MergeConfig


def _rules(parsed: Parsed[MergeConfig]) -> list[str]:
    files, options = parsed.config.files, parsed.config.options
    problems = []
    if not files.lora_weight:
        problems.append("--lora_weight: name at least one LoRA file")
    if files.save_merged_lora is None:
        problems.append("--save_merged_lora: name the file to write")
    count = len(files.lora_weight)
    if options.merge_method == "orthogonal" and count != 2:
        problems.append(f"--merge_method orthogonal takes exactly 2 files, got {count}; use concat")
    if not 0 <= options.orthogonal_k_fraction <= 1:
        problems.append(f"--orthogonal_k_fraction {options.orthogonal_k_fraction}: expected 0 to 1")
    return problems


@entry(MergeConfig, "Merge several LTX-2 LoRA files into one.", rules=(_rules,))
def main(parsed: Parsed[MergeConfig]) -> None:
    from musubi_tuner.common.dtypes import parse_dtype
    from musubi_tuner.networks.file_tools import merge

    files, options = parsed.config.files, parsed.config.options
    if options.merge_method == "orthogonal":
        method = merge.orthogonal_method(options.orthogonal_k_fraction, options.orthogonal_rank_mode)
    else:
        method = merge.concat_method()
    rows = merge.merge_loras(
        files.lora_weight,
        files.save_merged_lora,
        method,
        multipliers=files.lora_multiplier,
        dtype=None if options.dtype == "auto" else parse_dtype(options.dtype),
        emit_alpha=options.emit_alpha,
    )
    _print_table(rows, files.save_merged_lora)


def _print_table(rows: list, output) -> None:
    from musubi_tuner.common.tables import format_bytes, format_table

    def cells(row) -> list[object]:
        low, high = row.ranks
        multiplier = "" if row.multiplier is None else f"{row.multiplier:g}"
        ranks = str(low) if low == high else f"{low}-{high}"
        return [row.name, row.format, multiplier, row.modules, ranks, row.dtype]

    print(format_table(["file", "format", "multiplier", "modules", "rank", "dtype"], [cells(r) for r in rows]))
    print(f"wrote {output} ({format_bytes(output.stat().st_size)})")


if __name__ == "__main__":
    main()
