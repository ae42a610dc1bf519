"""Merge LoRAs into an LTX-2 checkpoint; ``--help`` lists the flags."""

from musubi_tuner.ltx2_merge_lora_to_model import main

if __name__ == "__main__":
    main()
