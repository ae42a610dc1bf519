"""What the scripts for LoRA files do: converting, merging, extracting, averaging."""
