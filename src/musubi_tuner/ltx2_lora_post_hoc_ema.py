"""Average the LoRA files that a run saved, as a running average of its weights would have."""

from __future__ import annotations

from musubi_tuner.cli.entry import entry
from musubi_tuner.cli.parser import Parsed
from musubi_tuner.config.post_hoc_ema import EmaConfig, ema_rules


@entry(EmaConfig, "Average the LoRA files that a run saved (post-hoc EMA).", rules=(ema_rules,))
def main(parsed: Parsed[EmaConfig]) -> None:
    from musubi_tuner.common.tables import format_bytes, format_table
    from musubi_tuner.networks.file_tools.post_hoc_ema import average_loras, linear_betas, power_betas

    files, options = parsed.config.files, parsed.config.options
    paths = sorted(files.path, key=lambda p: p.stat().st_mtime) if files.sort else list(files.path)
    if options.sigma_rel is not None:
        betas, note = power_betas(len(paths), options.sigma_rel), f"sigma_rel {options.sigma_rel:g}"
    else:
        betas = linear_betas(len(paths), options.beta, options.beta2)
        note = f"beta {options.beta:g}" + ("" if options.beta2 is None else f" to {options.beta2:g}")
    rows = average_loras(paths, files.output_file, betas, note=note)
    cells = [[r.path.name, "" if r.beta is None else f"{r.beta:.4f}", f"{r.share:.2%}"] for r in rows]
    print(format_table(["file", "beta", "share"], cells))
    print(f"wrote {files.output_file} ({format_bytes(files.output_file.stat().st_size)})")


if __name__ == "__main__":
    main()
