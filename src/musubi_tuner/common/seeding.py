"""Random numbers keyed by what they are for, not by what was drawn before.

Every draw of training names its place (seed, purpose, epoch, item, ...). A run that is resumed, a run with
other worker counts and a run on several processes therefore draw the same numbers.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*keys: object) -> int:
    """A 63-bit seed from any printable keys; the same keys give the same seed on every platform."""
    text = "\x1f".join(f"{type(key).__name__}:{key}" for key in keys)
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed what dropout draws from: PyTorch's generators of the CPU and of ``device``.

    As ``torch.manual_seed``, which besides takes down a stack trace for each kind of device that is not in use.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)


def generator(*keys: object) -> torch.Generator:
    """A private CPU generator for the given keys."""
    return torch.Generator(device="cpu").manual_seed(derive_seed(*keys))
