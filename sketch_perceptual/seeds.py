"""Random generators seeded by their purpose."""

import hashlib

import torch


def generator(*key: int | str) -> torch.Generator:
    """Return a CPU generator seeded only by `key`: the same numbers in any process, in any order, after any resume."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
