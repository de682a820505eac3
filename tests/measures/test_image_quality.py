import io
import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_clip import save_clip
from torch import nn
from transformers import CLIPImageProcessor, CLIPModel

from sketch_perceptual.data.images import fit_image, to_tensor
from sketch_perceptual.errors import InputError
from sketch_perceptual.measures.image_quality import (
    ClipFeatures,
    InceptionFeatures,
    frechet_distance,
    kernel_distance,
    ssim,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flat(level):
    return torch.full((1, 3, 16, 20), level)


def by_windows(x, y):
    """The definition, window by window, of two pictures (3, H, W) in [0, 1]."""
    weights = torch.exp(-torch.linspace(-5, 5, 11).double().square() / (2 * 1.5**2))
    weights = torch.outer(weights, weights) / weights.sum() ** 2
    x, y = (picture.double().unfold(1, 11, 1).unfold(2, 11, 1) for picture in (x, y))

    def mean(values):
        return (values * weights).sum((-2, -1))

    mx, my = mean(x), mean(y)
    variances, covariance = mean(x * x) - mx**2 + mean(y * y) - my**2, mean(x * y) - mx * my
    return ((2 * mx * my + 1e-4) * (2 * covariance + 9e-4) / ((mx**2 + my**2 + 1e-4) * (variances + 9e-4))).mean()


@pytest.mark.parametrize("size", [(11, 11), (11, 30), (24, 17)])
def test_ssim_is_its_definition(size):
    x, y = draw(1, 3, *size).sigmoid().float(), draw(1, 3, *size, seed=1).sigmoid().float()
    assert float(ssim(x * 2 - 1, y * 2 - 1)) == pytest.approx(float(by_windows(x[0], y[0])), abs=1e-5)


def test_ssim_known_answers():
    assert ssim(flat(1.0), flat(1.0)).tolist() == [1.0]
    assert float(ssim(flat(1.0), flat(-1.0))) == pytest.approx(1e-4 / (1 + 1e-4), rel=1e-3)  # means 1 and 0
    images = draw(4, 3, 32, 32).float().tanh()
    assert ssim(images, images).tolist() == pytest.approx([1.0] * 4, abs=1e-6)
    assert ssim(images, -images).max() < -0.5


def test_ssim_knows_no_batch_order_autocast_or_range():
    x, y = draw(5, 3, 20, 26).float(), draw(5, 3, 20, 26, seed=1).float()
    scores = ssim(x, y)
    assert (scores.shape, scores.dtype) == ((5,), torch.float32)
    assert torch.equal(scores, torch.cat([ssim(*pair) for pair in zip(x.split(1), y.split(1), strict=True)]))
    assert torch.allclose(scores, ssim(y, x), atol=1e-6)
    assert torch.equal(scores, ssim(x.clamp(-1, 1), y.clamp(-1, 1)))  # a saved picture ends there
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scores, ssim(x.requires_grad_(), y))
    pale = x.detach() * 0.01  # a range taken from the pictures would make these as unlike as x and y
    assert ssim(pale, -pale).min() > 0.5


@pytest.mark.parametrize(
    ("images", "target", "sentence"),
    [
        (torch.zeros(2, 3, 16, 16), torch.zeros(1, 3, 16, 16), r"equal shapes, got \(2, 3, 16, 16\) and \(1, 3"),
        (torch.zeros(1, 3, 16, 10), torch.zeros(1, 3, 16, 10), r"at least 11 pixels, got \(16, 10\)"),
        (torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16), r"floats \(B, 3, H, W\).*got torch.float32 \(1, 1, 16"),
        (torch.zeros(3, 16, 16), torch.zeros(3, 16, 16), r"got torch.float32 \(3, 16, 16\)"),
        (torch.zeros(0, 3, 16, 16), torch.zeros(0, 3, 16, 16), r"got torch.float32 \(0, 3, 16, 16\)"),
        (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "got torch.uint8"),
        (torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), math.nan), "NaN"),
    ],
)
def test_pictures_that_cannot_be_compared_are_said(images, target, sentence):
    with pytest.raises(InputError, match=sentence):
        ssim(images, target)


def test_frechet_known_answers():
    square = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])  # covariance 2/3 I
    assert frechet_distance(square, square) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(square + torch.tensor([3.0, 4]), square) == pytest.approx(25)
    assert frechet_distance(square * 3, square) == pytest.approx(2 * (2 / 3) * (3 - 1) ** 2)
    lines = torch.tensor([[1.0, 0], [-1, 0]]), torch.tensor([[0, 1.0], [0, -1]])  # no direction in common
    assert frechet_distance(*lines) == pytest.approx(4)


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 12), st.integers(0, 99))
def test_frechet_is_a_distance_at_any_rank(n, m, dim, seed):
    x, y = draw(n, dim, seed=seed), draw(m, dim, seed=seed + 100) * 2 + 1
    found = frechet_distance(x, y)
    assert found >= 0
    assert found == pytest.approx(frechet_distance(y, x), rel=1e-6, abs=1e-6)
    turn = torch.linalg.qr(draw(dim, dim, seed=seed)).Q
    assert found == pytest.approx(frechet_distance(x.flip(0) @ turn, y @ turn), rel=1e-6, abs=1e-6)
    assert frechet_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-6)


def test_equal_sets_are_at_0_with_fewer_rows_than_features():
    few = draw(64, 2048).float()
    assert frechet_distance(few, few.flip(0)) == pytest.approx(0, abs=1e-5)  # of variances that sum to 2048


def test_frechet_is_the_reference_formula_at_full_rank():
    linalg = pytest.importorskip("scipy.linalg")
    x, y = draw(200, 8) @ draw(8, 8, seed=1), draw(90, 8, seed=2) + 0.5
    first, second = x.T.cov(), y.T.cov()
    overlap = linalg.sqrtm((first @ second).numpy()).trace().real
    formula = (x.mean(0) - y.mean(0)).square().sum() + first.trace() + second.trace() - 2 * overlap
    assert frechet_distance(x, y) == pytest.approx(float(formula), rel=1e-9)


def test_kernel_distance_known_answer():
    """(x.y + 1)^3 of 0 and 1 with 2 and 2: 1 and 125 within, 1, 1, 27, 27 across."""
    mean, deviation = kernel_distance(torch.tensor([[0.0], [1]]), torch.tensor([[2.0], [2]]))
    assert (mean, deviation) == (pytest.approx(1 + 125 - 2 * 14), pytest.approx(0, abs=1e-9))


@pytest.mark.filterwarnings("ignore:Metric .Kernel Inception Distance")
def test_kernel_distance_is_torchmetrics():
    kid = pytest.importorskip("torchmetrics.image.kid")
    x, y = draw(30, 6), draw(30, 6, seed=1) + 1
    metric = kid.KernelInceptionDistance(nn.Flatten(), subsets=3, subset_size=30)
    metric.update(x, real=False)
    metric.update(y, real=True)
    assert kernel_distance(x, y) == (pytest.approx(float(metric.compute()[0])), pytest.approx(0, abs=1e-9))


def test_kernel_distance_is_unbiased_and_decided_by_its_seed():
    x, y = draw(400, 8), draw(300, 8, seed=1)
    mean, deviation = kernel_distance(x, y, subset_size=50)
    assert abs(mean) < deviation / 2  # of one distribution
    assert kernel_distance(x, y, subset_size=50) == (mean, deviation)
    assert kernel_distance(x, y, subset_size=50, seed=1) != (mean, deviation)
    assert kernel_distance(x, y + 0.5, subset_size=50)[0] > 4 * deviation
    assert kernel_distance(x, y) == kernel_distance(x, y, subset_size=300)  # as many as there are


@pytest.mark.parametrize(
    ("features", "reference", "sentence"),
    [
        (torch.zeros(1, 4), draw(5, 4), r"features must be .*got \(1, 4\)"),
        (draw(5, 4), torch.zeros(0, 4), r"reference must be .*got \(0, 4\)"),
        (draw(5, 4, 1), draw(5, 4), r"got \(5, 4, 1\)"),
        (draw(5, 4) / 0, draw(5, 4), "features must be finite"),
        (draw(5, 4), draw(5, 4) * math.nan, "reference must be finite"),
        (draw(5, 4), draw(5, 3), "features have 4 .* reference has 3"),
    ],
)
def test_sets_that_cannot_be_compared_are_said(features, reference, sentence):
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(InputError, match=sentence):
            distance(features, reference)


def test_what_one_distance_alone_refuses_is_said():
    with pytest.raises(InputError, match="rows of reference are all the same"):
        frechet_distance(draw(5, 4), torch.ones(5, 4))
    for options in ({"subsets": 0}, {"subset_size": 1}):
        with pytest.raises(InputError, match=r"`subsets` must be at least 1 and `subset_size` at least 2"):
            kernel_distance(draw(5, 4), draw(5, 4), **options)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A safetensors file of a random Inception whose signal does not die, and the network."""
    library = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    class Untrained(library.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            pass

    nothing, path = io.BytesIO(), tmp_path_factory.mktemp("inception") / "inception.safetensors"
    torch.save({}, nothing)
    nothing.seek(0)
    network = Untrained("", ["2048"], feature_extractor_weights_path=nothing).eval()
    generator = torch.Generator().manual_seed(0)
    for weight in network.parameters():
        if weight.ndim == 4:
            nn.init.kaiming_normal_(weight, generator=generator)
    save_file(network.state_dict(), path)
    return path, network


def test_inception_is_the_saved_one(inception):
    path, network = inception
    features = InceptionFeatures(path)
    images = draw(2, 3, 40, 56).float().requires_grad_()
    found = features(images)
    assert (found.shape, found.dtype, found.requires_grad) == ((2, 2048), torch.float32, False)
    levels = (images.detach().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    assert torch.equal(found, network(levels)[0])
    assert (found[0] - found[1]).abs().max() > 0.01 * found.max()  # the random network tells pictures apart
    assert torch.allclose(found[1:], features(images[1:]), rtol=0, atol=1e-5 * float(found.max()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(found, features(images))
    assert not any(module.training for module in features.modules())
    assert not any(parameter.requires_grad for parameter in features.parameters())
    with pytest.raises(InputError, match="NaN"):
        features(images * math.nan)


def test_inception_weights_that_do_not_fit_say_how_to_make_them(inception, tmp_path, monkeypatch):
    path, network = inception
    monkeypatch.chdir(tmp_path)
    pickled = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    torch.save({name: value for name, value in network.state_dict().items() if "num_batches" not in name}, pickled)
    save_file({name: value for name, value in load_file(path).items() if name != "fc.bias"}, "short.safetensors")
    for source, reason in (("none", "there is no"), (pickled, "pickles"), ("short.safetensors", "fc.bias")):
        with pytest.raises(InputError, match=f"(?s)is not FID's Inception.*{reason}.*Download https") as error:
            InceptionFeatures(source)
    exec(re.search('python -c "(.*)"', str(error.value))[1], {})
    made = InceptionFeatures("inception.safetensors").network.state_dict()
    assert all(torch.equal(value, made[name]) for name, value in network.state_dict().items())


def test_packages_that_are_missing_are_said(monkeypatch):
    for module in ("torchmetrics.functional.image", "torchmetrics.image.kid"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    for call in (lambda: ssim(flat(1.0), flat(1.0)), lambda: kernel_distance(draw(5, 4), draw(5, 4))):
        with pytest.raises(InputError, match=r"needs torchmetrics .*: pip install 'sketch-perceptual\[eval\]'"):
            call()
    with pytest.raises(InputError, match=r"needs torch_fidelity .*: pip install 'sketch-perceptual\[eval\]'"):
        InceptionFeatures("any.safetensors")


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


def test_clip_sees_what_transformers_sees(clip, drawings):
    network = ClipFeatures(clip)
    model, processor = CLIPModel.from_pretrained(clip), CLIPImageProcessor.from_pretrained(clip)
    pictures = [fit_image(Image.open(path), 32) for path in sorted(drawings.rglob("*.png"))[:3]]
    with torch.no_grad():
        expected = model.get_image_features(**processor(pictures, return_tensors="pt"))
    expected = getattr(expected, "pooler_output", expected)
    found = network.features(torch.stack(list(map(to_tensor, pictures))))
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.999  # it resizes eight-bit levels
    assert torch.allclose(network.features(to_tensor(pictures[0])[None]), found[:1], atol=1e-6)


def test_a_long_prompt_keeps_its_end_token(clip):
    """And neither the other prompts of a batch nor their length change a prompt's vector."""
    network = ClipFeatures(clip)
    long = "a sketch of a fox"
    tokens = network.tokenizer(long).input_ids
    assert len(tokens) > 12
    kept = torch.tensor([[*tokens[:11], network.tokenizer.eos_token_id]])
    with torch.no_grad():
        expected = network.model.get_text_features(input_ids=kept, attention_mask=torch.ones_like(kept))
    expected = getattr(expected, "pooler_output", expected)
    assert torch.allclose(network.texts([long]), expected, atol=1e-6)
    together = network.texts(["a fox", long, *["an owl"] * 70])
    assert torch.allclose(together[:1], network.texts(["a fox"]), atol=1e-6)
    assert torch.allclose(together[-1:], network.texts(["an owl"]), atol=1e-6)


def test_transformers_4_returns_the_vectors_themselves(clip, monkeypatch):
    network = ClipFeatures(clip)
    for output in (torch.ones(1, 8), SimpleNamespace(pooler_output=torch.ones(1, 8))):
        monkeypatch.setattr(network.model, "get_text_features", lambda output=output, **tokens: output)
        assert network.texts(["a"]).sum() == 8


def test_what_is_cached_depends_on_how_pictures_are_prepared(clip, inception):
    """The background too: without it, white's features were read for black."""
    transparent = Image.new("RGBA", (3, 4), (0, 0, 0, 0))
    for kind, source in ((ClipFeatures, clip), (InceptionFeatures, inception[0])):
        options = ({}, {"background": "black"}, {"fit": "pad"}, {"resolution": 33})
        assert len({kind(source, **of).feature_key for of in options}) == 4
        black = kind(source, background="black", resolution=5).prepare(transparent)
        assert black.shape == (3, 5, 5)
        assert black.unique().tolist() == [-1]
