"""Files of LoRA and LyCORIS networks: their formats, reading, writing, hashes."""
