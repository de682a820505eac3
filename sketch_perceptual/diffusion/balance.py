"""The weight of a perceptual loss as a ratio of gradients."""

import torch
from torch import Tensor

from ..errors import InputError

# Upper bound of a row's factor: a row that is right already must not be amplified.
MAX_FACTOR = 1.0


def balance(loss: Tensor, values: Tensor, model_pred: Tensor, weight: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Add `values` (B,) to a scalar `loss`, scaled so that they pull `weight` times as hard at each row.

    The factor of a row makes the norm of its gradient at `model_pred` equal to `weight` times the norm of the gradient
    of `loss`, but at most MAX_FACTOR. The part of the graph between the prediction and `values`, decoder and backbone,
    is traversed backwards here, once; the backward pass of the sum starts at the prediction.

    Returns:
        The sum, and per row (B,), 0 where `values` has no gradient: "factor"; "gradient_ratio" of the norms;
        "gradient_cosine", the cosine between the gradients.
    """
    if loss.ndim:
        raise InputError(f"`loss` must be a scalar, got {tuple(loss.shape)}: take its mean first")
    if weight == 0 or not values.requires_grad:
        return loss, dict.fromkeys(("factor", "gradient_ratio", "gradient_cosine"), torch.zeros_like(values))
    if not loss.requires_grad:
        raise InputError("`loss` carries no gradient, so nothing would be learned: pass it as computed, not detached")
    (pull,) = torch.autograd.grad(values.sum(), model_pred)
    (base,) = torch.autograd.grad(loss, model_pred, retain_graph=True, allow_unused=True)
    if base is None:
        raise InputError(
            "`loss` must be computed from `model_pred`: pass the tensor that it came from, not a copy. A compiled step"
            " cuts the two apart: compile the model, unet = torch.compile(unet), and not the step around it"
        )
    pull, base = pull.float().flatten(1) / len(values), base.float().flatten(1)
    tiny = torch.finfo(torch.float32).tiny
    length, base_length = pull.norm(dim=1), base.norm(dim=1)
    factor = (weight * base_length / length.clamp(min=tiny)).clamp(max=MAX_FACTOR)
    linear = (model_pred.flatten(1) * (factor[:, None] * pull)).sum()  # its gradient is that of the term
    return loss + (factor * values).mean().detach() + (linear - linear.detach()), {
        "factor": factor,
        "gradient_ratio": factor * length / base_length.clamp(min=tiny),
        "gradient_cosine": (pull * base).sum(1) / (length * base_length).clamp(min=tiny),
    }
