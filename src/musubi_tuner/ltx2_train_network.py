"""Train a LoRA network on cached latents and text embeddings."""

from __future__ import annotations

from musubi_tuner.cli.entry import entry
from musubi_tuner.cli.parser import Parsed
from musubi_tuner.config.rules_training import all_rules
from musubi_tuner.config.training import TrainNetworkConfig


@entry(TrainNetworkConfig, "Train a LoRA for LTX-2 or LTX-2.3 on cached data.", rules=[all_rules])
def main(parsed: Parsed[TrainNetworkConfig]) -> int:
    if parsed.config.timestep.show_timesteps is not None:
        from musubi_tuner.training.show_timesteps import show_timesteps

        return show_timesteps(parsed.config)

    from musubi_tuner.training.run import train

    return train(parsed.config, parsed.explicit)


if __name__ == "__main__":
    main()
