"""Captions to the embeddings that Stable Diffusion 1.x is conditioned on."""

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn

logger = get_logger(__name__, log_level="INFO")


def tokenize(tokenizer, captions: list[str]) -> Tensor:
    """Return the tokens of captions, (B, 77), cut where they are longer."""
    return tokenizer(
        captions, max_length=tokenizer.model_max_length, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids


def encode_prompts(tokenizer, text_encoder, captions: list[str], trained: nn.Module | None = None) -> Tensor:
    """Captions -> (B, 77, C), with a gradient where the text encoder, as accelerate prepared it, is `trained`."""
    ids = tokenize(tokenizer, captions).to(text_encoder.device)
    if trained is not None and torch.is_grad_enabled():
        return trained(ids)[0]
    with torch.no_grad():
        return text_encoder(ids)[0]


def warn_of_long_captions(tokenizer, captions: list[str]) -> None:
    """Log a warning of captions that have more tokens than the text encoder reads."""
    lengths = [len(ids) for ids in tokenizer(captions, verbose=False).input_ids]
    long = [text for text, n in zip(captions, lengths, strict=True) if n > tokenizer.model_max_length]
    if long:
        logger.warning(
            f"{len(long)} captions have more than {tokenizer.model_max_length} tokens; what is over is not read. The"
            f" longest: {max(long, key=len)!r}"
        )
