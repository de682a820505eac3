import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torchmetrics.functional.retrieval import retrieval_average_precision, retrieval_hit_rate, retrieval_recall

from sketch_perceptual.data.batches import pk_batches
from sketch_perceptual.data.images import fit_image, to_tensor
from sketch_perceptual.errors import InputError
from sketch_perceptual.losses.triplet import triplet_loss
from sketch_perceptual.measures import ranking
from sketch_perceptual.measures.ranking import rank, search
from sketch_perceptual.networks.backbone import AttentionVGG16
from sketch_perceptual.networks.embedder import SketchEmbedder, load_embedder, make_embedder
from sketch_perceptual.seeds import generator

pytestmark = pytest.mark.usefixtures("narrow")
CONFIG = {"attention": "cbam", "pool_after_attention": True, "reduction": 2}


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize(
    ("embedding", "head", "dim"),
    [("pooled", "vgg", 8), ("flat", "linear", 8 * 49), ("logits", "vgg", 5), ("head", "linear", 5)],
)
def test_every_embedding_is_what_its_name_says(embedding, head, dim, tmp_path):
    torch.manual_seed(0)
    embedder = SketchEmbedder(CONFIG | {"num_classes": 5, "head": head}, embedding, resolution=64)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    found, last = embedder(images), embedder.backbone.last_map(images)
    expected = {
        "pooled": last.mean((2, 3)),
        "flat": F.adaptive_avg_pool2d(last, 7).flatten(1),
        "logits": embedder.backbone(images),
        "head": embedder.backbone(images),
    }[embedding]
    assert found.shape == (2, dim)
    torch.testing.assert_close(found, F.normalize(expected))
    assert not embedder.training
    assert not any(weight.requires_grad for weight in embedder.parameters())
    embedder.save_pretrained(tmp_path)
    again = SketchEmbedder.from_pretrained(tmp_path)
    assert torch.equal(again(images), found)
    assert json.loads((tmp_path / "config.json").read_text())["embedding"] == embedding


def test_embed_takes_pictures_of_any_kind_and_batch_size(tmp_path):
    torch.manual_seed(0)
    embedder = SketchEmbedder(CONFIG | {"num_classes": 0}, resolution=48, fit="pad")
    draw = torch.Generator().manual_seed(1)
    pictures = [
        Image.fromarray(torch.randint(256, (h, w, 3), generator=draw, dtype=torch.uint8).numpy())
        for h, w in ((48, 48), (30, 70), (200, 90))
    ]
    pictures[1].save(tmp_path / "wide.png")
    found = embedder.embed([pictures[0], tmp_path / "wide.png", pictures[2]], batch_size=2)
    tensors = torch.stack([to_tensor(fit_image(picture, 48, "pad")) for picture in pictures])
    torch.testing.assert_close(found, embedder(tensors))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    clear = Image.new("RGBA", (48, 48), (0, 0, 0, 0))
    torch.testing.assert_close(embedder.embed([clear]), embedder.embed([Image.new("RGB", (48, 48), "white")]))
    with pytest.raises(InputError, match="no images to embed"):
        embedder.embed([])


def test_an_embedder_loads_from_backbones_embedders_and_weights(tmp_path):
    torch.manual_seed(0)
    tuned = AttentionVGG16(**CONFIG, num_classes=3, head="linear", classes=["a", "b", "c"])
    tuned.save_pretrained(tmp_path / "tuned")
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    bare = load_embedder(tmp_path / "tuned", resolution=64)
    assert (bare.embedding, bare.resolution, bare.fit) == ("pooled", 64, "pad")
    torch.testing.assert_close(bare(images), F.normalize(tuned.last_map(images).mean((2, 3))))
    logits = load_embedder(tmp_path / "tuned", embedding="logits", fit="crop", background=None)
    torch.testing.assert_close(logits(images), F.normalize(tuned(images)))

    trained = SketchEmbedder(CONFIG | {"num_classes": 6, "head": "linear"}, "head", 32, "crop")
    trained.save_pretrained(tmp_path / "trained")
    own = load_embedder(tmp_path / "trained", embedding=None, resolution=None)
    assert (own.embedding, own.resolution, own.fit) == ("head", 32, "crop")
    pooled = load_embedder(tmp_path / "trained", embedding="pooled")
    assert (pooled.resolution, pooled(images).shape) == (32, (2, 8))

    vgg = AttentionVGG16("none", num_classes=0)
    save_file(vgg.state_dict(), tmp_path / "vgg.safetensors")
    assert load_embedder(tmp_path / "vgg.safetensors").backbone.attention == "none"
    for source, option, sentence in (
        ("tuned", "head", "tuned is a backbone, without a head"),
        ("trained", "logits", "trained has a head that was trained to embed, no classifier"),
        ("vgg.safetensors", "logits", "needs a backbone with a classifier"),
        ("nothing", None, "no network at .*nothing"),
    ):
        with pytest.raises(InputError, match=sentence):
            load_embedder(tmp_path / source, embedding=option)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"embedding": "mean"}, "--embedding must be one of pooled, flat, logits, head"),
        ({"fit": "squeeze"}, "--fit must be one of"),
        ({"resolution": 0}, "--resolution must be at least 1"),
        ({"background": "whiet"}, "--background: 'whiet' is not a colour"),
    ],
)
def test_a_wrong_option_is_named(options, sentence):
    with pytest.raises(InputError, match=sentence):
        SketchEmbedder(CONFIG | {"num_classes": 0}, **options)


def test_the_feature_key_changes_with_what_changes_features_and_with_nothing_else():
    torch.manual_seed(0)
    network = AttentionVGG16(**CONFIG, num_classes=4, head="linear")
    other = AttentionVGG16(**CONFIG, num_classes=4, head="linear")
    options = [{}, {"resolution": 64}, {"fit": "crop"}, {"background": "black"}, {"embedding": "flat"}]
    keys = [make_embedder(network, **option).feature_key for option in options] + [make_embedder(other).feature_key]
    assert len(set(keys)) == 6
    assert make_embedder(network, embedding="logits", background="#fff").feature_key == keys[0]


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
    with pytest.raises(InputError, match="--mining must be one of batch_hard, batch_all, got 'semi'"):
        triplet_loss(unit(2, 2), torch.tensor([0, 1]), mining="semi")


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(1, 8), st.integers(1, 5), st.integers(0, 99))
def test_batches_hold_each_drawing_once_in_groups_of_k(labels, p, k, seed):
    batches = pk_batches(labels, p, k, generator(seed))
    assert sorted(itertools.chain(*batches)) == list(range(len(labels)))
    for batch in batches:
        counts = [sum(labels[index] == label for index in batch) for label in {labels[index] for index in batch}]
        assert len(counts) <= p
        assert max(counts) <= k
    assert batches == pk_batches(labels, p, k, generator(seed))


def test_balanced_classes_fill_batches_and_orders_differ_by_seed():
    labels = [index % 8 for index in range(160)]
    batches = pk_batches(labels, 4, 5, generator(0))
    assert sum(len(batch) == 20 for batch in batches) >= 6
    assert batches != pk_batches(labels, 4, 5, generator(1))


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
