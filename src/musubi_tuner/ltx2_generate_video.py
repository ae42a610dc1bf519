"""Render prompts with LTX-2 or LTX-2.3, with or without LoRAs."""

from __future__ import annotations

from musubi_tuner.cli.entry import entry
from musubi_tuner.cli.parser import Parsed
from musubi_tuner.config.rules_generate import generate_rules
from musubi_tuner.config.sampling import GenerateVideoConfig


@entry(
    GenerateVideoConfig,
    "Render prompts to videos, images or sound with LTX-2 or LTX-2.3.",
    rules=[generate_rules],
)
def main(parsed: Parsed[GenerateVideoConfig]) -> int:
    from musubi_tuner.generation.script import generate

    return generate(parsed.config)


if __name__ == "__main__":
    main()
