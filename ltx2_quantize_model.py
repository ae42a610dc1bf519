"""Quantise the transformer of a checkpoint to NF4; ``--help`` lists the flags."""

from musubi_tuner.ltx2_quantize_model import main

if __name__ == "__main__":
    main()
