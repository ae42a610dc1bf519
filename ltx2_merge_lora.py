"""Merge several LTX-2 LoRA files into one; ``--help`` lists the flags."""

from musubi_tuner.ltx2_merge_lora import main

if __name__ == "__main__":
    main()
