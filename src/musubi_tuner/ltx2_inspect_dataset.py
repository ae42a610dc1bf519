"""What a dataset configuration gives, before GPU time is spent: tables, and a page with pictures of every clip."""

from __future__ import annotations

from musubi_tuner.cli.entry import entry
from musubi_tuner.cli.parser import Parsed
from musubi_tuner.config.inspect import InspectConfig, rules


@entry(
    InspectConfig,
    "Examine the media and captions of a dataset configuration (no GPU, no checkpoint).",
    rules=[lambda parsed: rules(parsed.config)],
)
def main(parsed: Parsed[InspectConfig]) -> int:
    from musubi_tuner.inspection.run import run_inspection

    return run_inspection(parsed.config)


if __name__ == "__main__":
    main()
