"""The weight of a perceptual loss as a ratio of gradients."""

import torch
from torch import Tensor

from ..errors import InputError

# No perceptual loss, 1 for unrelated drawings, counts more: a row that is right already is not to be blown up.
MAX_FACTOR = 1.0


def balance(loss: Tensor, values: Tensor, model_pred: Tensor, weight: float) -> tuple[Tensor, dict[str, Tensor]]:
    """`loss`, a scalar, plus `values` (B,), which pull `weight` times as hard as it at each row of `model_pred`.

    A row's factor makes the length of its gradient at the prediction `weight` times that of the gradient of `loss`,
    but is no more than MAX_FACTOR of a mean over rows. What lies between the prediction and `values`, decoder and
    backbone, is passed through backwards here, once; the backward pass of the sum leads from the prediction on.

    Returns the sum and what was reached at each row, (B,), 0 where `values` has no gradient: "factor", of a mean over
    rows; "gradient_ratio" of the lengths, and "gradient_cosine" of the angle between the gradients.
    """
    if loss.ndim:
        raise InputError(f"`loss` must be a scalar, got {tuple(loss.shape)}: take its mean first")
    if weight == 0 or not values.requires_grad:
        return loss, dict.fromkeys(("factor", "gradient_ratio", "gradient_cosine"), torch.zeros_like(values))
    if not loss.requires_grad:
        raise InputError("`loss` carries no gradient, so nothing would be learned: pass it as computed, not detached")
    (pull,) = torch.autograd.grad(values.sum(), model_pred)
    (own,) = torch.autograd.grad(loss, model_pred, retain_graph=True, allow_unused=True)
    if own is None:
        raise InputError(
            "`loss` must be computed from `model_pred`: pass the tensor that it came from, not a copy. A compiled step"
            " cuts the two apart: compile the model, unet = torch.compile(unet), and not the step around it"
        )
    pull, own = pull.float().flatten(1) / len(values), own.float().flatten(1)
    tiny = torch.finfo(torch.float32).tiny
    length, own_length = pull.norm(dim=1), own.norm(dim=1)
    factor = (weight * own_length / length.clamp(min=tiny)).clamp(max=MAX_FACTOR)
    linear = (model_pred.flatten(1) * (factor[:, None] * pull)).sum()  # whose gradient is what the term adds
    return loss + (factor * values).mean().detach() + (linear - linear.detach()), {
        "factor": factor,
        "gradient_ratio": factor * length / own_length.clamp(min=tiny),
        "gradient_cosine": (pull * own).sum(1) / (length * own_length).clamp(min=tiny),
    }
