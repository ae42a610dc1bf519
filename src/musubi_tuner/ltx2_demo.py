"""The main job on a real clip with a tiny random model: clips, caches, LoRA, previews, merged LoRA, report."""

from __future__ import annotations

from collections.abc import Iterable

from musubi_tuner.cli.entry import entry
from musubi_tuner.cli.parser import Parsed
from musubi_tuner.config.demo import DemoConfig
from musubi_tuner.config.rules_common import folder


def _rules(parsed: Parsed[DemoConfig]) -> Iterable[str]:
    demo = parsed.config.demo
    yield from folder("output_dir", demo.output_dir)
    if demo.max_train_steps < 2:
        yield f"--max_train_steps {demo.max_train_steps}: expected at least 2, to merge the LoRA of half the run"


@entry(DemoConfig, "Run the whole path on shipped clips with a tiny random model (CPU, minutes).", rules=[_rules])
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
