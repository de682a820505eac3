"""Many LoRAs of one pipeline, trained and drawn from in one process: one frozen U-Net, the weights stacked.

A batch holds the rows of the first LoRA, then those of the second, and so on, so that a layer is two batched
products. Each LoRA is what `train_lora_sketch.py` makes of its seed: the same start, batches, noise, squares,
gradients, clipping and AdamW, whose arithmetic is element by element.
"""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from peft import get_peft_model_state_dict
from torch import Tensor, nn

import train_lora_sketch
from sketch_perceptual.diffusion import Latents, PerceptualTerm, balance, process_of
from sketch_perceptual.diffusion.process import Diffusion, Process
from sketch_perceptual.lora.adapter import Adapter
from sketch_perceptual.seeds import generator

DRAWN_AT_ONCE = 8192  # rows
ROLLOUT = (500, 333, 167)  # timesteps
Squares = Sequence[tuple[torch.Generator, int]]  # of each LoRA, what draws its squares and how many


class Loras(nn.Module):
    """A linear layer under N LoRAs: (N x rows, L, in) -> (N x rows, L, out)."""

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor, scale: float):
        super().__init__()
        self.base, self.scale = base, scale
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)  # (N, rank, in), (N, out, rank)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(len(self.down), -1, x.shape[-1])
        added = rows @ self.down.mT @ self.up.mT
        return self.base(x) + added.view(*x.shape[:-1], -1) * self.scale


def add_loras(options, unet, seeds: Sequence[int], arms: int, device: torch.device):
    """A copy of `unet` on the device with a LoRA for each arm and seed, all seeds of the first arm first."""
    starts = []
    for seed in seeds:
        with_one = copy.deepcopy(unet)
        targets = {"unet": train_lora_sketch.TARGETS["unet"]}
        Adapter(SimpleNamespace(unet=with_one), targets, seed, r=options.rank, lora_alpha=options.lora_alpha)
        starts.append(get_peft_model_state_dict(with_one))
    unet = copy.deepcopy(unet)
    for name in [name.removesuffix(".lora_A.weight") for name in starts[0] if name.endswith(".lora_A.weight")]:
        down, up = (
            torch.stack([start[f"{name}.lora_{part}.weight"] for start in starts]).repeat(arms, 1, 1) for part in "AB"
        )
        scale = options.lora_alpha / options.rank
        unet.set_submodule(name, Loras(unet.get_submodule(name), down, up, scale))
    return unet.to(device, memory_format=torch.channels_last)


class Term(PerceptualTerm):
    """The library's term on the rows of several LoRAs, each of which draws its own squares."""

    true_latents: Tensor  # of the batch, and the embeddings of its captions, set by `train`
    embeds: Tensor

    def _random_squares(self, latents: Tensor, images: Tensor, generator: Squares):
        counts = [count for _, count in generator]
        parts = zip(generator, latents.split(counts), images.split(counts), strict=True)
        cut = [super(Term, self)._random_squares(z, x, draw) for (draw, count), z, x in parts if count]
        windows, targets, squares = zip(*cut, strict=True)
        return torch.cat(windows), torch.cat(targets), (torch.cat([start for start, _ in squares]), squares[0][1])


class NearTruth(Diffusion):
    """x0 = truth + k (prediction - target), with k, which is sigma / alpha for epsilon, at most `most`."""

    def __init__(self, noise_scheduler, most: float, term: Term):
        super().__init__(noise_scheduler)
        self.most, self.term = most, term

    def predict_x0(self, model_pred: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        alpha, sigma = (factor.view(-1, 1, 1, 1) for factor in self.factors(timesteps))
        predicted, true = super().predict_x0(model_pred, noisy_latents, timesteps), self.term.true_latents
        return true + (self.most * alpha / sigma).clamp(max=1) * (predicted - true)


class KnownNoise(Term):
    """The term on x0 of `NearTruth`."""

    def __init__(self, loss, vae, noise_scheduler, *, most: float, **options):
        super().__init__(loss, vae, noise_scheduler, **options)
        self.process = NearTruth(noise_scheduler, most, self)


class EncoderTerm(Term):
    """Predicted and true latents at half the noise, as the encoder of the frozen U-Net sees them; no decoder."""

    frozen: UNet2DConditionModel  # without LoRAs, set by `make_recipe`

    def __call__(self, model_pred, noisy_latents, timesteps, images, step=None, generator=None, masks=None) -> Tensor:
        alpha, sigma = (factor.view(-1, 1, 1, 1) for factor in self.process.factors(timesteps))
        predicted = self.process.predict_x0(model_pred, noisy_latents, timesteps)

        def features(latents: Tensor) -> list[Tensor]:
            noise = (noisy_latents - alpha * latents) / sigma
            return self.encode(self.process.add_noise(latents, noise, timesteps // 2), timesteps // 2)

        with torch.no_grad():
            wanted = features(self.true_latents)
        values = []
        for feature, target in zip(features(predicted), wanted, strict=True):
            deviation = target.std((0, 2, 3), keepdim=True).clamp(min=1e-3)
            values.append(((feature - target) / deviation).square().flatten(1).mean(1))
        return torch.stack(values).mean(0)

    def encode(self, latents: Tensor, timesteps: Tensor) -> list[Tensor]:
        time = self.frozen.time_embedding(self.frozen.time_proj(timesteps))
        sample, features = self.frozen.conv_in(latents), []
        for block in self.frozen.down_blocks:
            context = {"encoder_hidden_states": self.embeds} if hasattr(block, "attentions") else {}
            sample, _ = block(sample, temb=time, **context)
            features.append(sample)
        return features


@dataclass
class Recipe:
    """Training of the LoRAs of an arm: with `term` at a ratio of gradients, or without."""

    term: Term | None = None
    ratio: float = 0.0
    snr_gamma: float | None = None
    high_noise: bool = False  # three timesteps of four from the noisier half of the schedule
    rollout: bool = False  # the term sees the last step of `roll_out` instead


@dataclass
class Data:
    """Drawings to train on: their posteriors on the CPU, pixels and captions on the device."""

    moments: Tensor
    images: Tensor
    embeds: Tensor


def draw_batch(options, vae, seed: int, step: int, data: Data):
    """The trainer's draws for a step: rows, latents, noise, timesteps, and the generator as it then is."""
    size = options.train_batch_size
    epoch, number = divmod(step, len(data.moments) // size)
    order = torch.randperm(len(data.moments), generator=generator(seed, "order", epoch))
    rows = order[number * size :][:size]
    draw = generator(seed, "noise", epoch, number, 0)
    latents = Latents(vae).sample(data.moments[rows], draw)
    noise = torch.randn(latents.shape, generator=draw)
    noise += options.noise_offset * torch.randn(*latents.shape[:2], 1, 1, generator=draw)
    timesteps = torch.randint(1000, (size,), generator=draw)
    return rows, latents, noise, timesteps, draw


def raise_noise(timesteps: Tensor, seed: int, step: int) -> Tensor:
    draw = generator(seed, "high noise", step)
    high = torch.randint(500, 1000, timesteps.shape, generator=draw)
    return torch.where(torch.rand(timesteps.shape, generator=draw) < 0.75, high, timesteps)


@torch.no_grad()
def roll_out(unet, process: Process, noisy: Tensor, embeds: Tensor) -> Tensor:
    """Take latents at the first of ROLLOUT to the last by the LoRAs' predictions (DDIM)."""
    for now, then in itertools.pairwise(ROLLOUT):
        now, then = (torch.full((len(noisy),), t, device=noisy.device) for t in (now, then))
        clean = process.predict_x0(unet(noisy, now, embeds, return_dict=False)[0], noisy, now)
        alpha, sigma = (factor.view(-1, 1, 1, 1) for factor in process.factors(now))
        noisy = process.add_noise(clean, (noisy - alpha * clean) / sigma, then)
    return noisy


def train(options, unet, vae, noise_scheduler, recipes: list[Recipe], seeds: Sequence[int], data: Data) -> None:
    """Train the LoRAs of `add_loras` for all recipes and seeds: `options` are the trainer's.

    Recipes with `rollout` cannot be trained together with others.
    """
    process, rolls_out = process_of(noise_scheduler), recipes[0].rollout
    assert all(recipe.rollout == rolls_out for recipe in recipes)
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = train_lora_sketch.make_optimizer(options, parameters)
    arms, device = len(recipes), parameters[0].device
    for step in range(options.max_train_steps):
        drawn = [draw_batch(options, vae, seed, step, data) for seed in seeds]
        rows, latents, noise, timesteps = (torch.cat(part) for part in list(zip(*drawn, strict=True))[:4])
        raised = torch.cat([raise_noise(batch[3], seed, step) for batch, seed in zip(drawn, seeds, strict=True)])
        drawn_at = [raised if recipe.high_noise else timesteps for recipe in recipes]  # (arms) of (seeds x batch)
        rows, latents, noise, timesteps = (x.to(device) for x in (rows, latents, noise, torch.cat(drawn_at)))
        noisy = noise_scheduler.add_noise(latents.repeat(arms, 1, 1, 1), noise.repeat(arms, 1, 1, 1), timesteps)
        embeds = data.embeds[rows].repeat(arms, 1, 1)
        prediction = unet(noisy, timesteps, embeds, return_dict=False)[0]
        parts = (x.chunk(arms) for x in (prediction.detach(), noisy, timesteps))
        if rolls_out:
            first, last = (torch.full_like(timesteps, t) for t in (ROLLOUT[0], ROLLOUT[-1]))
            start = process.add_noise(latents.repeat(arms, 1, 1, 1), noise.repeat(arms, 1, 1, 1), first)
            rolled = roll_out(unet, process, start, embeds)
            rolled_prediction = unet(rolled, last, embeds, return_dict=False)[0]
            seen = [x.chunk(arms) for x in (rolled_prediction.detach(), rolled, last)]
        pulls, rolled_pulls = [], []
        for arm, (recipe, drawn_timesteps, part, part_noisy, part_timesteps) in enumerate(
            zip(recipes, drawn_at, *parts, strict=True)
        ):
            part = part.requires_grad_()
            target = process.target(latents, noise, part_timesteps)
            losses = F.mse_loss(part, target, reduction="none").flatten(1).mean(1)
            if recipe.snr_gamma is not None:
                losses = losses * process.min_snr_weights(part_timesteps, recipe.snr_gamma)
            loss = losses.sum() / options.train_batch_size  # the sum of what each LoRA has as its mean
            if recipe.term is not None:
                counts = recipe.term.gate(drawn_timesteps, step).view(len(seeds), -1).sum(1).tolist()
                squares = [(made[4].clone_state(), count) for made, count in zip(drawn, counts, strict=True)]
                recipe.term.true_latents, recipe.term.embeds = latents, data.embeds[rows]
                if rolls_out:
                    last_part, last_noisy, last_timesteps = (x[arm] for x in seen)
                    values = recipe.term(
                        last_part.requires_grad_(), last_noisy, last_timesteps, data.images[rows], step, squares
                    )
                    (pull,), (base,) = torch.autograd.grad(values.sum(), last_part), torch.autograd.grad(loss, part)
                    norms = (x.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for x in (base, pull))
                    rolled_pulls.append(pull * (recipe.ratio * next(norms) / next(norms).clamp(min=1e-12)))
                    pulls.append(base)
                    continue
                values = recipe.term(part, part_noisy, part_timesteps, data.images[rows], step, squares)
                # `balance` takes the mean over all rows, here those of len(seeds) LoRAs
                loss, _ = balance(loss, len(seeds) * values, part, recipe.ratio)
            pulls += torch.autograd.grad(loss, part)
        prediction.backward(torch.cat(pulls))
        if rolls_out:
            rolled_prediction.backward(torch.cat(rolled_pulls))
        clip(parameters, options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


def clip(parameters: list[nn.Parameter], limit: float) -> None:
    """`clip_grad_norm_` for each LoRA by itself."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
    factors = (limit / (norms + 1e-6)).clamp(max=1).view(-1, 1, 1)
    for gradient in gradients:
        gradient *= factors


@torch.no_grad()
def draw_latents(
    unet, scheduler, noise: Tensor, embeds: Tensor, empty: Tensor, guidance: float, steps: int, loras: int
) -> Tensor:
    """Latents (loras, N, 4, h, w) that each LoRA makes of the same noise (N, 4, h, w)."""
    drawn = []
    for part in torch.arange(len(noise)).split(max(1, DRAWN_AT_ONCE // loras)):
        rows = part.to(noise.device)
        contexts = embeds[rows][None]
        if guidance > 1:
            contexts = torch.cat([empty.expand_as(contexts), contexts])
        copies = len(contexts)
        contexts = contexts.flatten(0, 1).repeat(loras, 1, 1)
        latents = noise[rows].expand(loras, -1, -1, -1, -1)
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps.tolist():
            given = latents[:, None].expand(-1, copies, -1, -1, -1, -1).flatten(0, 2)
            with torch.autocast(noise.device.type, torch.float16, enabled=noise.device.type == "cuda"):
                predicted = unet(given, t, contexts, return_dict=False)[0]
            predicted = predicted.float().unflatten(0, (loras, copies, -1))
            predicted = predicted[:, 0] + guidance * (predicted[:, -1] - predicted[:, 0])
            latents = scheduler.step(predicted, t, latents).prev_sample
        drawn.append(latents)
    return torch.cat(drawn, 1)
