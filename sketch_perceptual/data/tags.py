"""Captions as they are trained on: behind a trigger word, their tags in another order each time."""

import re

import torch


def with_trigger(caption: str, trigger: str | None) -> str:
    """`trigger, caption`, or the caption alone if there is no such word, or it has it already."""
    if not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{trigger}, {caption}"


def shuffled(caption: str, keep: int, draw: torch.Generator) -> str:
    """A list between commas with all but its first `keep` tags in an order that is drawn."""
    tags = [tag.strip() for tag in caption.split(",")]
    order = torch.randperm(len(tags[keep:]), generator=draw).tolist()
    return ", ".join(tags[:keep] + [tags[keep + index] for index in order])
