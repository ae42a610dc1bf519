"""Encode the videos, images and sounds of a dataset configuration into latent caches."""

from __future__ import annotations

from musubi_tuner.cli.entry import entry
from musubi_tuner.cli.parser import Parsed
from musubi_tuner.config.caching import CacheLatentsConfig
from musubi_tuner.config.rules_caching import latents, required


@entry(
    CacheLatentsConfig,
    "Encode the media of a dataset configuration into latent caches.",
    rules=[lambda parsed: [*required(parsed.config), *latents(parsed.config)]],
)
def main(parsed: Parsed[CacheLatentsConfig]) -> int:
    from musubi_tuner.caching.run import run_cache_latents

    return run_cache_latents(parsed.config)


if __name__ == "__main__":
    main()
