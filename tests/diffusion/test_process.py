"""Against diffusers' schedulers: DDPM for diffusion, Euler flow matching for SD-3."""

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from sketch_perceptual.diffusion import Flow, process_of
from sketch_perceptual.diffusion.process import PREDICTION_TYPES
from sketch_perceptual.errors import InputError

TIMESTEPS = torch.arange(1000)


def ddpm(prediction_type):
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    )


def latents_and_noise():
    return torch.randn(2, 1000, 4, 2, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_diffusion_is_ddpm_to_the_bit(prediction_type):
    scheduler, (latents, noise) = ddpm(prediction_type), latents_and_noise()
    process = process_of(scheduler)
    assert torch.equal(process.add_noise(latents, noise, TIMESTEPS), scheduler.add_noise(latents, noise, TIMESTEPS))
    if prediction_type == "v_prediction":
        target = process.target(latents, noise, TIMESTEPS)
        assert torch.equal(target, scheduler.get_velocity(latents, noise, TIMESTEPS))


def test_flow_is_what_sd3_is_trained_with():
    scheduler, (latents, noise) = FlowMatchEulerDiscreteScheduler(shift=3.0), latents_and_noise()
    process = process_of(scheduler)
    timesteps = process.draw(1000, torch.Generator().manual_seed(0))
    assert isinstance(process, Flow)
    assert timesteps.unique().numel() > 300
    sigma = scheduler.sigmas[[scheduler.index_for_timestep(t) for t in timesteps]]
    torch.testing.assert_close(process.factors(timesteps)[1], sigma)
    noisy = process.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(noisy, scheduler.scale_noise(latents, timesteps, noise))
    target = process.target(latents, noise, timesteps)
    torch.testing.assert_close(process.predict_x0(target, noisy, timesteps), latents, rtol=1e-4, atol=1e-4)
    assert (process.may_score(timesteps, 1.0) == (sigma <= 0.5)).all()


def test_flows_min_snr_weights_are_those_of_the_same_error_of_x0():
    process, (latents, noise) = process_of(FlowMatchEulerDiscreteScheduler()), latents_and_noise()
    timesteps = TIMESTEPS + 1.0
    noisy, target = process.add_noise(latents, noise, timesteps), process.target(latents, noise, timesteps)
    wrong = target + 0.5
    x0_error = (process.predict_x0(wrong, noisy, timesteps) - latents).square().mean((1, 2, 3))
    capped = process.snr(timesteps).clamp(max=5)
    torch.testing.assert_close(0.25 * process.min_snr_weights(timesteps, 5.0), capped * x0_error, rtol=2e-3, atol=1e-5)


def test_other_schedulers_are_refused():
    with pytest.raises(InputError, match="EDMEulerScheduler"):
        process_of(EDMEulerScheduler())
    with pytest.raises(InputError, match="one of epsilon, v_prediction, sample; got 'flow_prediction'"):
        process_of(ddpm("flow_prediction"))
