import copy
import warnings

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.training_utils import compute_snr

from sketch_perceptual.diffusion import Latents, PerceptualTerm, balance, predict_x0, process_of
from sketch_perceptual.diffusion.process import PREDICTION_TYPES
from sketch_perceptual.diffusion.term import draw_squares
from sketch_perceptual.errors import InputError
from sketch_perceptual.losses import PixelLoss

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def scheduler(prediction_type="epsilon", **options):
    return DDPMScheduler(**SD15, prediction_type=prediction_type, **options)


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=[8, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    )


def tiny_decoder():
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=[8, 8],
        decoder_block_out_channels=[8, 8],
        num_encoder_blocks=[1, 1],
        num_decoder_blocks=[1, 1],
    )


def batch(n=4, size=16, seed=0):
    draw = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn(2, n, 4, size // 2, size // 2, generator=draw)
    return latents, noise, torch.rand(n, 3, size, size, generator=draw) * 2 - 1


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("options", [{}, {"rescale_betas_zero_snr": True}])
def test_x0_from_the_true_prediction_is_the_clean_latent_at_every_timestep(prediction_type, options):
    noise_scheduler = scheduler(prediction_type, **options)
    timesteps = torch.arange(999 if options and prediction_type == "epsilon" else 1000)
    latents, noise = torch.randn(2, len(timesteps), 4, 2, 2)
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    target = process_of(noise_scheduler).target(latents, noise, timesteps)
    x0 = predict_x0(target, noisy, timesteps, noise_scheduler)
    torch.testing.assert_close(x0, latents, rtol=1e-3, atol=5e-3 if options else 1e-3)


def test_x0_agrees_with_the_scheduler_that_takes_one_row_at_a_time():
    for prediction_type in PREDICTION_TYPES:
        noise_scheduler = scheduler(prediction_type, clip_sample=False)
        latents, noise, _ = batch()
        timesteps = torch.tensor([1, 300, 700, 999])
        ours = predict_x0(noise, latents, timesteps, noise_scheduler)
        for row, t in enumerate(timesteps):
            theirs = noise_scheduler.step(noise[row], t, latents[row]).pred_original_sample
            torch.testing.assert_close(ours[row], theirs, rtol=1e-4, atol=1e-4)


def test_epsilon_at_zero_terminal_snr_is_refused_by_x0_and_shut_out_by_the_gate(vae):
    noise_scheduler = scheduler(rescale_betas_zero_snr=True)
    latents, noise, images = batch()
    with pytest.raises(InputError, match="v_prediction"):
        predict_x0(noise, latents, torch.tensor([0, 1, 2, 999]), noise_scheduler)
    term = PerceptualTerm(PixelLoss(), vae, noise_scheduler, min_snr=0)
    assert term.gate(torch.tensor([0, 900, 999])).tolist() == [True, True, False]
    value = term(noise, latents, torch.full((4,), 999), images)
    assert torch.equal(value, torch.zeros(4))


def test_v_prediction_at_zero_terminal_snr_is_finite(vae):
    latents, noise, images = batch()
    term = PerceptualTerm(PixelLoss(), vae, scheduler("v_prediction", rescale_betas_zero_snr=True), min_snr=0)
    value = term(noise, latents, torch.full((4,), 999), images)
    assert torch.isfinite(value).all()
    assert (value > 0).all()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_the_official_scripts_but_finite(prediction_type):
    timesteps, gamma = torch.arange(1000), 5.0
    snr = compute_snr(scheduler(), timesteps)
    expected = snr.clamp(max=gamma) / (snr if prediction_type == "epsilon" else snr + 1)
    torch.testing.assert_close(
        process_of(scheduler(prediction_type)).min_snr_weights(timesteps, gamma), expected, rtol=1e-4, atol=1e-6
    )
    zero = process_of(scheduler(prediction_type, rescale_betas_zero_snr=True)).min_snr_weights(timesteps, gamma)
    assert torch.isfinite(zero).all()


def test_the_gate_is_open_unless_told_and_snr_one_is_timestep_353_on_sd15(vae):
    assert PerceptualTerm(PixelLoss(), vae, scheduler()).open.all()
    term = PerceptualTerm(PixelLoss(), vae, scheduler(), min_snr=1)
    assert term.open.nonzero().max() == 353
    assert term.open.sum() == 354
    by_timestep = PerceptualTerm(PixelLoss(), vae, scheduler(), max_timestep=100)
    assert by_timestep.open.nonzero().max() == 100


def test_start_step_and_every_choose_the_steps(vae):
    term = PerceptualTerm(PixelLoss(), vae, scheduler(), start_step=4, every=3)
    opened = [step for step in range(12) if term.gate(torch.tensor([0]), step).item()]
    assert opened == [4, 7, 10]
    with pytest.raises(InputError, match="step=global_step"):
        term.gate(torch.tensor([0]))


def test_rows_outside_the_gate_are_zero_and_are_not_decoded(vae):
    term = PerceptualTerm(PixelLoss(), vae, scheduler(), min_snr=1)
    decoded = []
    vae.decoder.register_forward_pre_hook(lambda _, inputs: decoded.append(len(inputs[0])))
    latents, noise, images = batch()
    noise.requires_grad_()
    value = term(noise, latents, torch.tensor([10, 900, 300, 354]), images)
    assert decoded == [2]
    assert (value > 0).tolist() == [True, False, True, False]
    value.sum().backward()
    assert noise.grad.flatten(1).abs().sum(1).gt(0).tolist() == [True, False, True, False]
    assert torch.equal(term(noise, latents, torch.full((4,), 999), images), torch.zeros(4))
    assert decoded == [2]


def test_each_row_is_its_own_decoded_x0_against_its_image(vae):
    noise_scheduler = scheduler()
    term = PerceptualTerm(PixelLoss(), vae, noise_scheduler)
    latents, noise, images = batch()
    timesteps = torch.tensor([0, 999, 100, 353])
    value = term(noise, latents, timesteps, images)
    x0 = predict_x0(noise, latents, timesteps, noise_scheduler)
    expected = PixelLoss()(vae.decode(x0 / vae.config.scaling_factor).sample, images)
    torch.testing.assert_close(value[[0, 2, 3]], expected[[0, 2, 3]])
    assert value.dtype == torch.float32


def test_a_perfect_prediction_of_a_round_trip_scores_nothing(vae):
    vae.decoder.conv_out.weight.data /= 4  # inside [-1, 1], to which the target is clamped
    noise_scheduler = scheduler()
    term = PerceptualTerm(PixelLoss(), vae, noise_scheduler, target="reconstruction")
    _, noise, images = batch()
    latents = vae.encode(images).latent_dist.mode() * vae.config.scaling_factor
    timesteps = torch.tensor([5, 50, 100, 200])
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    assert Latents(vae).decode(latents).abs().max() < 1
    torch.testing.assert_close(term(noise, noisy, timesteps, images), torch.zeros(4), atol=1e-4, rtol=0)
    assert PerceptualTerm(PixelLoss(), vae, noise_scheduler)(noise, noisy, timesteps, images).min() > 0.1


def test_gradient_passes_the_frozen_decoder_and_no_clamp(vae):
    vae.decoder.conv_out.bias.data.fill_(3.0)  # every decoded pixel lies outside [-1, 1]
    term = PerceptualTerm(PixelLoss(), vae, scheduler())
    latents, noise, images = batch()
    noise.requires_grad_()
    term(noise, latents, torch.zeros(4, dtype=torch.long), images).sum().backward()
    assert (noise.grad.flatten(1).abs().sum(1) > 0).all()
    assert all(p.grad is None and not p.requires_grad for p in vae.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoder_and_loss_ignore_an_outer_autocast(vae, dtype):
    seen = set()
    for module in vae.decoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda _, inputs, output: seen.update({inputs[0].dtype, output.dtype}))

    def loss(images, target):
        seen.update({images.dtype, target.dtype, (images.flatten(1) @ target.flatten(1).T).dtype})
        return PixelLoss()(images, target)

    term = PerceptualTerm(loss, vae, scheduler(), dtype=dtype)
    latents, noise, images = batch()
    with torch.autocast("cpu", torch.bfloat16 if dtype == torch.float32 else torch.float16):
        value = term(noise.bfloat16(), latents, torch.zeros(4, dtype=torch.long), images)
    assert seen == {dtype}
    assert value.dtype == torch.float32


def test_checkpointing_keeps_the_gradient_and_halves_what_is_kept(vae):
    def run(checkpoint):
        term = PerceptualTerm(PixelLoss(), copy.deepcopy(vae), scheduler(), checkpoint=checkpoint)
        latents, noise, images = batch(size=32)
        noise.requires_grad_()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            value = term(noise, latents, torch.zeros(4, dtype=torch.long), images).sum()
        value.backward()
        return noise.grad, sum(kept)

    (gradient, small), (expected, large) = run(True), run(False)
    torch.testing.assert_close(gradient, expected)
    assert small < large / 2


def test_a_crop_scores_the_same_square_of_both(vae):
    decoded = []

    class Loss(PixelLoss):
        def compare(self, images, target):
            decoded.append((images.detach(), target))
            return super().compare(images, target)

    timesteps = torch.tensor([0, 999, 0, 0])
    latents, noise, images = batch(size=96)
    term = PerceptualTerm(Loss(), vae, scheduler(), min_snr=1, crop=16)
    decoded.clear()  # the trial when it was built
    value = term(noise, latents, timesteps, images, generator=torch.Generator().manual_seed(1))
    assert (value > 0).tolist() == [True, False, True, True]
    assert torch.equal(value, term(noise, latents, timesteps, images, generator=torch.Generator().manual_seed(1)))
    found, target = decoded[0]
    assert found.shape == target.shape == (3, 3, 16, 16)
    x0 = predict_x0(noise, latents, timesteps, scheduler())
    places = set()
    for row, square, image in zip((0, 2, 3), found, target, strict=True):
        windows = images[row].unfold(1, 16, 2).unfold(2, 16, 2)
        ((top, left),) = (windows == image[:, None, None]).flatten(3).all(3).all(0).nonzero().tolist()
        places.add((top, left))
        first, second = (min(max(start - 8, 0), 24) for start in (top, left))  # in latents of 2 pixels
        window = Latents(vae).decode(x0[row : row + 1, :, first : first + 24, second : second + 24])[0]
        y, x = 2 * (top - first), 2 * (left - second)
        torch.testing.assert_close(square, window[:, y : y + 16, x : x + 16])
    assert len(places) > 1


@pytest.mark.parametrize("size", [(96, 48), (24, 96)])
def test_squares_follow_the_ink_and_reach_every_corner(size):
    height, width = size
    images = torch.ones(400, 3, height, width)
    images[..., :8, :8] = -1

    def drawn(images):
        return draw_squares(images, [8, 8], 2, torch.Generator().manual_seed(0))

    starts = drawn(images)
    assert 0.4 < (starts < 4).all(1).float().mean() < 0.6  # half in proportion to the ink, half anywhere
    last = torch.tensor([height // 2 - 8, width // 2 - 8])
    assert torch.equal(starts.amin(0), torch.zeros(2).long())
    assert torch.equal(starts.amax(0), last)
    torch.testing.assert_close(drawn(torch.ones_like(images)).float().mean(0), last / 2, atol=2, rtol=0)
    masks = torch.zeros(400, 1, height, width)
    masks[..., -8:, -8:] = 1
    masked = drawn(torch.cat([-torch.ones_like(images), masks], 1))
    assert (masked > last - 4).all()


@pytest.mark.parametrize("paper", [1.0, 0.9, 0.5, -1.0])
def test_squares_follow_the_ink_on_paper_of_any_tone(paper):
    images = torch.full((400, 3, 96, 96), paper)
    images[..., 40:48, 40:48] = -paper
    starts = draw_squares(images, [8, 8], 2, torch.Generator().manual_seed(0))
    sees = ((starts > 20 - 8) & (starts < 24)).all(1).float().mean()
    assert 0.5 < sees < 0.65  # half of them and an eleventh of the others


def test_a_crop_that_is_not_smaller_leaves_the_whole(vae):
    latents, noise, images = batch()
    timesteps = torch.zeros(4, dtype=torch.long)
    whole = PerceptualTerm(PixelLoss(), vae, scheduler())(noise, latents, timesteps, images)
    assert torch.equal(
        PerceptualTerm(PixelLoss(), vae, scheduler(), crop=32)(noise, latents, timesteps, images), whole
    )


def test_only_what_the_mask_shows_counts(vae):
    latents, noise, images = batch()
    timesteps = torch.zeros(4, dtype=torch.long)
    term = PerceptualTerm(PixelLoss(), vae, scheduler())
    masks = torch.ones(4, 1, *images.shape[-2:])
    torch.testing.assert_close(
        term(noise, latents, timesteps, images, masks=masks), term(noise, latents, timesteps, images)
    )
    masks[..., 8:] = 0
    found = term(noise, latents, timesteps, images, masks=masks)
    decoded = Latents(vae).decode(predict_x0(noise, latents, timesteps, scheduler()))
    torch.testing.assert_close(found, PixelLoss()(decoded[..., :8], images[..., :8]))
    assert (term(noise, latents, timesteps, images, masks=torch.zeros_like(masks)) == 0).all()
    cut = PerceptualTerm(PixelLoss(), vae, scheduler(), crop=16)
    value = cut(noise, latents, timesteps, images, generator=torch.Generator().manual_seed(1), masks=masks)
    assert torch.isfinite(value).all()


def test_a_tiny_autoencoder_decodes_the_same_scaled_latents(vae):
    tiny = tiny_decoder()
    latents, noise, images = batch()
    term = PerceptualTerm(PixelLoss(), vae, scheduler(), decoder=tiny)
    timesteps = torch.zeros(4, dtype=torch.long)
    value = term(noise, latents, timesteps, images)
    x0 = predict_x0(noise, latents, timesteps, scheduler())
    torch.testing.assert_close(value, PixelLoss()(tiny.decoder(x0), images))
    before = tiny_decoder().encode(images).latents
    torch.testing.assert_close(tiny.encode(images).latents, before)
    own = PerceptualTerm(PixelLoss(), tiny, scheduler())
    torch.testing.assert_close(own(noise, latents, timesteps, images), value)


def test_latents_are_those_of_diffusers(vae):
    images = batch()[2]
    theirs = vae.encode(images).latent_dist.sample(torch.Generator().manual_seed(1)) * vae.config.scaling_factor
    ours = Latents(vae).sample(Latents(vae).encode(images), torch.Generator().manual_seed(1))
    assert torch.equal(ours, theirs)
    tiny = tiny_decoder()
    torch.testing.assert_close(Latents(tiny).sample(Latents(tiny).encode(images)), tiny.encode(images).latents)


def test_an_encoder_in_half_precision_stands_beside_a_decoder_in_full(vae):
    vae.to(torch.bfloat16)
    term = PerceptualTerm(PixelLoss(), vae, scheduler(), target="reconstruction")
    latents, noise, images = batch()
    assert Latents(vae).encode(images).dtype == torch.bfloat16
    assert torch.isfinite(term(noise, latents, torch.zeros(4, dtype=torch.long), images)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float16}, "float32 or bfloat16"),
        ({"target": "latent"}, '"image" or "reconstruction"'),
        ({"every": 0}, "every >= 1"),
        ({"start_step": -1}, "start_step >= 0"),
        ({"crop": 17}, "16 pixels or more and a multiple of 2, got 17"),
        ({"crop": 32.0}, "`crop` must be an integer of .*, got 32.0"),
        ({"crop": "256"}, "`crop` must be an integer of .*, got '256'"),
        ({"min_snr": 1e9}, "never opens: min_snr=1000000000.0"),
        ({"max_timestep": -1}, "never opens"),
    ],
)
def test_wrong_options_are_named(vae, options, message):
    with pytest.raises(InputError, match=message):
        PerceptualTerm(PixelLoss(), vae, scheduler(), **options)


def test_other_schedules_are_refused(vae):
    with pytest.raises(InputError, match="one of epsilon, v_prediction, sample; got 'flow'"):
        noise_scheduler = scheduler()
        noise_scheduler.register_to_config(prediction_type="flow")
        PerceptualTerm(PixelLoss(), vae, noise_scheduler)
    with pytest.raises(InputError, match="FlowMatchEulerDiscreteScheduler has no alphas_cumprod"):
        PerceptualTerm(PixelLoss(), vae, FlowMatchEulerDiscreteScheduler())
    with pytest.raises(InputError, match="`Diffusion` process, got Flow"):
        PerceptualTerm(PixelLoss(), vae, process_of(FlowMatchEulerDiscreteScheduler()))
    for solver in (EulerDiscreteScheduler(**SD15), HeunDiscreteScheduler(**SD15), DPMSolverMultistepScheduler(**SD15)):
        with pytest.raises(InputError, match=r"does not add noise as DDPMScheduler .* DDPMScheduler.from_config"):
            PerceptualTerm(PixelLoss(), vae, solver)
    for same in (DDIMScheduler(**SD15), PNDMScheduler(**SD15)):
        assert PerceptualTerm(PixelLoss(), vae, same, min_snr=1).open.sum() == 354


def test_other_vaes_are_refused(vae):
    with pytest.raises(InputError, match="`vae` must be diffusers' AutoencoderKL or AutoencoderTiny, got NoneType"):
        PerceptualTerm(PixelLoss(), None, scheduler())
    with pytest.raises(InputError, match=r"`vae` must .* got DataParallel \(unwrap"):
        PerceptualTerm(PixelLoss(), torch.nn.DataParallel(vae), scheduler())
    with pytest.raises(InputError, match="`decoder` decodes latents of other channels or of another size"):
        PerceptualTerm(PixelLoss(), vae, scheduler(), decoder=AutoencoderTiny())
    vae.register_to_config(latents_mean=[0.0] * 4)
    with pytest.raises(InputError, match="`vae` has a latents_mean for each channel, which is not supported"):
        PerceptualTerm(PixelLoss(), vae, scheduler())


def test_latents_are_scaled_and_shifted(vae):
    """As pipelines of SD-3 do: (z - shift_factor) * scaling_factor, and back."""
    images, plain = batch()[-1], Latents(vae)
    z = plain.mean(plain.encode(images)) / vae.config.scaling_factor
    vae.register_to_config(shift_factor=0.06)
    latents = Latents(vae)
    scaled = latents.mean(latents.encode(images))
    torch.testing.assert_close(scaled, (z - 0.06) * vae.config.scaling_factor)
    torch.testing.assert_close(latents.decode(scaled), vae.decode(z).sample)
    drawn = latents.sample(latents.encode(images), torch.Generator().manual_seed(0))
    assert 0 < (drawn - scaled).abs().max() < 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_pred": (2, 4, 8, 8)},
            r"`model_pred` has 2, `noisy_latents` has 4, .* with prior .* noisy_latents\[:len\(model_pred\)\]",
        ),
        ({"timesteps": (3,)}, "`timesteps` has 3"),
        ({"images": (2, 3, 16, 16)}, "`images` has 2"),
        ({"model_pred": (4, 8, 8, 8)}, r"`model_pred` must be latents of the VAE, \(4, 4, 8, 8\).* \(4, 8, 8, 8\)"),
        ({"noisy_latents": (4, 9, 8, 8)}, r"`noisy_latents` must .* mask .* got \(4, 9, 8, 8\)"),
        ({"model_pred": (4, 4, 1, 8, 8)}, r"`model_pred` must .* got \(4, 4, 1, 8, 8\)"),
        ({"images": (4, 3, 16, 24)}, r"`images` must be \(4, 3, 16, 16\), 2 times as large .* got \(4, 3, 16, 24\)"),
        ({"images": (4, 1, 16, 16)}, r"`images` must be \(4, 3, 16, 16\)"),
        ({"masks": (4, 16, 16)}, r"`masks` must be \(4, 1, 16, 16\)"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(vae, changes, message):
    latents, noise, images = batch()
    given = {"model_pred": noise, "noisy_latents": latents, "timesteps": torch.zeros(4).long(), "images": images}
    given |= {name: torch.zeros(shape) for name, shape in changes.items()}
    with pytest.raises(InputError, match=message):
        PerceptualTerm(PixelLoss(), vae, scheduler())(**given)


@pytest.mark.parametrize("timesteps", [torch.tensor([0.5] * 4), torch.tensor([0, 1, 2, 1000]), torch.tensor([-1] * 4)])
def test_timesteps_that_are_none_are_refused(vae, timesteps):
    latents, noise, images = batch()
    with pytest.raises(InputError, match="`timesteps` must be integers from 0 to 999"):
        PerceptualTerm(PixelLoss(), vae, scheduler())(noise, latents, timesteps, images)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1, "0.3"])
def test_weights_that_are_none_are_refused(vae, weight):
    noisy, _, images = batch(2)
    timesteps = torch.zeros(2).long()
    pred = noisy.clone().requires_grad_()
    with pytest.raises(InputError, match="`weight` must be a number of at least 0"):
        PerceptualTerm(PixelLoss(), vae, scheduler()).add(pred.mean(), pred, noisy, timesteps, images, weight=weight)


@pytest.mark.parametrize("timesteps", [300, torch.tensor(300)])
def test_one_timestep_for_all_rows_is_refused(vae, timesteps):
    noisy, _, images = batch(2)
    with pytest.raises(InputError, match="`timesteps` must be a tensor with one row for each sample"):
        PerceptualTerm(PixelLoss(), vae, scheduler())(noisy, noisy, timesteps, images)


def test_a_decoder_that_was_cast_since_is_cast_back(vae):
    term = PerceptualTerm(PixelLoss(), vae, scheduler())
    latents, noise, images = batch()
    vae.to(torch.float16)  # as pipelines leave it after drawing
    assert torch.isfinite(term(noise, latents, torch.zeros(4).long(), images)).all()
    assert vae.decoder.conv_in.weight.dtype == vae.post_quant_conv.weight.dtype == torch.float32


def rows_of(prediction, weight, loss_scale=1.0, value_scale=1.0):
    """What `balance` makes of a squared error and of an absolute one, and the gradient of each alone, by row."""
    loss = loss_scale * prediction.square().mean()
    values = value_scale * (prediction - 0.3).abs().flatten(1).mean(1)
    (own,), (pull,) = (
        torch.autograd.grad(x, prediction, retain_graph=True) for x in (loss, values.sum() / len(values))
    )
    total, measured = balance(loss, values, prediction, weight)
    (both,) = torch.autograd.grad(total, prediction)
    return total, loss, values, measured, own.flatten(1), pull.flatten(1), both.flatten(1)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_term_pulls_at_each_row_as_hard_as_its_weight_says_whatever_its_scale(scale):
    prediction = (torch.randn(4, 4, 8, 8) * torch.tensor([0.1, 1, 3, 10]).view(4, 1, 1, 1)).requires_grad_()
    total, loss, values, measured, own, pull, both = rows_of(
        prediction, 0.3, loss_scale=1e-4 * scale, value_scale=scale
    )
    added = both - own
    torch.testing.assert_close(added.norm(dim=1), 0.3 * own.norm(dim=1), rtol=1e-3, atol=0)
    assert (added - measured["factor"][:, None] * pull).norm() < 1e-3 * added.norm()
    torch.testing.assert_close(measured["gradient_ratio"], torch.full((4,), 0.3))
    cosine = torch.cosine_similarity(own.double(), pull.double(), eps=1e-30)
    torch.testing.assert_close(measured["gradient_cosine"], cosine.float())
    torch.testing.assert_close(total, loss + (measured["factor"] * values).mean())


def test_a_row_whose_term_hardly_pulls_is_not_blown_up():
    prediction = torch.randn(2, 4, 8, 8).requires_grad_()
    *_, measured, own, pull, both = rows_of(prediction, 0.3, value_scale=1e-6)
    torch.testing.assert_close(measured["factor"], torch.ones(2))
    torch.testing.assert_close(both, own + pull)


def test_a_gradient_scaler_scales_the_term_as_it_does_the_loss():
    weights = torch.randn(4, 1, 1, 1, dtype=torch.float64).requires_grad_()  # in the model's place
    model_pred = weights * torch.randn(4, 4, 8, 8, dtype=torch.float64)
    total, _ = balance(model_pred.square().mean(), (model_pred - 0.3).abs().flatten(1).mean(1), model_pred, 0.3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    (scaled,) = torch.autograd.grad(scaler.scale(total), weights, retain_graph=True)
    (alone,) = torch.autograd.grad(total, weights)
    torch.testing.assert_close(scaled, 2.0**16 * alone)


def predicted(vae, timesteps):
    """A term, weights in the model's place, what they predict, and what that is computed from and scored with."""
    term = PerceptualTerm(PixelLoss(), vae, scheduler(), min_snr=1)
    latents, noise, images = batch()
    noisy_latents = term.process.add_noise(latents, noise, timesteps)
    weights = torch.ones(4, 1, 1, 1, requires_grad=True)
    return term, weights, weights * (noise + 0.1 * latents), noise, noisy_latents, images


def test_added_to_a_loss_the_term_leaves_the_rows_outside_the_gate_alone(vae):
    timesteps = torch.tensor([10, 353, 354, 999])
    term, weights, model_pred, noise, noisy_latents, images = predicted(vae, timesteps)
    loss = (model_pred - noise).square().mean()
    alone = torch.autograd.grad(loss, weights, retain_graph=True)[0].flatten()
    with_term = torch.autograd.grad(term.add(loss, model_pred, noisy_latents, timesteps, images), weights)[0].flatten()
    assert torch.equal(with_term[2:], alone[2:])
    assert (with_term[:2] != alone[:2]).all()
    shut = term.add(loss, model_pred, noisy_latents, torch.full((4,), 999), images)
    assert shut is loss


def test_prior_preservation_by_hand(vae):
    """The first half of the rows are the drawings, the second are prior pictures, not scored."""
    timesteps = torch.tensor([10, 353, 20, 30])
    term, weights, both_pred, noise, noisy_latents, images = predicted(vae, timesteps)
    model_pred, prior_pred = both_pred.chunk(2)
    loss = (model_pred - noise[:2]).square().mean() + 0.5 * (prior_pred - noise[2:]).square().mean()
    n = len(model_pred)
    alone = torch.autograd.grad(loss, model_pred, retain_graph=True)[0].flatten(1)
    before = torch.autograd.grad(loss, weights, retain_graph=True)[0].flatten()
    total = term.add(loss, model_pred, noisy_latents[:n], timesteps[:n], images[:n], weight=0.05)
    both = torch.autograd.grad(total, model_pred, retain_graph=True)[0].flatten(1)
    torch.testing.assert_close((both - alone).norm(dim=1), 0.05 * alone.norm(dim=1), rtol=1e-3, atol=0)
    after = torch.autograd.grad(total, weights)[0].flatten()
    assert torch.equal(after[2:], before[2:])
    assert (after[:2] != before[:2]).all()


def test_weight_0_is_the_loss_itself_and_draws_and_decodes_nothing(vae):
    term = PerceptualTerm(PixelLoss(), vae, scheduler(), crop=16)
    latents, noise, images = batch(size=32)
    model_pred = noise.requires_grad_()
    loss = model_pred.square().mean()
    vae.decoder.register_forward_pre_hook(lambda *_: pytest.fail("decoded"))
    before = torch.get_rng_state()
    assert term.add(loss, model_pred, latents, torch.zeros(4).long(), images, weight=0) is loss
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loss_of_something_else_is_refused(vae):
    term = PerceptualTerm(PixelLoss(), vae, scheduler())
    latents, noise, images = batch()
    model_pred, timesteps = noise.requires_grad_(), torch.zeros(4).long()
    with pytest.raises(InputError, match="`loss` must be computed from `model_pred`"):
        term.add(model_pred.square().mean(), model_pred.float() * 1, latents, timesteps, images)
    with pytest.raises(InputError, match=r"`loss` must be a scalar, got \(4, 4, 8, 8\)"):
        term.add(model_pred.square(), model_pred, latents, timesteps, images)
    with pytest.raises(InputError, match="`loss` carries no gradient"):
        term.add(model_pred.square().mean().detach(), model_pred, latents, timesteps, images)


def test_a_perceptual_loss_without_a_gradient_is_refused_where_rows_are_scored(vae):
    class Detached(PixelLoss):
        def compare(self, images, target):
            return super().compare(images, target).detach()

    term = PerceptualTerm(Detached(), vae, scheduler(), max_timestep=10)
    latents, noise, images = batch()
    model_pred, timesteps = noise.requires_grad_(), torch.zeros(4).long()
    loss = model_pred.square().mean()
    with pytest.raises(InputError, match="the perceptual loss Detached must carry a gradient to the images"):
        term.add(loss, model_pred, latents, timesteps, images)
    assert term.add(loss, model_pred, latents, timesteps + 500, images) is loss
    with torch.no_grad():
        assert term.add(loss, model_pred, latents, timesteps, images) is loss


@pytest.mark.parametrize("shape", [(-1,), (-1, 1), (-1, 1, 1, 1)])
def test_a_loss_of_somebody_else_is_taken_as_it_returns_its_values(vae, shape):
    def theirs(x, y):
        return (x - y).abs().mean((1, 2, 3)).reshape(shape)

    latents, noise, images = batch()
    value = PerceptualTerm(theirs, vae, scheduler())(noise, latents, torch.zeros(4).long(), images)
    expected = PerceptualTerm(PixelLoss(), vae, scheduler())(noise, latents, torch.zeros(4).long(), images)
    torch.testing.assert_close(value, PixelLoss.TYPICAL * expected)


def test_lpips_itself_is_taken_and_frozen(vae):
    import lpips

    theirs = lpips.LPIPS(net="squeeze", pretrained=False, pnet_rand=True, verbose=False)
    latents, noise, images = batch(size=64)
    noise.requires_grad_()
    value = PerceptualTerm(theirs, vae, scheduler(), crop=32)(noise, latents, torch.zeros(4).long(), images)
    assert value.shape == (4,)
    value.sum().backward()
    assert not any(weight.requires_grad for weight in theirs.parameters())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (torch.nn.L1Loss(), r"L1Loss, must return one number per image, .* got \(\)"),
        (torch.nn.L1Loss(reduction="none"), r"one number per image, .* got \(2, 3, 64, 64\)"),
        (lambda x, y: (x - y).abs().mean(1), r"got \(2, 64, 64\)"),
        (lambda x, y: 0.5, "got float"),
        (torch.nn.ReLU(), "`loss`, ReLU, fails on .* TypeError"),
        (PixelLoss, "`loss` must be a callable"),
        ("gram", "`loss` must be a callable .* got 'gram'"),
    ],
)
def test_what_is_no_loss_is_refused_when_the_term_is_built(vae, loss, message):
    with pytest.raises(InputError, match=message):
        PerceptualTerm(loss, vae, scheduler())


def test_building_a_term_draws_nothing_and_judges_no_loss_for_another_size(vae):
    def drawing(x, y):
        torch.rand(3)
        assert x.shape[-1] == 16
        return (x - y).abs().mean((1, 2, 3))

    before = torch.get_rng_state()
    term = PerceptualTerm(drawing, vae, scheduler())
    assert torch.equal(torch.get_rng_state(), before)
    latents, noise, images = batch()
    assert (term(noise, latents, torch.zeros(4).long(), images) > 0).all()


def test_images_in_zero_one_are_a_warning_once(vae):
    term = PerceptualTerm(PixelLoss(), vae, scheduler())
    latents, noise, images = batch()
    images = (images - images.min()) / (images.max() - images.min())
    with pytest.warns(UserWarning, match=r"`images` .* span \[0, 1\]"):
        term(noise, latents, torch.zeros(4).long(), images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        term(noise, latents, torch.zeros(4).long(), images)
        PerceptualTerm(PixelLoss(), vae, scheduler())(noise, latents, torch.zeros(4).long(), batch()[2])


def test_a_prediction_without_a_gradient_is_refused_where_one_is_wanted(vae):
    term, _, model_pred, noise, noisy_latents, images = predicted(vae, torch.zeros(4).long())
    loss, timesteps = (model_pred - noise).square().mean(), torch.zeros(4).long()
    with pytest.raises(InputError, match="`model_pred` carries no gradient"):
        term.add(loss, model_pred.detach(), noisy_latents, timesteps, images)
    assert (term(model_pred.detach(), noisy_latents, timesteps, images) > 0).all()
    with torch.no_grad():
        assert term.add(loss, model_pred.detach(), noisy_latents, timesteps, images) is loss


def test_clean_latents_decoded_stand_for_images_that_a_script_has_thrown_away(vae):
    """As docs/use-the-loss.md says for train_text_to_image_sdxl.py, which keeps only latents."""
    latents, noise, images = batch()
    clean = vae.encode(images).latent_dist.mode() * vae.config.scaling_factor
    timesteps = torch.zeros(4).long()
    term = PerceptualTerm(PixelLoss(), vae, scheduler())
    value = term(noise, latents, timesteps, term.decoder.decode(clean).clamp(-1, 1))
    reconstruction = PerceptualTerm(PixelLoss(), vae, scheduler(), target="reconstruction")
    torch.testing.assert_close(value, reconstruction(noise, latents, timesteps, images))


@pytest.mark.slow
def test_a_call_is_one_graph_in_a_compiled_step(vae):
    timesteps = torch.tensor([10, 900, 300, 354])
    latents, noise, images = batch()
    weights = torch.ones(4, 1, 1, 1, requires_grad=True)
    term = PerceptualTerm(PixelLoss(), vae, scheduler(), min_snr=1, crop=16)

    def step(weights):
        return term(weights * noise, latents, timesteps, images)

    both = [f(weights) for f in (torch.compile(step, fullgraph=True, backend="eager"), step)]
    torch.testing.assert_close(*both)
    torch.testing.assert_close(*(torch.autograd.grad(values.sum(), weights)[0] for values in both))
    larger = batch(size=48)
    values = torch.compile(term, fullgraph=True, backend="eager")(larger[1], larger[0], timesteps, larger[2])
    assert (values > 0).tolist() == [True, False, True, False]
