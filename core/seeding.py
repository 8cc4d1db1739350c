"""Where every random number comes from."""

import hashlib

import torch


def seed(run_seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, e.g. ``seed(0, "views", "north", 3)``; equal on every machine and in every process."""
    text = "/".join(str(part) for part in (run_seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(run_seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator for one purpose, so that the same draws are made whatever the device."""
    return torch.Generator().manual_seed(seed(run_seed, *purpose))
