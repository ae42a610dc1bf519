"""Encode the captions of a dataset configuration into text caches."""

from __future__ import annotations

from musubi_tuner.cli.entry import entry
from musubi_tuner.cli.parser import Parsed
from musubi_tuner.config.caching import CacheTextConfig
from musubi_tuner.config.rules_caching import required, text


@entry(
    CacheTextConfig,
    "Encode the captions of a dataset configuration into text caches.",
    rules=[lambda parsed: [*required(parsed.config), *text(parsed.config)]],
)
def main(parsed: Parsed[CacheTextConfig]) -> int:
    from musubi_tuner.caching.run import run_cache_text

    return run_cache_text(parsed.config)


if __name__ == "__main__":
    main()
