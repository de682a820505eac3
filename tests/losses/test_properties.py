"""Properties that every built-in loss has: as a distance, as a module in somebody's model, and while it is traced."""

import copy
import pickle
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sketch_perceptual.data.images import to_tensor
from sketch_perceptual.drawings import draw
from sketch_perceptual.errors import InputError
from sketch_perceptual.losses import (
    LOSSES,
    ImageLoss,
    PerceptualLoss,
    all_weights,
    build_loss,
    build_losses,
    named_networks,
)
from sketch_perceptual.networks import backbone as backbone_module
from sketch_perceptual.networks.backbone import AttentionVGG16, load_backbone
from sketch_perceptual.networks.hub_model import fingerprint

NARROW = ((4, 4), (4, 4), (8, 8, 8), (8, 8, 8), (8, 8, 8))
NAMES = [*LOSSES, "mean"]


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Builds a loss by name, on narrow networks except for lpips."""
    folder = tmp_path_factory.mktemp("backbones")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AttentionVGG16("none", num_classes=0).save_pretrained(folder / "trunk")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backbone_module, "STAGES", NARROW)
            AttentionVGG16("none", num_classes=0).save_pretrained(folder / "plain")
            AttentionVGG16(num_classes=0, pool_after_attention=True, reduction=2).save_pretrained(folder / "tuned")
    sources = {"vgg": "plain", "pixel": None, "tone": None}

    @cache
    def build(name):
        if name == "lpips":
            return build_loss(name, backbone=str(folder / "trunk" / "model.safetensors"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backbone_module, "STAGES", NARROW)
            if name == "mean":
                return build_losses(["attention_vgg", "gram=0.5"], backbone=str(folder / "tuned"))
            source = sources.get(name, "tuned")
            return build_loss(name, backbone=source and str(folder / source))

    return build


@pytest.fixture(params=NAMES)
def loss(request, make):
    return make(request.param)


@pytest.fixture(params=NAMES)
def fresh(request, make):
    """A loss that a test may change."""
    return copy.deepcopy(make(request.param))


def drawings(*names, side=32):
    return torch.stack([to_tensor(draw(name, 0, 0, "pen", side)) for name in names])


@pytest.fixture(scope="module")
def pair():
    return drawings("cat", "house"), drawings("boat", "tree")


class Model(nn.Module):
    """What holds a loss in other people's code."""

    def __init__(self, loss):
        super().__init__()
        self.net = nn.Conv2d(3, 3, 3, padding=1)
        self.loss = loss

    def forward(self, images, target):
        return self.loss(self.net(images), target)


# --- a distance ---------------------------------------------------------------------------------------------------


def test_it_is_symmetric_and_zero_on_equals(loss, pair):
    x, y = pair
    torch.testing.assert_close(loss(x, y), loss(y, x))
    assert (loss(x, y) > 0).all()
    assert float(loss(x, x).abs().max()) < 1e-6


def test_it_grows_with_noise(loss, pair):
    x = pair[0]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    values = torch.stack([loss((x + level * noise).clamp(-1, 1), x).mean() for level in (0, 0.05, 0.2, 0.6)])
    assert (values.diff() > 0).all()


def test_it_grows_with_blur(loss, pair):
    x, values = pair[0], []
    for side in (1, 3, 7):
        padded = F.pad(x, [side // 2] * 4, mode="replicate")
        values.append(loss(F.avg_pool2d(padded, side, stride=1), x).mean())
    assert (torch.stack(values).diff() > 0).all()


def test_a_row_does_not_depend_on_its_batch(loss, pair):
    x, y = pair
    whole = loss(x, y)
    for row in (0, 1):
        torch.testing.assert_close(loss(x[row : row + 1], y[row : row + 1])[0], whole[row], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss(x.flip(0), y.flip(0)), whole.flip(0), rtol=1e-4, atol=1e-6)


def test_grey_is_its_rgb(loss, pair):
    x, y = (image.mean(1, keepdim=True) for image in pair)
    assert torch.equal(loss(x, y), loss(x.expand(-1, 3, -1, -1), y.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_floating_dtype_is_computed_in_the_dtype_of_the_weights(loss, pair, dtype):
    x, y = (image.to(dtype) for image in pair)
    value = loss(x, y)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(x.float(), y.float()))


def test_the_layout_in_memory_changes_nothing(loss, pair):
    x, y = pair
    expected = loss(x, y)
    wide = torch.stack([x, x], -1).flatten(3)[..., ::2]
    for layout in (x.contiguous(memory_format=torch.channels_last), wide, x.mT.contiguous().mT):
        torch.testing.assert_close(loss(layout, y), expected)
    one = x[:1].expand(2, -1, -1, -1)
    torch.testing.assert_close(loss(one, y), loss(one.contiguous(), y))


def test_the_gradient_reaches_the_images_and_is_finite_on_equals(loss, pair):
    x, y = pair[0].clone().requires_grad_(), pair[1].clone().requires_grad_()
    loss(x, y).sum().backward()
    assert x.grad.flatten(1).abs().sum(1).gt(0).all()
    assert x.grad.isfinite().all()
    assert y.grad is None
    (equal,) = torch.autograd.grad(loss(x, x.detach()).sum(), x)
    assert equal.isfinite().all()


def test_the_gradient_is_the_slope(loss, pair):
    # averaged over a smooth direction: single pixels cross the kinks of ReLU and L1
    x, y = pair[0].double().requires_grad_(), pair[1].double()
    loss = copy.deepcopy(loss).double()
    direction = F.avg_pool2d(torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double(), 5, 1, 2)
    (gradient,) = torch.autograd.grad(loss(x, y).sum(), x)
    step = 1e-3
    slope = (loss(x + step * direction, y) - loss(x - step * direction, y)).double().sum() / (2 * step)
    torch.testing.assert_close(float((gradient * direction).sum()), float(slope), rtol=0.2, atol=1e-2)


# --- a module in a model ------------------------------------------------------------------------------------------


def test_its_weights_are_nobodys_parameters(fresh, pair):
    model, before = Model(fresh), fingerprint(all_weights(fresh))
    assert set(dict(model.named_parameters())) == set(model.state_dict()) == {"net.weight", "net.bias"}
    model.requires_grad_(True).train()
    model.apply(lambda module: nn.init.zeros_(module.weight) if isinstance(module, nn.Conv2d) else None)
    optimizer = torch.optim.Adam([*model.parameters(), *fresh.parameters()], lr=0.1)
    model(*pair).sum().backward()
    optimizer.step()
    assert fingerprint(all_weights(fresh)) == before
    weights = [weight for _, module in named_networks(fresh) for weight in module.parameters()]
    assert not any(weight.requires_grad or weight.grad is not None for weight in weights)
    assert not any(module.training for _, module in named_networks(fresh) if module is not fresh)


def test_checkpoints_with_and_without_its_weights_load_strictly(fresh):
    model = Model(fresh)
    before = fingerprint(all_weights(fresh))
    old = {f"loss.{name}": torch.zeros_like(weight) for name, weight in all_weights(fresh).items()}
    model.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(model.state_dict() | old, strict=True)
    assert fingerprint(all_weights(fresh)) == before
    with pytest.raises(RuntimeError, match=r"Unexpected key.*loss\.other"):
        model.load_state_dict(model.state_dict() | {"loss.other": torch.zeros(1)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_it_is_cast_with_its_parent(fresh, pair, dtype):
    x, y = pair
    expected = fresh(x, y)
    Model(fresh).to(dtype)
    assert {weight.dtype for weight in all_weights(fresh).values()} <= {dtype}
    value = fresh(x, y)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=0.1 if dtype == torch.bfloat16 else 1e-3, atol=1e-4)


def test_a_parent_without_its_weights_is_refused(fresh):
    """No checkpoint of the parent could give them back."""
    before = fingerprint(all_weights(fresh))
    for lose in (lambda model: model.to("meta"), lambda model: model.to_empty(device="cpu")):
        if before:
            with pytest.raises(InputError, match="build it after the parent has been moved"):
                lose(Model(fresh))
    assert fingerprint(all_weights(fresh)) == before


def test_copies_and_pickles_say_the_same(loss, pair):
    expected = loss(*pair)
    for twin in (copy.deepcopy(Model(loss)).loss, pickle.loads(pickle.dumps(Model(loss))).loss):
        assert torch.equal(twin(*pair), expected)
        twin.to(torch.bfloat16)
    assert torch.equal(loss(*pair), expected)


@pytest.mark.parametrize("name", ["attention_vgg", "gram"])
def test_a_callers_own_network_stays_theirs(narrow, name):
    network = AttentionVGG16(num_classes=3, reduction=2, head="linear", pool_after_attention=True).train()
    loss = LOSSES[name](network, layers=["relu1_2", "relu3_3"])
    assert network.training
    assert all(weight.requires_grad for weight in network.parameters())
    assert network.calibration == loss.calibration
    ours, theirs = loss.backbone.features[0].weight, network.features[0].weight
    assert ours.data_ptr() == theirs.data_ptr()
    loss.to(torch.bfloat16)
    assert theirs.dtype == torch.float32
    x, y = drawings("cat").requires_grad_(), drawings("boat")
    loss(x, y).sum().backward()
    assert all(weight.grad is None for weight in network.parameters())


def test_a_loss_of_ones_own_keeps_its_network_to_itself(narrow, pair):
    class Mine(ImageLoss):
        def __init__(self):
            super().__init__()
            self.net = nn.Conv2d(3, 4, 3)
            self.register_buffer("scale", torch.ones(()), persistent=False)

        def compare(self, images, target):
            return self.scale * (self.net(images) - self.net(target)).square().mean((1, 2, 3))

    mine = Mine()
    assert [*mine.parameters()] == [*mine.state_dict()] == []
    x = pair[0].clone().requires_grad_()
    mine(x, pair[1]).sum().backward()
    assert mine.net.weight.grad is None
    assert mine.double().net.weight.dtype == mine.scale.dtype == torch.float64


def test_a_backbone_of_another_kind_is_named():
    with pytest.raises(InputError, match=r"`backbone` must be an AttentionVGG16, .* got Conv2d"):
        PerceptualLoss(nn.Conv2d(3, 3, 3))


def test_the_fingerprint_of_a_losss_backbone_is_that_of_the_network():
    """Checkpoints of trainings compare it."""
    cut = load_backbone(layers=["relu1_2"])
    loss = PerceptualLoss(layers=["relu1_2"], normalization="none")
    assert fingerprint(loss.backbone) == fingerprint(cut)
    assert fingerprint(all_weights(loss)) == fingerprint({f"backbone.{k}": v for k, v in cut.state_dict().items()})


# --- what is no image ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([torch.zeros(3, 32, 32)], "images must be a tensor .* got list: .*to_tensor"),
        (torch.zeros(1, 3, 32, 32).numpy(), "got ndarray"),
        (None, "got NoneType"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int64), "floating point .* torch.int64"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.complex64), "floating point .* torch.complex64"),
        (torch.zeros(3, 32, 32), r"got \(3, 32, 32\)"),
        (torch.zeros(0, 3, 32, 32), r"empty batch, got \(0, 3, 32, 32\)"),
        (torch.zeros(1, 3, 1, 1), r"pixels a side .* \(1, 3, 1, 1\)"),
        (torch.zeros(1, 3, 1, 32), r"pixels a side .* \(1, 3, 1, 32\)"),
        (torch.zeros(1, 3, 32, 0), "pixels a side"),
    ],
)
def test_what_is_no_batch_of_images_is_named(loss, images, message):
    with pytest.raises(InputError, match=message):
        loss(images, images)


def test_two_devices_are_named(loss):
    with pytest.raises(InputError, match="images are on cpu and target on meta"):
        loss(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32, device="meta"))


@pytest.mark.parametrize(
    ("name", "side"),
    [("attention_vgg", 8), ("paper_l1", 8), ("gram", 8), ("vgg", 8), ("lpips", 16), ("pixel", 2), ("tone", 2)],
)
def test_the_smallest_side_is_what_the_pools_leave_something_of(make, name, side):
    smallest, x = make(name), torch.zeros(1, 3, side, side)
    assert smallest(x, x).shape == (1,)
    with pytest.raises(InputError, match=f"at least {side} pixels a side"):
        smallest(x[..., :-1], x[..., :-1])


# --- traced -------------------------------------------------------------------------------------------------------


def test_under_vmap_and_grad_it_says_the_same(loss, pair):
    x, y = pair
    torch.testing.assert_close(torch.func.vmap(lambda a, b: loss(a[None], b[None])[0])(x, y), loss(x, y))
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, y).sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda a: loss(a, y).sum())(x), expected)
    rows = torch.func.vmap(torch.func.grad(lambda a, b: loss(a[None], b[None])[0]))(x, y)
    torch.testing.assert_close(rows, expected, rtol=1e-3, atol=1e-5)
    model = Model(loss)
    state = dict(model.named_parameters())
    torch.testing.assert_close(torch.func.functional_call(model, state, (x, y)), model(x, y))


@pytest.mark.slow
def test_it_is_one_graph(loss, pair):
    x, y = pair[0].clone().requires_grad_(), pair[1]
    torch._dynamo.reset()
    value = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, y)
    torch.testing.assert_close(value, loss(x, y))
    gradients = [torch.autograd.grad(v.sum(), x)[0] for v in (value, loss(x, y))]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_it_is_exported(loss, pair):
    model = Model(loss)
    torch.testing.assert_close(torch.export.export(model, pair).module()(*pair), model(*pair))


def test_shapes_are_checked_while_tracing_and_values_are_not(make, pair):
    compiled = torch.compile(make("pixel"), backend="eager")
    wide = torch.full((2, 3, 32, 32), 255.0)
    assert compiled(wide, wide).tolist() == [0, 0]
    with pytest.raises(InputError, match="same size"):
        compiled(pair[0], pair[1][..., :-1])


@pytest.mark.slow
def test_inductor_compiles_it(make, pair):
    loss = make("attention_vgg")
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(loss, fullgraph=True)(*pair), loss(*pair), rtol=1e-3, atol=1e-4)
