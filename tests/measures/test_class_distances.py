import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sketch_perceptual.errors import InputError
from sketch_perceptual.measures.class_distances import ClassDistances, class_distances


def by_pairs(embeddings, labels):
    """The definition: the mean over pairs of 1 - cosine, within, across, and for each class."""
    n, vectors = len(labels), embeddings.double()
    pairs = {(i, j): 1 - float(F.cosine_similarity(vectors[i], vectors[j], 0)) for i in range(n) for j in range(n)}

    def mean(wanted):
        chosen = [value for (i, j), value in pairs.items() if i != j and wanted(labels[i], labels[j])]
        return sum(chosen) / len(chosen) if chosen else math.nan

    classes = range(max(labels) + 1)
    return (
        mean(lambda a, b: a == b),
        mean(lambda a, b: a != b),
        [mean(lambda a, b, c=c: a == b == c) for c in classes],
        [mean(lambda a, b, c=c: a == c != b) for c in classes],
    )


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=14), st.integers(1, 9), st.integers(0, 99), st.booleans())
def test_sums_say_what_all_pairs_say(labels, dim, seed, zeros):
    embeddings = torch.randn(len(labels), dim, generator=torch.Generator().manual_seed(seed)) * 10 ** torch.randn(1)
    if zeros:
        embeddings[:: 1 + seed % 3] = 0
    found = class_distances(embeddings, labels)
    intra, inter, class_intra, class_inter = by_pairs(embeddings, labels)
    for ours, theirs in (
        (found.intra, intra),
        (found.inter, inter),
        (found.class_intra, class_intra),
        (found.class_inter, class_inter),
    ):
        assert ours == pytest.approx(theirs, abs=1e-9, nan_ok=True)
    assert found.counts == [labels.count(label) for label in range(max(labels) + 1)]
    assert found.zero_vectors == int((embeddings == 0).all(1).sum())


def test_known_answers():
    square = torch.tensor([[1.0, 0], [3, 0], [0, 2], [0, -1]])
    found = class_distances(square, [0, 0, 1, 1])
    assert (found.intra, found.inter, found.ratio) == (1.0, 1.0, 1.0)  # 0 and 2 within; all across are orthogonal
    assert (found.class_intra, found.class_inter) == ([0.0, 2.0], [1.0, 1.0])
    same = class_distances(torch.tensor([[1.0, 0], [1, 0], [0, 1]]), [0, 0, 1])
    assert (same.intra, same.ratio) == (0.0, math.inf)
    assert math.isnan(same.class_intra[1])  # one drawing


def test_one_class_has_no_inter_and_lone_drawings_no_intra():
    one = class_distances(torch.randn(3, 4), [0, 0, 0])
    assert math.isnan(one.inter)
    assert math.isnan(one.ratio)
    alone = class_distances(torch.randn(3, 4), [0, 1, 2])
    assert math.isnan(alone.intra)
    assert alone.inter > 0


def test_batches_in_any_order_and_precision_are_one():
    draw = torch.Generator().manual_seed(0)
    embeddings, labels = torch.randn(101, 8, generator=draw), torch.randint(5, (101,), generator=draw)
    whole, parts = class_distances(embeddings, labels), ClassDistances(5)
    for rows in torch.randperm(101, generator=draw).split(7):
        parts.update(embeddings[rows], labels[rows])
    assert parts.compute().intra == pytest.approx(whole.intra, abs=1e-12)
    assert parts.compute().class_inter == pytest.approx(whole.class_inter, abs=1e-12)
    assert parts.sums.shape == (5, 8)  # all that is kept
    half = class_distances(embeddings.half(), labels)
    assert half.inter == pytest.approx(whole.inter, abs=1e-4)


@pytest.mark.parametrize(
    ("embeddings", "labels", "sentence"),
    [
        (torch.zeros(2, 3, 4), [0, 1], r"expected embeddings \(B, D\)"),
        (torch.zeros(2, 3), [0, 1, 1], r"labels \(B,\), got \(2, 3\), \(3,\)"),
        (torch.tensor([[math.nan]]), [0], "must be finite"),
        (torch.zeros(2, 3), [0, -1], "labels must lie between 0 and 0"),
        (torch.zeros(0, 3), [], "no embeddings"),
    ],
)
def test_what_cannot_be_measured_is_said(embeddings, labels, sentence):
    with pytest.raises(InputError, match=sentence):
        class_distances(embeddings, labels)


def test_nothing_measured_is_said():
    with pytest.raises(InputError, match="no embeddings"):
        ClassDistances(3).compute()
