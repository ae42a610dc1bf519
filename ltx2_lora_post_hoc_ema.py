"""Average saved LoRAs as a running average would; ``--help`` lists the flags."""

from musubi_tuner.ltx2_lora_post_hoc_ema import main

if __name__ == "__main__":
    main()
