"""Trigger words and shuffled tags of captions."""

import re

import torch


def with_trigger(caption: str, trigger: str | None) -> str:
    """Return `trigger, caption`, or only the caption if there is no trigger or the caption contains it."""
    if not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{trigger}, {caption}"


def shuffled(caption: str, keep: int, rng: torch.Generator) -> str:
    """Shuffle the comma-separated tags of a caption, except the first `keep`."""
    tags = [tag.strip() for tag in caption.split(",")]
    order = torch.randperm(len(tags[keep:]), generator=rng).tolist()
    return ", ".join(tags[:keep] + [tags[keep + index] for index in order])
