"""The triplet loss of an embedding."""

import torch
from torch import Tensor

from ..errors import check_choice

MINING = ("batch_hard", "batch_all")


def triplet_loss(
    embeddings: Tensor, labels: Tensor, margin: float = 0.2, mining: str = "batch_hard"
) -> tuple[Tensor, float]:
    """max(0, d(anchor, positive) - d(anchor, negative) + margin) over the triplets of a batch; d is cosine distance.

    Args:
        embeddings: (B, D) of length 1.
        labels: (B,).
        mining: "batch_hard" takes for each anchor the farthest positive and the nearest negative and averages over
            anchors; "batch_all" averages over all triplets with a loss (Hermans et al. 2017, section 2).

    Returns the loss (0, but with a gradient, if there are no triplets) and the share of triplets with a loss.
    """
    check_choice("mining", mining, MINING)
    with torch.autocast(embeddings.device.type, enabled=False):
        distances = 1 - embeddings.float() @ embeddings.float().T
    same = labels[:, None] == labels
    positive, negative = same & ~torch.eye(len(labels), dtype=torch.bool, device=same.device), ~same
    if mining == "batch_hard":
        farthest = distances.where(positive, -torch.inf).amax(1)
        nearest = distances.where(negative, torch.inf).amin(1)
        losses = (farthest - nearest + margin)[positive.any(1) & negative.any(1)].relu()
    else:
        losses = (distances[:, :, None] - distances[:, None] + margin)[positive[:, :, None] & negative[:, None]].relu()
    active = int((losses > 0).sum())
    total = losses.sum() + 0 * embeddings.float().sum()
    count = len(losses) if mining == "batch_hard" else active
    return total / max(count, 1), active / max(len(losses), 1)
