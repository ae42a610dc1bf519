"""The main job on a real clip with a tiny random model: clips, caches, LoRA, previews, merged LoRA, report."""

from __future__ import annotations

from musubi_tuner.cli.entry import entry
from musubi_tuner.cli.parser import Parsed
from musubi_tuner.config.demo import DemoConfig


@entry(DemoConfig, "Run the whole path on shipped clips with a tiny random model (CPU, minutes).")
def main(parsed: Parsed[DemoConfig]) -> int:
    from musubi_tuner.demo.run import run_demo

    demo = parsed.config.demo
    return run_demo(
        demo.output_dir,
        version=demo.ltx_version,
        mode=demo.ltx2_mode,
        steps=demo.max_train_steps,
        assets_only=demo.assets_only,
    )


if __name__ == "__main__":
    main()
