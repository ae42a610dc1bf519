"""Cache text embeddings of a dataset for LTX-2 training; ``--help`` lists the flags."""

from musubi_tuner.ltx2_cache_text_encoder_outputs import main

if __name__ == "__main__":
    main()
