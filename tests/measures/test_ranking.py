import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.retrieval import retrieval_average_precision, retrieval_hit_rate, retrieval_recall

from sketch_perceptual.errors import InputError
from sketch_perceptual.measures import ranking
from sketch_perceptual.measures.ranking import rank, search


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.integers(1, 30), st.integers(1, 5), st.integers(0, 999))
def test_ranking_agrees_with_torchmetrics(q, m, classes, seed):
    draw = torch.Generator().manual_seed(seed)
    queries, gallery = unit(q, 4, seed=seed), unit(m, 4, seed=seed + 1)
    query_labels, gallery_labels = (torch.randint(classes, (n,), generator=draw) for n in (q, m))
    expected = []
    for query, label in zip(queries, query_labels, strict=True):
        scores, relevant = gallery @ query + 2, gallery_labels == label  # torchmetrics leaves out what is negative
        if relevant.any():
            expected.append(
                [
                    retrieval_hit_rate(scores, relevant, top_k=1),
                    retrieval_hit_rate(scores, relevant, top_k=5),
                    retrieval_average_precision(scores, relevant),
                    retrieval_recall(scores, relevant, top_k=3),
                ]
            )
    if not expected:
        with pytest.raises(InputError, match="no query has a drawing of its class"):
            rank(queries, gallery, query_labels, gallery_labels)
        return
    found = rank(queries, gallery, query_labels, gallery_labels, recall_at=[3]).scores
    names = ("top1", "top5", "map", "recall@3")
    assert [found[name] for name in names] == pytest.approx(torch.tensor(expected).mean(0).tolist(), abs=1e-6)
    assert (found["queries"], found["unmatched"]) == (len(expected), q - len(expected))


def test_copies_of_a_query_are_neither_ranked_nor_matches():
    gallery = torch.tensor([[1.0, 0], [1, 0.1], [0.9, 0.5], [0, 1]])
    query, labels = gallery[:1], [7, 7, 8, 7]
    everything = rank(query, gallery, [7], labels)
    assert everything.nearest.tolist() == [[0, 1, 2, 3, -1]]
    without = rank(query, gallery, [7], labels, [5], [5, 5, 6, 9])
    assert without.nearest.tolist() == [[2, 3, -1, -1, -1]]
    assert (without.scores["top1"], without.scores["map"]) == (0, 0.5)
    with pytest.raises(InputError, match="no query has"):
        rank(query, gallery, [7], labels, [5], [5, 5, 6, 5])


def test_equals_come_in_the_gallerys_order_whatever_the_chunk(monkeypatch):
    queries, gallery = unit(9, 64), unit(4, 64, seed=1).repeat(50, 1)
    whole = rank(queries, gallery, [0] * 9, [0, 1] * 100)
    for cells in (1, 3 * 200, 7 * 200):
        monkeypatch.setattr(ranking, "CELLS", cells)
        parts = rank(queries, gallery, [0] * 9, [0, 1] * 100)
        assert torch.equal(parts.nearest, whole.nearest)
        assert parts.scores == pytest.approx(whole.scores)
    assert whole.nearest[0].tolist() == list(range(int(whole.nearest[0, 0]), 200, 4))[:5]
    assert search(queries[0], gallery, 5)[1] == whole.nearest[0].tolist()


def test_search_is_by_similarity():
    similarities, order = search(torch.tensor([3.0, 0]), torch.tensor([[0, 1.0], [2, 0], [1, 1]]), 2)
    assert order == [1, 2]
    assert similarities == pytest.approx([1, 0.5**0.5])


@pytest.mark.parametrize("bad", [torch.zeros(0, 3), torch.zeros(3), torch.full((2, 3), torch.nan)])
def test_embeddings_that_cannot_be_ranked_are_said(bad):
    with pytest.raises(InputError, match="gallery must be finite embeddings"):
        rank(unit(1, 3), bad, [0], [0] * len(bad))
