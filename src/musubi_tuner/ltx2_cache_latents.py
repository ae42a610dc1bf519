"""Encode the videos, images and sounds of a dataset configuration into latent caches."""

from __future__ import annotations

from musubi_tuner.cli.entry import entry
from musubi_tuner.cli.parser import Parsed
from musubi_tuner.config.caching import CacheLatentsConfig
from musubi_tuner.config.rules_caching import latents, references, required, sample_latents, without_encoding


@entry(
    CacheLatentsConfig,
    "Encode the media of a dataset configuration into latent caches.",
    rules=[
        lambda parsed: [
            violation
            for rule in (required, latents, references, sample_latents, without_encoding)
            for violation in rule(parsed.config)
        ]
    ],
)
def main(parsed: Parsed[CacheLatentsConfig]) -> int:
    config = parsed.config
    if config.without.dry_run:
        from musubi_tuner.inspection.dry_run import run_dry_run

        return run_dry_run(config)
    if config.without.debug_mode is not None:
        from musubi_tuner.inspection.prepared import show_prepared

        return show_prepared(config, config.without.debug_mode)
    from musubi_tuner.caching.run import run_cache_latents

    return run_cache_latents(config)


if __name__ == "__main__":
    main()
