"""Many LoRAs of one pipeline, trained and drawn from in one process: one frozen U-Net, the weights stacked.

A batch holds the rows of the first LoRA, then those of the second, and so on, so that a layer is two batched
products. Each LoRA is what `train_lora_sketch.py` makes of its seed: the same start, batches, noise, squares,
gradients, clipping and AdamW, whose arithmetic is element by element.
"""

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from peft import get_peft_model_state_dict
from torch import Tensor, nn

import train_lora_sketch
from sketch_perceptual.diffusion import Latents, PerceptualTerm, balance, process_of
from sketch_perceptual.lora.adapter import Adapter
from sketch_perceptual.losses import PerceptualLoss
from sketch_perceptual.seeds import generator

DRAWN_AT_ONCE = 8192  # rows
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

    compares = "images"
    crop: int

    def _random_squares(self, latents: Tensor, images: Tensor, size: int, draws: Squares) -> tuple[Tensor, Tensor]:
        side = latents.shape[-1]
        corners = [torch.randint(side - size + 1, (2, count), generator=draw) for draw, count in draws]
        starts = torch.cat(corners, 1)[..., None].to(latents.device)

        def cut(x: Tensor) -> Tensor:
            scale = x.shape[-1] // side
            y, z = scale * starts + torch.arange(scale * size, device=x.device)
            rows = torch.arange(len(x), device=x.device)[:, None, None]
            return x[rows, :, y[:, :, None], z[:, None, :]].permute(0, 3, 1, 2)

        return cut(latents), cut(images)


class LatentTerm(Term):
    """A term that compares predicted with true latents, which it is given in place of images."""

    compares = "latents"

    def __call__(self, model_pred, noisy_latents, timesteps, images, step=None, generator=None, masks=None) -> Tensor:
        per_row = model_pred.new_zeros(len(model_pred))
        rows = self.gate(timesteps, step).nonzero().flatten().to(model_pred.device)
        if len(rows) == 0:
            return per_row
        noisy_latents, timesteps = noisy_latents[rows], timesteps[rows]
        predicted = self.process.predict_x0(model_pred[rows], noisy_latents, timesteps)
        pair = [self.move(x, noisy_latents, timesteps) for x in (predicted, images[rows])]
        squares = self._random_squares(pair[0], pair[1], self.crop // self.latents.pixels, generator)
        return per_row.index_put((rows,), self.compare(*squares))

    def move(self, latents: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        return latents

    def compare(self, predicted: Tensor, true: Tensor) -> Tensor:
        raise NotImplementedError


class StepBack(LatentTerm):
    """Half of the way: the step of DDIM from t to t / 2 for the prediction and for the truth, both decoded."""

    def move(self, latents: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        alpha, sigma = (factor.view(-1, 1, 1, 1) for factor in self.process.factors(timesteps))
        return self.process.add_noise(latents, (noisy_latents - alpha * latents) / sigma, timesteps // 2)

    def compare(self, predicted: Tensor, true: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.decoder.decode(true).clamp(-1, 1)
        return self.loss(self.decoder.decode(predicted), target)


class KnownNoise(Term):
    """x0 = truth + k (prediction - target), with k, which is sigma / alpha for epsilon, at most `most`."""

    latents_of_batch: Tensor  # the true ones, set by `train`

    def __init__(self, *args, most: float, **options):
        super().__init__(*args, **options)
        self.most = most

    def _score(self, model_pred, noisy_latents, timesteps, images, masks, generator) -> Tensor:
        alpha, sigma = (factor.view(-1, 1, 1, 1) for factor in self.process.factors(timesteps))
        share = (self.most * alpha / sigma).clamp(max=1)
        true = self.latents_of_batch
        predicted = true + share * (self.process.predict_x0(model_pred, noisy_latents, timesteps) - true)
        squares = self._random_squares(predicted, images, self.crop // self.latents.pixels, generator)
        decoded = self.decoder.decode(squares[0])
        return self._compare(decoded, squares[1])


class OnInk(Term):
    """Of four random squares the one with the most ink, decoded with a margin of a latent that is not scored."""

    CANDIDATES = 4

    def _random_squares(self, latents: Tensor, images: Tensor, size: int, draws: Squares) -> tuple[Tensor, Tensor]:
        pairs = []
        for _ in range(self.CANDIDATES):
            pairs.append(super()._random_squares(latents, images, size + 2, draws))
        ink = torch.stack([(1 - pair[1]).flatten(1).sum(1) for pair in pairs])
        best = ink.argmax(0), torch.arange(len(latents), device=latents.device)
        chosen, target = (torch.stack(part)[best] for part in zip(*pairs, strict=True))
        return chosen, self._inside(target)

    def _compare(self, images: Tensor, target: Tensor) -> Tensor:
        return super()._compare(images if images.shape == target.shape else self._inside(images), target)

    def _inside(self, images: Tensor) -> Tensor:
        edge = self.latents.pixels
        return images[..., edge:-edge, edge:-edge]


class EncoderTerm(LatentTerm):
    """Predicted and true latents at half the noise, as the encoder of the frozen U-Net sees them; no decoder."""

    frozen: nn.Module  # the U-Net without LoRAs, and the embeddings of the batch, set by `train`
    embeds_of_batch: Tensor

    def move(self, latents: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        alpha, sigma = (factor.view(-1, 1, 1, 1) for factor in self.process.factors(timesteps))
        self.moved_to = timesteps // 2
        return self.process.add_noise(latents, (noisy_latents - alpha * latents) / sigma, self.moved_to)

    def _random_squares(self, latents, images, size, draws):
        return latents, images

    def features(self, latents: Tensor) -> list[Tensor]:
        features: list[Tensor] = []

        class Done(Exception):
            pass

        def end(*call):
            raise Done

        hooks = [
            block.register_forward_hook(lambda *call: features.append(call[-1][0]))
            for block in self.frozen.down_blocks
        ]
        hooks.append(self.frozen.mid_block.register_forward_pre_hook(end))
        with contextlib.suppress(Done):
            self.frozen(latents, self.moved_to, self.embeds_of_batch)
        for hook in hooks:
            hook.remove()
        return features

    def compare(self, predicted: Tensor, true: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.features(true)
        values = []
        for features, target in zip(self.features(predicted), wanted, strict=True):
            deviation = target.std((0, 2, 3), keepdim=True).clamp(min=1e-3)
            values.append(((features - target) / deviation).square().flatten(1).mean(1))
        return torch.stack(values).mean(0)


class LatentPerceptual(LatentTerm):
    """LPL (Berrada et al. 2025): what the decoder's blocks see of predicted and of true latents.

    Each channel by the true one's mean and deviation, without what lies more than 3 deviations out, the deepest block
    weighted by 1 and each larger one by half of that.
    """

    def features(self, latents: Tensor) -> list[Tensor]:
        features: list[Tensor] = []
        blocks = self.decoder.vae.decoder.up_blocks
        hooks = [block.register_forward_hook(lambda *call: features.append(call[-1])) for block in blocks]
        self.decoder.decode(latents)
        for hook in hooks:
            hook.remove()
        return features

    def compare(self, predicted: Tensor, true: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.features(true)
        values = []
        for depth, (features, target) in enumerate(zip(self.features(predicted), wanted, strict=True)):
            whole = target.flatten(1).std(1).view(-1, 1, 1, 1)
            deviation = target.std((2, 3), keepdim=True).maximum(0.1 * whole)  # of blank paper it is next to nothing
            inside = (target - target.mean((2, 3), keepdim=True)).abs() <= 3 * deviation
            values.append(0.5**depth * ((features - target) / deviation * inside).square().flatten(1).mean(1))
        return torch.stack(values).sum(0)


class InkLoss(PerceptualLoss):
    """The distance where the target has ink, and two pixels around it."""

    def forward(self, images: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        map_of_loss = super().forward(images, target, spatial=True)
        ink = F.max_pool2d((1 - target.mean(1, keepdim=True)).clamp(0, 2) / 2, 5, 1, 2)[:, 0]
        return (map_of_loss * ink).sum((1, 2)) / ink.sum((1, 2)).clamp(min=1)


@dataclass
class Recipe:
    """Training of the LoRAs of an arm: with `term` at a ratio of gradients, or without."""

    term: Term | None = None
    ratio: float = 0.0
    snr_gamma: float | None = None
    high_noise: bool = False  # three timesteps of four from the noisier half of the schedule


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


def train(options, unet, vae, noise_scheduler, recipes: list[Recipe], seeds: Sequence[int], data: Data) -> None:
    """Train the LoRAs of `add_loras` for all recipes and seeds: `options` are the trainer's."""
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = train_lora_sketch.make_optimizer(options, parameters)
    arms, device = len(recipes), parameters[0].device
    for step in range(options.max_train_steps):
        drawn = [draw_batch(options, vae, seed, step, data) for seed in seeds]
        rows, latents, noise, timesteps = (torch.cat(part) for part in list(zip(*drawn, strict=True))[:4])
        raised = torch.cat([raise_noise(batch[3], seed, step) for batch, seed in zip(drawn, seeds, strict=True)])
        drawn_at = [raised if recipe.high_noise else timesteps for recipe in recipes]  # (arms) of (seeds x batch)
        rows, latents, noise, timesteps = (x.to(device) for x in (rows, latents, noise, torch.cat(drawn_at)))
        batch = {"images": data.images[rows], "latents": latents}
        noisy = noise_scheduler.add_noise(latents.repeat(arms, 1, 1, 1), noise.repeat(arms, 1, 1, 1), timesteps)
        prediction = unet(noisy, timesteps, data.embeds[rows].repeat(arms, 1, 1), return_dict=False)[0]
        parts = (x.chunk(arms) for x in (prediction.detach(), noisy, timesteps))
        pulls = []
        for recipe, drawn_timesteps, part, part_noisy, part_timesteps in zip(recipes, drawn_at, *parts, strict=True):
            part = part.requires_grad_()
            target = process_of(noise_scheduler).target(latents, noise, part_timesteps)
            losses = F.mse_loss(part, target, reduction="none").flatten(1).mean(1)
            if recipe.snr_gamma is not None:
                losses = losses * process_of(noise_scheduler).min_snr_weights(part_timesteps, recipe.snr_gamma)
            loss = losses.sum() / options.train_batch_size  # the sum of what each LoRA has as its mean
            if recipe.term is not None:
                counts = recipe.term.gate(drawn_timesteps, step).view(len(seeds), -1).sum(1).tolist()
                squares = [(made[4].clone_state(), count) for made, count in zip(drawn, counts, strict=True)]
                images = batch[recipe.term.compares]
                if isinstance(recipe.term, KnownNoise):
                    recipe.term.latents_of_batch = latents
                if isinstance(recipe.term, EncoderTerm):
                    recipe.term.embeds_of_batch = data.embeds[rows]
                values = recipe.term(part, part_noisy, part_timesteps, images, step, squares)
                # `balance` takes the mean over all rows, here those of len(seeds) LoRAs
                loss, _ = balance(loss, len(seeds) * values, part, recipe.ratio)
            pulls += torch.autograd.grad(loss, part)
        prediction.backward(torch.cat(pulls))
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
