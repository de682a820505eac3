import itertools

import pytest
import torch
import torch.nn.functional as F

from sketch_perceptual.errors import InputError
from sketch_perceptual.losses.triplet import triplet_loss


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def loss_by_triplets(embeddings, labels, margin, mining):
    distance = 1 - embeddings @ embeddings.T
    n, losses, hard = len(labels), [], []
    for a in range(n):
        positives = [p for p in range(n) if p != a and labels[p] == labels[a]]
        negatives = [k for k in range(n) if labels[k] != labels[a]]
        all_of_a = [distance[a, p] - distance[a, k] + margin for p, k in itertools.product(positives, negatives)]
        losses += [max(0.0, float(loss)) for loss in all_of_a]
        hard += [max(0.0, float(max(all_of_a)))] if all_of_a else []
    chosen = hard if mining == "batch_hard" else [loss for loss in losses if loss > 0]
    share = sum(loss > 0 for loss in (hard if mining == "batch_hard" else losses))
    total = len(hard) if mining == "batch_hard" else len(losses)
    return sum(chosen) / max(1, len(chosen)), share / max(1, total)


@pytest.mark.parametrize("mining", ["batch_hard", "batch_all"])
@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 2, 2], [0, 0, 0, 1], [0, 1, 2], [0, 0, 0]])
def test_the_triplet_loss_is_what_triplets_say(mining, labels):
    embeddings = unit(len(labels), 5, seed=len(labels)).requires_grad_()
    loss, active = triplet_loss(embeddings, torch.tensor(labels), 0.2, mining)
    expected, share = loss_by_triplets(embeddings.detach(), labels, 0.2, mining)
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-6)
    assert active == pytest.approx(share)
    loss.backward()
    assert embeddings.grad.isfinite().all()
    assert bool(embeddings.grad.any()) == (expected > 0)


@pytest.mark.parametrize("mining", ["batch_hard", "batch_all"])
def test_collapsed_embeddings_have_the_margin_as_loss_and_a_finite_gradient(mining):
    raw = torch.ones(4, 3, requires_grad=True)
    loss, active = triplet_loss(F.normalize(raw), torch.tensor([0, 0, 1, 1]), 0.2, mining)
    loss.backward()
    assert (float(loss), active) == (pytest.approx(0.2), 1)
    assert raw.grad.isfinite().all()


def test_distances_are_float32_under_autocast():
    embeddings = unit(6, 64)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = triplet_loss(embeddings, labels)
    assert torch.equal(inside, triplet_loss(embeddings, labels)[0])
    assert triplet_loss(embeddings.bfloat16(), labels)[0].dtype == torch.float32


def test_an_unknown_mining_is_named():
    with pytest.raises(InputError, match="`mining` must be one of batch_hard, batch_all, got 'semi'"):
        triplet_loss(unit(2, 2), torch.tensor([0, 1]), mining="semi")
