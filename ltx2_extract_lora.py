"""Make a LoRA of the difference of two checkpoints; ``--help`` lists the flags."""

from musubi_tuner.ltx2_extract_lora import main

if __name__ == "__main__":
    main()
