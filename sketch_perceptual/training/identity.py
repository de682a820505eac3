"""Identity of a run: options that can change its result, and digests of its data and weights."""

import hashlib
import json
from collections.abc import Iterable, Sequence

from accelerate import Accelerator

from ..cli.arguments import Options


def identity_of(args: Options, accelerator: Accelerator) -> dict:
    """Return the options that a resumed run must share, with their effective values, as JSON."""
    options = {name: value for name, value in vars(args).items() if name in args.shared}
    options |= {"mixed_precision": accelerator.mixed_precision, "processes": accelerator.num_processes}
    return json.loads(json.dumps(options))


def describe_images(keys: Sequence[str], texts: Iterable) -> str:
    """Return the number of images and a hash of their contents with their captions or classes, for `Run.settle`."""
    return f"{len(keys)} images {digest(zip(keys, texts, strict=True))}"


def digest(parts: Iterable) -> str:
    """Return 12 hexadecimal digits of a hash of `parts`, as JSON and in order."""
    text = hashlib.sha256()
    for part in parts:
        text.update(json.dumps(part).encode() + b"\n")
    return text.hexdigest()[:12]
