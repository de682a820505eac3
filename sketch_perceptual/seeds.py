"""Random draws that belong to what they are for."""

import hashlib

import torch


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by `key` alone: the same draws in any process, in any order, after any resume."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
