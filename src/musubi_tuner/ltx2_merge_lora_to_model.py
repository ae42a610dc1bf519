"""Merge LoRAs into an LTX-2 checkpoint."""

from __future__ import annotations

from musubi_tuner.cli.entry import entry
from musubi_tuner.cli.parser import Parsed
from musubi_tuner.config.merge_model import MergeModelConfig, merge_model_rules


@entry(MergeModelConfig, "Merge one or several LoRAs into an LTX-2 checkpoint.", rules=(merge_model_rules,))
def main(parsed: Parsed[MergeModelConfig]) -> None:
    from musubi_tuner.common.devices import choose_device
    from musubi_tuner.common.dtypes import parse_dtype
    from musubi_tuner.common.tables import format_bytes, format_table
    from musubi_tuner.networks.file_tools.merge import broadcast_multipliers
    from musubi_tuner.networks.file_tools.merge_model import merge_into_model
    from musubi_tuner.networks.lycoris.files import open_adapter

    files, name = parsed.config.files, parsed.config.options.dtype
    readers = [open_adapter(path) for path in files.lora_weight]
    multipliers = broadcast_multipliers(files.lora_multiplier, len(readers))
    done = merge_into_model(
        files.ltx2_checkpoint,
        list(zip(readers, multipliers, strict=True)),
        files.save_merged_model,
        output=None if name == "auto" else name if name == "fp8" else parse_dtype(name),
        device=choose_device(parsed.config.options.device),
    )
    rows = [[r.path.name, r.format, f"{m:g}", len(r.infos)] for r, m in zip(readers, multipliers, strict=True)]
    print(format_table(["file", "format", "multiplier", "modules"], rows))
    fp8 = f", {done.fp8} in FP8" if done.fp8 else ""
    print(f"merged into {done.merged} of {done.weights} tensors{fp8}; rounding error {done.lost:.2%} of the change")
    print(f"wrote {files.save_merged_model} ({format_bytes(files.save_merged_model.stat().st_size)})")


if __name__ == "__main__":
    main()
