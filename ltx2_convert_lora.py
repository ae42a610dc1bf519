"""Convert a LoRA file between formats; ``--help`` lists the flags."""

from musubi_tuner.ltx2_convert_lora import main

if __name__ == "__main__":
    main()
