"""Train a tiny Stable Diffusion on the project's own coloured drawings and write it as a diffusers pipeline.

    python -m tools.make_tiny_sd --taesd madebyollin/taesd --output_dir sketch_perceptual/assets/tiny-sd

It has the parts, module names, latents and noise schedule of SD 1.5 at 128 x 128 pixels, so that tests and the demo
can train a LoRA in minutes without a download. Its VAE is TAESD, which encodes to the latents of SD 1.5 and decodes
them. The U-Net and the text encoder see photos, cartoons and crayon. So they know outlines, but no black lines on
white paper: before fine-tuning even "a sketch of a house" is a coloured scene. A second call with the same options
goes on from the last state in --work_dir.
"""

import argparse
import tempfile
import time
from itertools import pairwise
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sketch_perceptual.drawings import CLASSES, STYLES, draw
from sketch_perceptual.networks.backbone import BUNDLED

TINY_SD = BUNDLED.parent / "tiny-sd"
SIZE = 128
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
    unet = UNet2DConditionModel(
        sample_size=SIZE // 8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(48, 96, 120),
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
    return torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})


def go_on(folder, tokenizer, model):
    """Takes over the weights of such a pipeline, cut to size, and of its tokens those that there still are."""
    old = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, torch_dtype=torch.float32)
    unet = old.unet.state_dict()
    cut = {name: unet[name][tuple(map(slice, weight.shape))] for name, weight in model["unet"].state_dict().items()}
    model["unet"].load_state_dict(cut)
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
    image = draw(name, index, SEED, style, SIZE if index % 2 else 2 * SIZE)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def load_drawings(styles, per_class):
    """(N, 3, 128, 128) uint8 drawings, class after class."""
    jobs = [(name, index, style) for name in CLASSES for style in styles for index in range(per_class)]
    with Pool() as pool:
        drawings = np.stack(pool.map(render, jobs, chunksize=16))
    return torch.from_numpy(drawings).permute(0, 3, 1, 2)


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


def fit(model, loss_of, args):
    """Trains with AdamW and a cosine decay; returns the moving average of the weights."""
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=0.01, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, args.steps)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "average": average}
    state_file = args.work_dir / "unet.pt"
    first, losses, start = 0, [], time.time()
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        first = state.pop("step")
        for key, values in state.items():
            parts[key].load_state_dict(values)
    for step in range(first, args.steps):
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
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            pace = (step + 1 - first) / (time.time() - start)
            print(f"step {step + 1}/{args.steps} loss {np.mean(losses):.4f} {pace:.2f} steps/s", flush=True)
            losses.clear()
            torch.save({"step": step + 1} | {key: part.state_dict() for key, part in parts.items()}, state_file)
    return average.module.eval()


def images_of(drawings):
    return drawings.float() / 127.5 - 1


@torch.no_grad()
def encode(vae, drawings):
    """(N, 3, H, W) uint8 -> (N, 4, H/8, W/8) latents."""
    vae.to(memory_format=torch.channels_last)
    return torch.cat([vae.encode(images_of(part)).latents for part in drawings.split(32)]).contiguous()


def load_latents(args):
    """Return the latents of all looks, class after class, (N, 4, 16, 16)."""
    cache = args.work_dir / "latents.safetensors"
    if not cache.exists():
        taesd = AutoencoderTiny.from_pretrained(args.taesd, torch_dtype=torch.float32)
        photos = load_drawings(("photo",), args.photos_per_class)
        sketches = load_drawings(STYLES, args.sketches_per_class)
        looks = {"photo": photos, "cartoon": cartoons(photos, sketches), "crayon": crayons(sketches)}
        save_file({look: encode(taesd, drawings) for look, drawings in looks.items()}, cache)
    return load_file(cache)


def denoising_loss(model, scheduler, looks, tokens, empty, counts):
    """looks: of each, latents and their classes; tokens: of each, (captions, classes, 77)."""
    latents, text = [], []
    for (drawn, labels), captions, count in zip(looks, tokens, counts, strict=True):
        rows = torch.randint(len(drawn), (count,))
        latents.append(drawn[rows])
        text.append(captions[torch.randint(len(captions), (count,)), labels[rows]])
    latents, text = torch.cat(latents), torch.cat(text)
    text = torch.where(torch.rand(len(text), 1) < 0.1, empty, text)
    noise = torch.randn_like(latents)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),))
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    context = model["text_encoder"](text)[0]
    return F.mse_loss(model["unet"](noisy_latents, timesteps, context).sample.float(), noise)


def save_pipeline(folder, taesd, model, tokenizer, scheduler):
    vae = AutoencoderTiny.from_pretrained(taesd, torch_dtype=torch.float16)
    vae.register_to_config(_name_or_path="")  # a folder of this machine
    parts = vae, model["text_encoder"], tokenizer, model["unet"], scheduler
    # Not the text encoder: transformers would load it back in float16, and the U-Net beside it in float32.
    model["unet"].half()
    StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False).save_pretrained(folder)
    # transformers 4 needs what 5 leaves out: a prefix of the text encoder's weights, vocab.json and merges.txt.
    weights = {f"text_model.{key}": value for key, value in model["text_encoder"].state_dict().items()}
    save_file(weights, folder / "text_encoder/model.safetensors", {"format": "pt"})
    tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--taesd", required=True, help="an AutoencoderTiny of SD 1.5: folder or Hub id")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, default=Path(tempfile.gettempdir(), "tiny-sd"), help="states")
    parser.add_argument(
        "--start_from", type=Path, help="a pipeline of this script, whose U-Net and text encoder to train on"
    )
    parser.add_argument("--bf16", action="store_true", help="for cores that know bfloat16; others only emulate it")
    parser.add_argument("--photos_per_class", type=int, default=128)
    parser.add_argument("--sketches_per_class", type=int, default=48, help="of each of the three styles")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main():
    args = parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    model = make_models(tokenizer)
    if args.start_from:
        go_on(args.start_from, tokenizer, model)
    latents = load_latents(args)
    classes = torch.arange(len(CLASSES))
    looks = [(latents[look], classes.repeat_interleave(len(latents[look]) // len(CLASSES))) for look in CAPTIONS]
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
    counts = [round(share * args.batch_size) for share in SHARES]
    batch = looks, tokens, empty, counts
    model = fit(model, lambda model: denoising_loss(model, scheduler, *batch), args)
    save_pipeline(args.output_dir, args.taesd, model, tokenizer, scheduler)


if __name__ == "__main__":
    main()
