"""What makes two runs the same: the options that can change a result, and the contents of data and weights."""

import hashlib
import json
from collections.abc import Iterable

from accelerate import Accelerator

from ..cli.arguments import Options


def identity_of(args: Options, accelerator: Accelerator) -> dict:
    """The options of a run that a resumed one must share, with their effective values; JSON."""
    options = {name: value for name, value in vars(args).items() if name in args.shared}
    options |= {"mixed_precision": accelerator.mixed_precision, "processes": accelerator.num_processes}
    return json.loads(json.dumps(options))


def digest(parts: Iterable) -> str:
    """12 hexadecimal digits for the JSON of `parts`, in their order."""
    text = hashlib.sha256()
    for part in parts:
        text.update(json.dumps(part).encode() + b"\n")
    return text.hexdigest()[:12]
