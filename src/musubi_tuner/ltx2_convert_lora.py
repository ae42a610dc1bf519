"""Convert a LoRA file between native, ComfyUI and diffusers (PEFT)."""

from __future__ import annotations

from musubi_tuner.cli.entry import entry
from musubi_tuner.cli.parser import Parsed
from musubi_tuner.config.convert import ConvertConfig, convert_rules, part_path, target_path


@entry(
    ConvertConfig,
    "Convert an LTX-2 LoRA file between the native format, ComfyUI's and diffusers'.",
    rules=(convert_rules,),
)
def main(parsed: Parsed[ConvertConfig]) -> None:
    from musubi_tuner.common.dtypes import parse_dtype
    from musubi_tuner.networks.file_tools.convert import Part, convert_adapter
    from musubi_tuner.networks.file_tools.magnitudes import comfy_magnitudes
    from musubi_tuner.networks.files.adapter_file import AdapterFile
    from musubi_tuner.networks.targets import output_stream

    files, options = parsed.config.files, parsed.config.options
    source, target = AdapterFile(files.lora_weight), target_path(parsed.config)
    parts = [Part(target)]
    if options.split_modalities:
        parts = [
            Part(part_path(target, m), lambda name, m=m: output_stream(name) == m, {"ss_modality_part": m})
            for m in ("video", "audio")
        ]
    written = convert_adapter(
        source,
        parts,
        options.format,
        dtype=None if options.dtype == "auto" else parse_dtype(options.dtype),
        keep_alpha=options.keep_alpha,
        magnitudes=comfy_magnitudes(source, options.format, files.ltx2_checkpoint),
    )
    _print_table(written, options.format)


def _print_table(written: list, fmt: str) -> None:
    from musubi_tuner.common.tables import format_bytes, format_table

    def cells(row) -> list[object]:
        low, high = row.ranks or ("", "")
        ranks = f"{low}" if low == high else f"{low}-{high}"
        return [row.path.name, fmt, row.modules, ranks, row.folded, format_bytes(row.path.stat().st_size)]

    print(format_table(["file", "format", "modules", "rank", "alpha folded", "size"], [cells(row) for row in written]))
    rounded = sum(row.rounded for row in written)
    if rounded:
        print(
            f"{rounded} modules: alpha / rank is no power of two and the factors are float32, so B is rounded; the way "
            "back gives the same LoRA within rounding. --keep_alpha keeps every bit"
        )
    for row in written:
        print(f"wrote {row.path}")


if __name__ == "__main__":
    main()
