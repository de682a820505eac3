#!/usr/bin/env python
"""Fine-tune Stable Diffusion 1.5 on drawings with LoRA and a perceptual term (Seo 2025, section 4.1).

    accelerate launch train_lora_sketch.py \\
      --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
      --train_data_dir drawings --train_batch_size 1 --seed 42 \\
      --validation_prompt "a sketch of a fox" --output_dir sketch-lora

Takes every option of diffusers' train_text_to_image_lora.py. The prediction's clean latents are decoded and compared
with the drawing by a network that knows drawings; --perceptual_weight 0 is the plain script. The adapter loads with
`pipeline.load_lora_weights(output_dir)`.
"""

import argparse
import functools
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, set_seed
from diffusers import AutoencoderTiny, DDPMScheduler, StableDiffusionPipeline
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from huggingface_hub import ModelCardData
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from tqdm.auto import tqdm

from sketch_perceptual.data.batches import make_loader
from sketch_perceptual.data.checks import read_keys
from sketch_perceptual.data.image_sets import CaptionedImages
from sketch_perceptual.data.images import INTERPOLATIONS, to_pil
from sketch_perceptual.data.options import add_caption_options, check_caption_options, load_captioned
from sketch_perceptual.diffusion import (
    PREDICTION_TYPES,
    PerceptualTerm,
    decode,
    denoising_target,
    encode_moments,
    min_snr_weights,
    sample_latents,
)
from sketch_perceptual.errors import InputError
from sketch_perceptual.evaluation.pipelines import add_pipeline_options, load_pipeline
from sketch_perceptual.figures import sheet
from sketch_perceptual.losses import LOSSES, build_loss
from sketch_perceptual.networks.hub_model import fingerprint
from sketch_perceptual.running import cards
from sketch_perceptual.running.checkpoints import load_checkpoint, save_checkpoint
from sketch_perceptual.running.feature_cache import FeatureCache, fill_cache
from sketch_perceptual.running.interruption import catch_signals
from sketch_perceptual.running.optimizers import make_lr_scheduler, make_optimizer, plan_steps
from sketch_perceptual.running.options import CACHE, add_training_options, at_least
from sketch_perceptual.running.startup import check_space, run, start
from sketch_perceptual.running.steps import NonFiniteGuard
from sketch_perceptual.running.trackers import start_trackers, track_images
from sketch_perceptual.seeds import generator

logger = get_logger(__name__, log_level="INFO")

TARGET_MODULES = ["to_k", "to_q", "to_v", "to_out.0"]
ADAPTER = "default"
WEIGHTS = "pytorch_lora_weights.safetensors"
KOHYA_WEIGHTS = "pytorch_lora_weights_kohya.safetensors"
BEFORE_AFTER = "before_after.png"
FEW_PROMPTS = 1000
RANDOM_CROPS = "images that are not square are cropped at random: add --fit pad or --center_crop"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count, natural, rate = at_least(1), at_least(0), at_least(0.0, float)

    add = parser.add_argument_group("model").add_argument
    add_pipeline_options(add, required=True)
    add("--rank", type=count, default=4, help="rank of the LoRA")
    add("--lora_alpha", type=count, help="scale of the LoRA is alpha / rank; default: the rank")
    add("--prediction_type", choices=PREDICTION_TYPES, help="default: the scheduler's own")
    add("--noise_offset", type=rate, default=0.0, help="scale of a noise that is constant over each channel")
    add("--snr_gamma", type=rate, help="Min-SNR weighting of the denoising loss; 5.0 is recommended")
    add("--enable_xformers_memory_efficient_attention", action="store_true")
    add("--export_kohya", action="store_true", help=f"also write {KOHYA_WEIGHTS} for AUTOMATIC1111 and ComfyUI")

    add = add_caption_options(parser)
    add("--resolution", type=count, default=512, help="images are made this wide and high, in pixels")
    add("--fit", choices=("crop", "pad"), default="crop", help="how an image that is not square becomes one")
    add("--center_crop", action="store_true", help="crop the centre; default: a random place")
    add("--random_flip", action="store_true", help="mirror half of the images")
    add("--image_interpolation_mode", choices=tuple(INTERPOLATIONS), default="lanczos")
    cache = {"action": argparse.BooleanOptionalAction, "default": None}
    add("--cache_latents", **cache, help="encode each image once; default: where nothing is cropped at random")
    add("--cache_prompts", **cache, help=f"embed each caption once; default: if there are at most {FEW_PROMPTS}")
    add("--feature_dir", default=CACHE, help="latents are kept here, by content, VAE, resolution, fit and precision")

    add = parser.add_argument_group("perceptual term").add_argument
    add("--perceptual_weight", type=rate, default=0.03, help="1 weighs unrelated drawings as 1; 0 is the plain script")
    add("--perceptual_loss", default="attention_vgg", help=f"{', '.join(LOSSES)}, an entry point, or module:Class")
    add("--backbone", help="network of the loss: folder, Hub id, .safetensors of VGG-16; default: the loss's own")
    add("--perceptual_layers", nargs="+", metavar="LAYER", help="taps, e.g. relu1_2 relu3_3")
    add("--perceptual_resolution", type=count, help="larger images are shrunk to this for the loss; default: 224")
    add("--perceptual_crop", type=count, help="side of the random square that is decoded and scored; default: half")
    add("--perceptual_min_snr", type=rate, default=1.0, help="rows with less signal are not scored; 0 scores all")
    add("--perceptual_max_timestep", type=natural, help="gate by timestep instead of by SNR")
    add("--perceptual_start_step", type=natural, default=0, help="no term before this step")
    add("--perceptual_every", type=count, default=1, help="the term in each so many-th step only")
    add("--perceptual_target", choices=("image", "reconstruction"), default="image", help="or its VAE round trip")
    add("--perceptual_decoder", default="vae", help='"vae", or an AutoencoderTiny, e.g. madebyollin/taesd')
    add("--perceptual_dtype", choices=("float32", "bfloat16"), default="float32")

    add_training_options(parser, output_dir="sd-model-finetuned-lora")
    parser.add_argument("--use_8bit_adam", action="store_true", help="AdamW of bitsandbytes")

    add = parser.add_argument_group("validation").add_argument
    add("--validation_prompt", nargs="+", metavar="PROMPT", help="prompts drawn during training and at its end")
    add("--num_validation_images", type=natural, default=4, help="images a prompt")
    add("--validation_epochs", type=count, default=1, help="draw them every so many epochs")

    args = parser.parse_args(argv)
    check_caption_options(parser, args)
    if args.lora_alpha is None:
        args.lora_alpha = args.rank
    if args.perceptual_crop is None:
        args.perceptual_crop = max(16, args.resolution // 16 * 8)
    if args.perceptual_resolution is None and args.perceptual_loss in LOSSES:
        args.perceptual_resolution = 224
    return args


def main(args: argparse.Namespace) -> None:
    accelerator = start(args)
    pipeline, noise_scheduler = load_models(args, accelerator)
    perceptual_term = build_term(args, pipeline.vae, noise_scheduler)
    data, keys = load_data(args, accelerator, pipeline.tokenizer)
    embed = PromptEmbedder(args, pipeline, data)
    repo_id = None
    if args.push_to_hub and accelerator.is_main_process:
        repo_id = cards.create_repo(cards.model_name(args.hub_model_id, args.output_dir), args.hub_token)

    lora_parameters = add_lora(args, pipeline.unet)
    sampler, loader = make_loader(args, data, collate)
    optimizer = make_optimizer(args, lora_parameters, adam(args))
    unet, prepared_optimizer, loader = accelerator.prepare(pipeline.unet, optimizer, loader)
    plan_steps(args, len(loader))
    cache_latents(args, accelerator, pipeline.vae, data, keys, perceptual_term)
    lr_scheduler = make_lr_scheduler(args, optimizer)
    register_adapter_hooks(accelerator)
    settings = resumable_settings(args, accelerator, data, perceptual_term)
    resumed = load_checkpoint(accelerator, args, settings) or {"global_step": 0, "epoch": 0, "batch": 0}
    if "lr_scheduler" in resumed:
        lr_scheduler.load_state_dict(resumed["lr_scheduler"])
    guard = NonFiniteGuard(resumed.get("skipped_steps", 0), scaled=accelerator.scaler is not None)
    start_trackers(accelerator, "text2image-fine-tune", args)
    logger.info(run_summary(args, accelerator, loader, perceptual_term, lora_parameters))

    stop = catch_signals()
    step, sums, seen = resumed["global_step"], 0, []
    progress = tqdm(
        total=args.max_train_steps, initial=step, desc="Steps", disable=not accelerator.is_local_main_process
    )
    for epoch in range(resumed["epoch"], args.num_train_epochs):
        unet.train()
        sampler.epoch = epoch
        first = resumed["batch"] if epoch == resumed["epoch"] else 0
        batches = accelerator.skip_first_batches(loader, first) if first else loader
        for number, batch in enumerate(batches, first):
            if step >= args.max_train_steps:
                break
            with accelerator.accumulate(unet):
                draw = generator(args.seed, "noise", epoch, number, accelerator.process_index)
                denoising, perceptual, gate, timesteps = compute_losses(
                    args, pipeline.vae, unet, embed, noise_scheduler, perceptual_term, batch, draw, step
                )
                accelerator.backward(denoising.mean() + args.perceptual_weight * perceptual.mean())
                rows = torch.stack([denoising, perceptual, gate, torch.ones_like(gate)]).detach()
                sums = sums + rows.sum(1)
                seen.append((batch["name"], rows.sum(0), timesteps))
                if not accelerator.sync_gradients:
                    continue
                grad_norm = accelerator.clip_grad_norm_(lora_parameters, args.max_grad_norm)
                *totals, stopped = accelerator.reduce(torch.cat([sums, sums.new_tensor([stop() > 0])]), "sum").tolist()
                if guard.is_finite(step, [*totals, float(grad_norm)], seen) or guard.scaled:
                    prepared_optimizer.step()
                lr_scheduler.step()
                prepared_optimizer.zero_grad()

            step, sums, seen = step + 1, 0, []
            logs = step_logs(args, totals, float(grad_norm), lr_scheduler, guard)
            progress.set_postfix({k: f"{v:.3g}" for k, v in logs.items()}, refresh=False)
            progress.update()
            accelerator.log(logs, step)
            if step % args.checkpointing_steps == 0 or stopped:
                next_epoch, next_batch = divmod(epoch * len(loader) + number + 1, len(loader))
                state = {"global_step": step, "epoch": next_epoch, "batch": next_batch, "skipped_steps": guard.total}
                state |= {"lr_scheduler": lr_scheduler.state_dict(), "settings": settings}
                saved = save_checkpoint(accelerator, args, state)
                logger.info(f"saved {saved}")
            if stopped:
                logger.warning(f"interrupted after step {step}; go on with --resume_from_checkpoint latest")
                accelerator.end_training()
                sys.exit(128 + (stop() or 15))
        if args.validation_prompt and epoch % args.validation_epochs == 0 and accelerator.is_main_process:
            validate(args, accelerator, pipeline, embed, step)

    progress.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        accelerator.unwrap_model(unet, keep_fp32_wrapper=False)  # takes accelerate's autocast off pipeline.unet
        files = finish(args, accelerator, pipeline, embed, settings, guard)
        if repo_id:
            cards.push(args.output_dir, repo_id, files, args.hub_token)
    accelerator.end_training()


def compute_losses(
    args, vae, unet, embed, noise_scheduler, perceptual_term, batch, draw, step
) -> tuple[torch.Tensor, ...]:
    """Denoising loss, perceptual loss, gate (1 where the term is open) and timesteps of one batch, each (B,)."""
    with torch.no_grad():
        moments = batch["moments"] if "moments" in batch else encode_moments(vae, batch["pixel_values"])
        latents = sample_latents(vae, moments, draw).float()
        prompt_embeds = embed(batch["caption"])
    noise = torch.randn(latents.shape, generator=draw)
    if args.noise_offset:
        noise += args.noise_offset * torch.randn(*latents.shape[:2], 1, 1, generator=draw)
    noise = noise.to(latents.device)
    timesteps = torch.randint(noise_scheduler.config.num_train_timesteps, (len(latents),), generator=draw)
    gate = torch.zeros(len(latents)) if perceptual_term is None else perceptual_term.gate(timesteps, step)
    timesteps = timesteps.to(latents.device)
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    model_pred = unet(noisy_latents.to(prompt_embeds.dtype), timesteps, prompt_embeds, return_dict=False)[0].float()

    target = denoising_target(latents, noise, timesteps, noise_scheduler)
    denoising = F.mse_loss(model_pred, target, reduction="none").flatten(1).mean(1)
    if args.snr_gamma is not None:
        denoising = denoising * min_snr_weights(timesteps, args.snr_gamma, noise_scheduler)
    perceptual = torch.zeros_like(denoising)
    if perceptual_term is not None:
        perceptual = perceptual_term(model_pred, noisy_latents, timesteps, batch["pixel_values"], step, draw)
    return denoising, perceptual, gate.to(denoising), timesteps


def load_models(args, accelerator: Accelerator) -> tuple[StableDiffusionPipeline, DDPMScheduler]:
    """The frozen pipeline on its device, in the precision of the run, and the scheduler that adds the noise."""
    pipeline = load_pipeline(args, accelerator, safety_checker=None, requires_safety_checker=False)
    noise_scheduler = DDPMScheduler.from_pretrained(
        args.pretrained_model_name_or_path, subfolder="scheduler", revision=args.revision, cache_dir=args.cache_dir
    )
    if args.prediction_type is not None:
        noise_scheduler.register_to_config(prediction_type=args.prediction_type)
        pipeline.scheduler = type(pipeline.scheduler).from_config(
            pipeline.scheduler.config, prediction_type=args.prediction_type
        )
    if args.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        try:
            pipeline.unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError) as error:
            raise InputError(f"--enable_xformers_memory_efficient_attention: {error}") from error
    return pipeline, noise_scheduler


def load_data(args, accelerator: Accelerator, tokenizer) -> tuple[CaptionedImages, list[str]]:
    """The captioned images, each of which has been read once, and what stands for the contents of each."""
    data = load_captioned(
        args,
        accelerator,
        resolution=args.resolution,
        fit=args.fit,
        center_crop=args.center_crop,
        random_flip=args.random_flip,
        interpolation=args.image_interpolation_mode,
        seed=args.seed,
    )
    not_square = []
    data, keys = read_keys(
        args, accelerator, data, lambda index, image: image.width != image.height and not_square.append(index)
    )
    random_crops = args.fit == "crop" and not args.center_crop and bool(not_square)
    (args.random_crops,) = broadcast_object_list([random_crops])
    warn_of_long_captions(tokenizer, [text for row in data.rows for text in data.captions[row]])
    return data, keys


def warn_of_long_captions(tokenizer, captions: list[str]) -> None:
    lengths = [len(ids) for ids in tokenizer(captions, verbose=False).input_ids]
    long = [text for text, n in zip(captions, lengths, strict=True) if n > tokenizer.model_max_length]
    if long:
        logger.warning(
            f"{len(long)} captions have more than {tokenizer.model_max_length} tokens; what is over is not read. The"
            f" longest: {max(long, key=len)!r}"
        )


def tokenize(tokenizer, captions: list[str]) -> torch.Tensor:
    return tokenizer(
        captions, max_length=tokenizer.model_max_length, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids


def collate(examples: list[dict]) -> dict:
    batch = {key: [example[key] for example in examples] for key in examples[0]}
    return {key: torch.stack(x) if isinstance(x[0], torch.Tensor) else x for key, x in batch.items()}


class PromptEmbedder:
    """Captions -> (B, 77, C). With `--cache_prompts` all are embedded at the start and the text encoder leaves."""

    def __init__(self, args, pipeline: StableDiffusionPipeline, data: CaptionedImages):
        self.tokenizer, self.text_encoder = pipeline.tokenizer, pipeline.text_encoder
        self.device = pipeline.unet.device
        captions = {caption for row in data.rows for caption in data.captions[row]}
        if args.cache_prompts is None:
            args.cache_prompts = len(captions) <= FEW_PROMPTS
        drawn = ["", *args.validation_prompt] if args.validation_prompt else []
        wanted = {*drawn, *(captions if args.cache_prompts else [])}
        self.kept: dict[str, torch.Tensor] = {}
        self.kept = {caption: self([caption]).cpu() for caption in sorted(wanted)}
        if args.cache_prompts:
            self.text_encoder = pipeline.text_encoder = None
            logger.info(f"{len(captions)} distinct captions are embedded; the text encoder is not needed any more")

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> torch.Tensor:
        if all(caption in self.kept for caption in captions):
            return torch.cat([self.kept[caption] for caption in captions]).to(self.device)
        return self.text_encoder(tokenize(self.tokenizer, captions).to(self.device))[0]


def cache_latents(
    args, accelerator: Accelerator, vae, data: CaptionedImages, keys: list[str], perceptual_term
) -> None:
    """With `--cache_latents`, have `data` give the moments of its latents, and its images only where they are scored.

    Images are encoded one by one, so that the latents do not depend on what else was missing.
    """
    if args.cache_latents is None:
        batch = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
        pays = args.max_train_steps * batch >= len(data) * (2 if args.random_flip else 1)
        args.cache_latents = pays and not args.random_crops
        if args.random_crops:
            logger.info(f"--no-cache_latents, because {RANDOM_CROPS}")
    elif args.cache_latents and args.random_crops:
        raise InputError(f"--cache_latents cannot be: {RANDOM_CROPS}")
    if not args.cache_latents:
        return
    settings = [args.resolution, args.fit, args.image_interpolation_mode, args.background, accelerator.mixed_precision]
    cache = FeatureCache(Path(args.feature_dir, "-".join(map(str, ["latents", fingerprint(vae), *settings]))))
    flips = (False, True) if args.random_flip else (False,)
    places = [(index, flipped) for index in range(len(data)) for flipped in flips]
    fill_cache(
        args,
        accelerator,
        cache,
        [latents_key(keys[index], flipped) for index, flipped in places],
        functools.partial(read_place, data, places),
        lambda images: encode_moments(vae, images).flatten(1),
        lambda position: data.name(places[position][0]),
        batch_size=1,
        what="latents",
    )
    data.moments = functools.partial(read_moments, cache, keys, 2 * vae.config.latent_channels)
    data.with_pixels = perceptual_term is not None
    if perceptual_term is None or perceptual_term.target == "image":
        vae.encoder = None


def latents_key(key: str, flipped: bool) -> str:
    return f"{key}-flipped" if flipped else key


def read_place(data: CaptionedImages, places: list[tuple[int, bool]], position: int) -> torch.Tensor:
    return data.pixels(*places[position])


def read_moments(cache: FeatureCache, keys: list[str], channels: int, index: int, flipped: bool) -> torch.Tensor:
    row = cache.row(latents_key(keys[index], flipped))
    return row.view(channels, math.isqrt(len(row) // channels), -1)


def build_term(args, vae, noise_scheduler) -> PerceptualTerm | None:
    """The perceptual term; None at weight 0, for which nothing is loaded."""
    if args.perceptual_weight == 0:
        return None
    dtype = getattr(torch, args.perceptual_dtype)
    loss = build_loss(
        args.perceptual_loss,
        size=min(args.perceptual_crop, args.resolution),
        dtype=dtype,
        backbone=args.backbone,
        layers=args.perceptual_layers,
        resolution=args.perceptual_resolution,
    )
    decoder = None
    if args.perceptual_decoder != "vae":
        try:
            decoder = AutoencoderTiny.from_pretrained(args.perceptual_decoder, cache_dir=args.cache_dir).to(vae.device)
        except (OSError, ValueError) as error:
            raise InputError(f"--perceptual_decoder {args.perceptual_decoder} cannot be loaded: {error}") from error
    return PerceptualTerm(
        loss,
        vae,
        noise_scheduler,
        min_snr=args.perceptual_min_snr,
        max_timestep=args.perceptual_max_timestep,
        start_step=args.perceptual_start_step,
        every=args.perceptual_every,
        target=args.perceptual_target,
        decoder=decoder,
        dtype=dtype,
        crop=args.perceptual_crop,
        checkpoint=args.gradient_checkpointing,
    )


def adam(args) -> type[torch.optim.Optimizer]:
    if not args.use_8bit_adam:
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise InputError("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes") from error
    return AdamW8bit


def add_lora(args, unet) -> list[torch.nn.Parameter]:
    """Add the adapter and return its parameters, in float32 whatever the precision of the run."""
    set_seed(args.seed)  # what was loaded before must not change how the adapter starts
    unet.add_adapter(
        LoraConfig(
            r=args.rank, lora_alpha=args.lora_alpha, init_lora_weights="gaussian", target_modules=TARGET_MODULES
        ),
        adapter_name=ADAPTER,
    )
    cast_training_params(unet, dtype=torch.float32)
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def register_adapter_hooks(accelerator: Accelerator) -> None:
    """Checkpoints hold the adapter, as a file that loads as it is, in place of the U-Net."""

    def save(models, weights, output_dir):
        weights.clear()
        if accelerator.is_main_process:
            save_adapter(accelerator.unwrap_model(models[0]), output_dir)

    def load(models, input_dir):
        lora_state_dict, _ = StableDiffusionPipeline.lora_state_dict(input_dir, weight_name=WEIGHTS)
        unet = accelerator.unwrap_model(models.pop())
        unet_state_dict = {k.removeprefix("unet."): v for k, v in lora_state_dict.items()}
        set_peft_model_state_dict(unet, convert_unet_state_dict_to_peft(unet_state_dict), adapter_name=ADAPTER)
        cast_training_params(unet, dtype=torch.float32)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_adapter(unet, folder: str | Path) -> None:
    """Write the adapter in diffusers' names with its LoraConfig, which holds the alpha, as metadata."""
    StableDiffusionPipeline.save_lora_weights(
        save_directory=folder,
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(unet, adapter_name=ADAPTER)),
        unet_lora_adapter_metadata=unet.peft_config[ADAPTER].to_dict(),
    )


def save_kohya(unet, path: Path) -> None:
    """Write the adapter in the names of kohya's scripts, each module with its alpha."""
    weights = {}
    for name, weight in get_peft_model_state_dict(unet, adapter_name=ADAPTER).items():
        module, _, part = name.removesuffix(".weight").rpartition(".")
        module = "lora_unet_" + module.replace(".", "_")
        weights[f"{module}.lora_{'down' if part == 'lora_A' else 'up'}.weight"] = weight.contiguous()
        weights[f"{module}.alpha"] = torch.tensor(float(unet.peft_config[ADAPTER].lora_alpha))
    save_file(weights, path, metadata={"format": "pt"})


def resumable_settings(args, accelerator: Accelerator, data: CaptionedImages, perceptual_term) -> dict:
    """What a resumed run must share with the run that it continues."""
    names = """pretrained_model_name_or_path rank lora_alpha prediction_type noise_offset snr_gamma dataset_name
        train_data_dir resolution fit center_crop random_flip seed train_batch_size gradient_accumulation_steps
        perceptual_weight"""
    settings = {name: getattr(args, name) for name in names.split()}
    settings |= {"images": len(data), "processes": accelerator.num_processes}
    if perceptual_term is not None:
        settings |= {name: value for name, value in vars(args).items() if name.startswith("perceptual_")}
        if backbone := getattr(perceptual_term.loss, "backbone", None):
            settings["backbone_weights"] = fingerprint(backbone)
            settings["backbone_attention"] = backbone.attention
            settings["backbone_pool_after_attention"] = backbone.pool_after_attention
    return settings


def run_summary(args, accelerator, loader, perceptual_term, lora_parameters) -> str:
    """What will be trained and written; InputError if the disk cannot hold it."""
    weights = sum(parameter.numel() for parameter in lora_parameters)
    space = check_space(args, args.max_train_steps // args.checkpointing_steps, 12 * weights, 8 * weights)
    lines = [
        f"{len(loader)} batches a process and epoch, {args.max_train_steps} steps of"
        f" {args.train_batch_size} x {accelerator.num_processes} x {args.gradient_accumulation_steps} images,"
        f" seed {args.seed}; {weights / 1e6:.1f} M weights are trained; {space}"
    ]
    if perceptual_term is None:
        lines.append("no perceptual term: --perceptual_weight is 0")
    else:
        open_timesteps = perceptual_term.open
        lines.append(
            f"perceptual term: {args.perceptual_weight:g} x {args.perceptual_loss}; open at"
            f" {open_timesteps.float().mean():.0%} of the timesteps, up to {int(open_timesteps.nonzero().max())}"
        )
    return "\n".join(lines)


def step_logs(args, totals: list[float], grad_norm: float, lr_scheduler, guard) -> dict[str, float]:
    """Means of one optimizer step: the perceptual loss over the rows that the gate let through."""
    denoising, perceptual, scored, rows = totals
    logs = {"train_loss": (denoising + args.perceptual_weight * perceptual) / rows, "denoising_loss": denoising / rows}
    if args.perceptual_weight:
        logs["gated_rows"] = scored / rows
        if scored:
            logs["perceptual_loss"] = perceptual / scored
    logs |= {"grad_norm": grad_norm, "lr": lr_scheduler.get_last_lr()[0]}
    return logs | ({"skipped_steps": guard.total} if guard.total else {})


@torch.no_grad()
def generate(args, accelerator, pipeline, embed) -> dict[str, list[Image.Image]]:
    """`num_validation_images` of each validation prompt; leaves modes and random state as they were.

    What goes wrong here, too little memory or a decoder that overflows, is said and leaves the result empty: it must
    not end a training.
    """
    unet, was_training = pipeline.unet, pipeline.unet.training
    unet.eval()
    size = {"height": args.resolution, "width": args.resolution}
    images = {}
    try:
        with torch.random.fork_rng(), accelerator.autocast():
            for prompt in (args.validation_prompt or []) if args.num_validation_images else []:
                prompts = {"prompt_embeds": embed([prompt]), "negative_prompt_embeds": embed([""])}
                draws = [torch.Generator().manual_seed(args.seed + n) for n in range(args.num_validation_images)]
                latents = [
                    pipeline(**prompts, num_inference_steps=30, generator=draw, output_type="latent", **size).images
                    for draw in draws
                ]
                images[prompt] = [to_pil(decode(pipeline.vae, latent)[0]) for latent in latents]
    except (torch.OutOfMemoryError, InputError) as error:
        logger.warning(f"no validation images: {error}")
        torch.cuda.empty_cache()
        images = {}
    unet.train(was_training)
    return images


def validate(args, accelerator, pipeline, embed, step: int) -> None:
    """Draw the validation prompts to the trackers and to disk."""
    if images := generate(args, accelerator, pipeline, embed):
        folder = Path(args.output_dir, "validation")
        folder.mkdir(exist_ok=True)
        sheet(images).save(folder / f"step-{step:06d}.png")
        track_images(accelerator, "validation", images, step)


def finish(args, accelerator, pipeline, embed, settings: dict, guard) -> list[str]:
    """Export the adapter, reload and check it, draw before and after, write the card; the names of these files."""
    pipeline.unet.to(torch.float32)
    files = [WEIGHTS, "README.md"]
    save_adapter(pipeline.unet, args.output_dir)
    if args.export_kohya:
        save_kohya(pipeline.unet, Path(args.output_dir, KOHYA_WEIGHTS))
        files.append(KOHYA_WEIGHTS)
    verify_export(args, pipeline)
    after = generate(args, accelerator, pipeline, embed)
    pipeline.unet.disable_lora()
    before = generate(args, accelerator, pipeline, embed) if after else {}
    pipeline.unet.enable_lora()
    if before:
        columns = ["before"] * args.num_validation_images + ["after"] * args.num_validation_images
        sheet({prompt: before[prompt] + after[prompt] for prompt in after}, columns).save(
            Path(args.output_dir, BEFORE_AFTER)
        )
        track_images(accelerator, "test", after, args.max_train_steps)
        files.append(BEFORE_AFTER)
    write_card(args, settings, [BEFORE_AFTER] if before else [])
    if guard.total:
        logger.warning(f"{guard.total} steps were skipped: their loss or gradient was not finite")
    logger.info(f"adapter: {Path(args.output_dir, WEIGHTS)}, reloaded and checked")
    if before:
        print(Path(args.output_dir, BEFORE_AFTER))
    return files


@torch.no_grad()
def verify_export(args, pipeline) -> None:
    """Load the exported file as a user would: every weight must come back, the output be the trained model's."""
    unet = pipeline.unet.eval()
    draw = generator("verify")
    side = args.resolution // pipeline.vae_scale_factor
    latents = torch.randn(1, unet.config.in_channels, side, side, generator=draw).to(unet.device)
    prompt_embeds = torch.randn(1, 77, unet.config.cross_attention_dim, generator=draw).to(unet.device)

    def predict() -> torch.Tensor:
        return unet(latents, torch.tensor(200, device=unet.device), prompt_embeds, return_dict=False)[0]

    def weights() -> dict[str, torch.Tensor]:
        return get_peft_model_state_dict(unet, adapter_name=ADAPTER)

    saved, trained = {name: weight.clone() for name, weight in weights().items()}, predict()
    unet.disable_lora()
    base = predict()
    unet.enable_lora()
    unet.delete_adapters(ADAPTER)
    pipeline.load_lora_weights(args.output_dir, weight_name=WEIGHTS, adapter_name=ADAPTER)
    path = Path(args.output_dir, WEIGHTS)
    if torch.equal(trained, base):
        raise RuntimeError(f"{path} changes nothing: the adapter was not trained")
    found = weights() if pipeline.get_list_adapters().get("unet") == [ADAPTER] else {}
    matched = sum(torch.equal(found[name], weight) for name, weight in saved.items() if name in found)
    if matched != len(saved):
        raise RuntimeError(f"{path} does not load as it was trained: {matched} of {len(saved)} weights came back")
    reloaded = predict()
    if not torch.allclose(reloaded, trained, rtol=1e-3, atol=1e-4 * float(trained.abs().max())):
        difference = float((reloaded - trained).abs().max())
        raise RuntimeError(f"{path} loads but predicts otherwise than the trained model, by up to {difference:.3g}")


def write_card(args, settings: dict, pictures: list[str]) -> None:
    base_model = args.pretrained_model_name_or_path
    prompt = args.validation_prompt[0] if args.validation_prompt else args.caption_template.replace("{class}", "house")
    is_local = Path(base_model).exists()
    shown = {name: value for name, value in settings.items() if name not in ("train_data_dir", "dataset_name")}
    if is_local:
        shown["pretrained_model_name_or_path"] = "a local copy"
    term = "with the perceptual term" if args.perceptual_weight else "by the script"
    tags = "stable-diffusion stable-diffusion-diffusers text-to-image diffusers diffusers-training lora sketch"
    snippet = f"""from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("{"path/to/stable-diffusion-v1-5" if is_local else base_model}")
pipeline.load_lora_weights("{args.hub_model_id or "path/to/this/folder"}")
pipeline({prompt!r}).images[0].save("sketch.png")"""
    dataset = cards.dataset_id(args.dataset_name)
    cards.write_card(
        args.output_dir,
        data=ModelCardData(
            license="creativeml-openrail-m",
            base_model=None if is_local else base_model,
            datasets=dataset and [dataset],
            library_name="diffusers",
            tags=tags.split(),
            inference=True,
        ),
        title=f"Sketch LoRA - {cards.model_name(args.hub_model_id, args.output_dir)}",
        description=f"LoRA weights for Stable Diffusion 1.5, fine-tuned on drawings {term} of sketch-perceptual."
        f" Images of a class were captioned {args.caption_template!r}.",
        snippet=snippet,
        options=shown | {"steps": args.max_train_steps, "learning_rate": args.learning_rate},
        pictures=pictures,
    )


if __name__ == "__main__":
    run(main, parse_args())
