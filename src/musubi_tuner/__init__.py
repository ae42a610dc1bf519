"""Network trainer for the audio-video diffusion transformers LTX-2 and LTX-2.3."""

__version__ = "0.1.0"
