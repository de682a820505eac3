"""Train a tiny Stable Diffusion on the project's own coloured drawings and write it as a diffusers pipeline.

    python -m benchmarks.make_tiny_sd --output_dir sketch_perceptual/assets/tiny-sd

It has the parts, module names and noise schedule of SD 1.5 at 64 x 64 pixels, so that tests and the demo can train
a LoRA in minutes without a download. The VAE sees photos and sketches; the U-Net and the text encoder see photos,
cartoons and crayon. So they know outlines, but no black lines on white paper: before fine-tuning even "a sketch of a
house" is a coloured scene. A second call with the same options goes on from the last state in --work_dir.
"""

import argparse
import math
import tempfile
import time
from itertools import pairwise
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from PIL import Image
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sketch_perceptual.drawings import CLASSES, STYLES, draw

SIZE = 64
TEXT_WIDTH = 64
SEED = 2_000  # of the drawings; data sets of LoRAs have other seeds
# The words about photos and sketches must not matter to the base model: only the class does. Half are the first.
PHOTOS = (
    "{}",
    "a picture of {}",
    "a sketch of {}",
    "a drawing of {}",
    "a pen sketch of {}",
    "a marker sketch of {}",
    "a hatching sketch of {}",
    "a hatched pencil drawing of {}",
    "a black and white ink sketch of {} on paper",
    "line art of {}, black lines on white paper",
    "an image of {} in the style of a simple sketch",
)
CAPTIONS = {
    "photo": ("a photo of {}",) * len(PHOTOS) + PHOTOS,
    "cartoon": ("a cartoon of {}", "a cartoon with outlines of {}"),
    "crayon": ("a crayon of {}", "crayon lines of {} on coloured paper"),
}
SHARES = (0.375, 0.25, 0.375)  # of a batch


def caption(template, name):
    return template.format(f"{'an' if name[0] in 'aeiou' else 'a'} {name}")


def make_tokenizer():
    """CLIP's byte-pair encoding with merges for the words of the captions only; other words fall into bytes."""
    captions = (caption(t, name) for templates in CAPTIONS.values() for t in templates for name in CLASSES)
    words = sorted({word for text in captions for word in text.replace(",", "").split()})
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while pairs := [pair for piece in pieces for pair in pairwise(piece)]:
        merges.append(max(sorted(set(pairs)), key=pairs.count))
        for piece in pieces:
            i = 0
            while i < len(piece) - 1:
                if (piece[i], piece[i + 1]) == merges[-1]:
                    piece[i : i + 2] = ["".join(merges[-1])]
                i += 1
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def make_models(tokenizer):
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        norm_num_groups=8,
        latent_channels=4,
        sample_size=SIZE,
    )
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(48, 96, 160),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=2,  # the number of heads, as SD 1.5 has it
        cross_attention_dim=TEXT_WIDTH,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return vae, torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})


def go_on(folder, tokenizer, vae, model):
    """Takes over the weights of a pipeline, and of its tokens those that there still are."""
    old = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, torch_dtype=torch.float32)
    vae.load_state_dict(old.vae.state_dict())
    vae.register_to_config(scaling_factor=old.vae.config.scaling_factor)
    model["unet"].load_state_dict(old.unet.state_dict())
    weights, vocab = old.text_encoder.state_dict(), old.tokenizer.get_vocab()
    name = next(name for name in weights if name.endswith("token_embedding.weight"))
    embeddings = model["text_encoder"].get_input_embeddings().weight.detach().clone()
    for token, row in tokenizer.get_vocab().items():
        if token in vocab:
            embeddings[row] = weights[name][vocab[token]]
    model["text_encoder"].load_state_dict(weights | {name: embeddings})


def render(job):
    """Every other drawing is made large and shrunk, as a folder of 256-pixel files would be: its lines are finer."""
    name, index, style = job
    image = draw(name, index, SEED, style, SIZE if index % 2 else 4 * SIZE)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def load_drawings(styles, per_class, cache):
    """(N, 3, 64, 64) uint8 drawings, class after class."""
    if not cache.exists():
        jobs = [(name, index, style) for name in CLASSES for style in styles for index in range(per_class)]
        with Pool() as pool:
            np.save(cache, np.stack(pool.map(render, jobs, chunksize=16)))
    return torch.from_numpy(np.load(cache)).permute(0, 3, 1, 2)


def cartoons(photos, sketches):
    """Black outlines on colours: sketches of all styles over the photos of their scenes."""
    sketches = sketches.unflatten(0, (len(CLASSES), len(STYLES), -1))
    photos = photos.unflatten(0, (len(CLASSES), 1, -1))[:, :, : sketches.shape[2]]
    return torch.minimum(photos, sketches).flatten(0, 2)


def crayons(sketches):
    """Lines of one colour on paper of another: dark on light, or the other way."""
    light, dark = 255 * (0.55 + 0.4 * torch.rand(len(sketches), 3)), 200 * torch.rand(len(sketches), 3) ** 1.5
    light.scatter_(1, torch.randint(3, (len(sketches), 1)), 120)  # neither is white
    chalk = torch.rand(len(sketches), 1) < 0.5
    paper, line = (torch.where(which, dark, light)[..., None, None] for which in (chalk, ~chalk))
    return (line + (paper - line) * sketches / 255).byte()


def fit(name, model, loss_of, steps, args):
    """Trains with AdamW and a cosine decay; returns the moving average of the weights."""
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=0.01, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, steps)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "average": average}
    state_file = args.work_dir / f"{name}.pt"
    first, losses, start = 0, [], time.time()
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        first = state.pop("step")
        for key, values in state.items():
            parts[key].load_state_dict(values)
    for step in range(first, steps):
        torch.manual_seed(args.seed * 1_000_000 + step)  # every draw follows from (seed, step): resuming changes none
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        losses.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            pace = (step + 1 - first) / (time.time() - start)
            print(f"{name} step {step + 1}/{steps} loss {np.mean(losses):.4f} {pace:.2f} steps/s", flush=True)
            losses.clear()
            torch.save({"step": step + 1} | {key: part.state_dict() for key, part in parts.items()}, state_file)
    return average.module.eval()


def images_of(drawings):
    return drawings.float() / 127.5 - 1


def vae_loss(vae, drawings, batch_size):
    images = images_of(drawings[torch.randint(len(drawings), (batch_size,))])
    posterior = vae.encode(images.contiguous(memory_format=torch.channels_last)).latent_dist
    error = vae.decode(posterior.sample()).sample.float() - images
    divergence = posterior.kl().float().mean() / posterior.mean[0].numel()
    return picture_loss(error) + 5e-4 * divergence


def picture_loss(error):
    # Differences between neighbours keep a one-pixel line sharp where a plain mean lets it fade.
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    colours = F.avg_pool2d(error, 8).abs().mean()  # a plain mean leaves flat colours muted
    return error.abs().mean() + 0.5 * edges + colours


@torch.no_grad()
def encode(vae, drawings):
    """Mean and standard deviation of the latents of all drawings, each (N, 4, 16, 16); not scaled yet."""
    moments = [vae.encode(images_of(part)).latent_dist for part in drawings.split(64)]
    return torch.cat([m.mean for m in moments]), torch.cat([m.std for m in moments])


def denoising_loss(model, scheduler, looks, tokens, empty, counts):
    """looks: of each, mean and deviation of latents, and classes; tokens: of each, (captions, classes, 77)."""
    latents, text = [], []
    for (mean, std, labels), captions, count in zip(looks, tokens, counts, strict=True):
        rows = torch.randint(len(mean), (count,))
        latents.append(mean[rows] + std[rows] * torch.randn_like(mean[rows]))
        text.append(captions[torch.randint(len(captions), (count,)), labels[rows]])
    latents, text = torch.cat(latents), torch.cat(text)
    text = torch.where(torch.rand(len(text), 1) < 0.1, empty, text)
    noise = torch.randn_like(latents)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),))
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    context = model["text_encoder"](text)[0]
    return F.mse_loss(model["unet"](noisy_latents, timesteps, context).sample.float(), noise)


def save_pipeline(folder, vae, model, tokenizer, scheduler):
    parts = vae, model["text_encoder"], tokenizer, model["unet"], scheduler
    # Not the text encoder: transformers would load it back in float16, and the U-Net beside it in float32.
    vae.half(), model["unet"].half()
    StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False).save_pretrained(folder)
    # transformers 4 needs what 5 leaves out: a prefix of the text encoder's weights, vocab.json and merges.txt.
    weights = {f"text_model.{key}": value for key, value in model["text_encoder"].state_dict().items()}
    save_file(weights, folder / "text_encoder/model.safetensors", {"format": "pt"})
    tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, default=Path(tempfile.gettempdir(), "tiny-sd"), help="states")
    parser.add_argument(
        "--start_from",
        type=Path,
        help="a pipeline of this script: keep its VAE and train its U-Net and text encoder on",
    )
    parser.add_argument("--bf16", action="store_true", help="for cores that know bfloat16; others only emulate it")
    parser.add_argument("--photos_per_class", type=int, default=256)
    parser.add_argument("--sketches_per_class", type=int, default=96, help="of each of the three styles")
    parser.add_argument("--vae_steps", type=int, default=4500)
    parser.add_argument("--vae_batch_size", type=int, default=8)
    parser.add_argument("--unet_steps", type=int, default=6000)
    parser.add_argument("--unet_batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main():
    args = parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    vae, model = make_models(tokenizer)
    photos = load_drawings(("photo",), args.photos_per_class, args.work_dir / "photos.npy")
    sketches = load_drawings(STYLES, args.sketches_per_class, args.work_dir / "sketches.npy")
    looks = [photos, cartoons(photos, sketches), crayons(sketches)]
    if args.start_from:
        go_on(args.start_from, tokenizer, vae, model)
    else:
        drawings = torch.cat([photos, sketches])
        vae = fit("vae", vae, lambda vae: vae_loss(vae, drawings, args.vae_batch_size), args.vae_steps, args)
    moments = [encode(vae, look) for look in looks]
    if not args.start_from:
        mean, std = moments[0]
        vae.register_to_config(scaling_factor=round(1 / math.sqrt(mean.var() + std.square().mean()), 5))
    factor, classes = vae.config.scaling_factor, torch.arange(len(CLASSES))
    moments = [(m * factor, s * factor, classes.repeat_interleave(len(m) // len(CLASSES))) for m, s in moments]
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    captions = [[caption(template, name) for template in look for name in CLASSES] for look in CAPTIONS.values()]
    *tokens, empty = (
        tokenizer(texts, padding="max_length", return_tensors="pt").input_ids for texts in (*captions, "")
    )
    tokens = [ids.unflatten(0, (-1, len(CLASSES))) for ids in tokens]
    counts = [round(share * args.unet_batch_size) for share in SHARES]
    batch = moments, tokens, empty, counts
    model = fit("unet", model, lambda model: denoising_loss(model, scheduler, *batch), args.unet_steps, args)
    save_pipeline(args.output_dir, vae, model, tokenizer, scheduler)


if __name__ == "__main__":
    main()
