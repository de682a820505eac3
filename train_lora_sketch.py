#!/usr/bin/env python
"""Fine-tune Stable Diffusion 1.5 on drawings with LoRA and a perceptual term (Seo 2025, section 4.1).

    python train_lora_sketch.py \\
      --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
      --train_data_dir drawings --train_batch_size 1 --seed 42 \\
      --validation_prompt "a sketch of a fox" --output_dir sketch-lora

Takes every option of diffusers' train_text_to_image_lora.py. The prediction's clean latents are decoded and compared
with the drawing by a network that knows drawings; --perceptual_weight 0 turns that off. The adapter loads with
`pipeline.load_lora_weights(output_dir)`.
"""

import argparse
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from sketch_perceptual.extras import require

require("train")

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.training_utils import cast_training_params
from huggingface_hub import ModelCardData
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from PIL import Image
from tqdm.auto import tqdm

from sketch_perceptual import lora_files
from sketch_perceptual.arguments import above, at_least, fraction, size
from sketch_perceptual.data.batches import make_loader
from sketch_perceptual.data.checks import Contents, check_masks, check_shapes, read_once
from sketch_perceptual.data.image_sets import CaptionedImages
from sketch_perceptual.data.images import INTERPOLATIONS, fit_key, to_pil
from sketch_perceptual.data.options import add_caption_options, check_caption_options, load_captioned
from sketch_perceptual.data.splits import Split, split
from sketch_perceptual.data.tags import with_trigger
from sketch_perceptual.diffusion import (
    PerceptualTerm,
    balance,
    decode,
    denoising_target,
    encode_moments,
    min_snr_weights,
    sample_latents,
)
from sketch_perceptual.diffusion_checks import PREDICTION_TYPES
from sketch_perceptual.errors import InputError, TrainingError, first_line, has_complained
from sketch_perceptual.evaluation.pipelines import (
    add_pipeline_options,
    latent_pixels,
    load_decoder,
    load_noise_scheduler,
    load_pipeline,
)
from sketch_perceptual.evaluation.preview import dry_run, sheet_rows, write_sheet
from sketch_perceptual.figures import image_grid
from sketch_perceptual.losses import LOSSES, all_weights, build_losses, named_networks
from sketch_perceptual.measures.ink import chroma, ink
from sketch_perceptual.networks.backbone import BUNDLED, AttentionVGG16, tuned_resolution
from sketch_perceptual.networks.hub_model import fingerprint
from sketch_perceptual.running import cards, entry, hub
from sketch_perceptual.running.feature_cache import FeatureCache, cache_folder, fill_cache, scan_folder
from sketch_perceptual.running.files import replacing
from sketch_perceptual.running.identity import digest
from sketch_perceptual.running.interruption import ignore_in_worker, interruptible
from sketch_perceptual.running.options import add_feature_dir, add_training_options
from sketch_perceptual.running.processes import on_main
from sketch_perceptual.running.run import Run
from sketch_perceptual.running.startup import check_space, start
from sketch_perceptual.running.steps import Meter, Steps
from sketch_perceptual.running.trackers import start_trackers, track_images
from sketch_perceptual.running.training import make_lr_scheduler, make_optimizer, make_steps
from sketch_perceptual.seeds import generator

logger = get_logger(__name__, log_level="INFO")

TARGET_MODULES = ["to_k", "to_q", "to_v", "to_out.0"]
TEXT_TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "out_proj"]
READ_BUNDLED = {"attention_vgg", "gram", "paper_l1"}  # losses on the backbone that comes with the package
ADAPTER = "default"
WEIGHTS = "pytorch_lora_weights.safetensors"
BEFORE_AFTER = "before_after.png"
FEW_PROMPTS = 1000
FEW_DRAWINGS = 32
DRAWING_STEPS = 30
HELD_OUT_TIMESTEPS = 4  # of each image, in quarters of the schedule
NEW_CAPTIONS = "--shuffle_tags makes new captions all the time"
NEW_ENCODER = "--train_text_encoder changes what captions mean"
RANDOM_CROPS = "images that are not square are cropped at random: add --fit pad or --center_crop"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count, natural, rate = at_least(1), at_least(0), at_least(0.0, float)

    add = parser.add_argument_group("model").add_argument
    add_pipeline_options(add, required=True)
    add("--rank", type=count, default=4, help="rank of the LoRA")
    add("--lora_alpha", type=count, help="scale of the LoRA is alpha / rank; default: the rank")
    add(
        "--use_dora",
        action="store_true",
        help="DoRA: also learn the length of each row; of the two files take diffusers', others compute it otherwise",
    )
    add("--use_rslora", action="store_true", help="scale by alpha / sqrt(rank) instead of alpha / rank")
    add("--train_text_encoder", action="store_true", help="a LoRA for the text encoder too; captions are not cached")
    add("--text_encoder_lr", type=above(0), help="its learning rate; default: --learning_rate")
    add("--prediction_type", choices=PREDICTION_TYPES, help="default: the scheduler's own")
    add("--noise_offset", type=rate, default=0.0, help="scale of an extra noise that is constant within each channel")
    add("--snr_gamma", type=above(0), help="Min-SNR weighting of the denoising loss; 5.0 is recommended")
    add("--enable_xformers_memory_efficient_attention", action="store_true")

    add = add_caption_options(parser)
    add("--caption_dropout", type=fraction, default=0.0, help="share of captions that are left empty, for guidance")
    add("--shuffle_tags", action="store_true", help="put what stands between commas in another order each time")
    add("--keep_tags", type=natural, default=0, help="with --shuffle_tags: the first N stay where they are")
    add("--resolution", type=count, default=512, help="size of the square training images, in pixels")
    add(
        "--fit",
        choices=("crop", "pad", "bucket"),
        default="crop",
        help="make images square by cropping or padding them, or keep their proportions at about as many pixels",
    )
    add("--center_crop", action="store_true", help="crop at the centre; default: at random")
    add("--random_flip", action="store_true", help="mirror half of the images")
    add(
        "--alpha_mask",
        action="store_true",
        help="restrict both losses to opaque pixels, or to the white part of mask/NAME or NAME-masklabel.png",
    )
    add("--image_interpolation_mode", choices=tuple(INTERPOLATIONS), default="lanczos")
    cache = {"action": argparse.BooleanOptionalAction, "default": None}
    add("--cache_latents", **cache, help="encode each image only once; default: unless images are cropped at random")
    add(
        "--cache_prompts",
        **cache,
        help=f"embed each caption once; default: if there are at most {FEW_PROMPTS}, no --shuffle_tags and no"
        " --train_text_encoder",
    )
    add(
        "--validation_share",
        type=fraction,
        default=0.0,
        help="share of the images, with all their copies, that is not trained on: the losses on them are logged after"
        " each epoch",
    )
    add_feature_dir(add, "cache of latents, keyed by image, VAE, resolution, fit and precision")

    add = parser.add_argument_group("perceptual term").add_argument
    add(
        "--perceptual_weight",
        type=rate,
        default=0.3,
        help="how hard the perceptual loss pulls at a prediction, relative to the denoising loss; 0 disables it",
    )
    add(
        "--perceptual_loss",
        nargs="+",
        metavar="LOSS",
        default=["gram"],
        help=f"{', '.join(LOSSES)}, an entry point, or module:Class; several, NAME=WEIGHT, are averaged",
    )
    add(
        "--backbone",
        help="network of the loss: folder, Hub id, .safetensors of VGG-16, imagenet, bundled; default: the loss's own",
    )
    add("--perceptual_layers", nargs="+", metavar="LAYER", help="layers to compare, e.g. relu1_2 relu3_3")
    add(
        "--perceptual_resolution",
        type=count,
        help="downscale larger images to this size for the loss; default: what the backbone was tuned at",
    )
    add(
        "--perceptual_crop",
        type=count,
        help="side of the random square that is decoded and scored, in pixels; default: half of --resolution",
    )
    add(
        "--perceptual_min_snr",
        type=rate,
        default=0.0,
        help="score only samples with at least this signal-to-noise ratio; 1: a third of them",
    )
    add(
        "--perceptual_max_timestep",
        type=natural,
        help="score only timesteps up to this one, instead of --perceptual_min_snr",
    )
    add("--perceptual_start_step", type=natural, default=0, help="first optimizer step with the perceptual loss")
    add("--perceptual_every", type=count, default=1, help="use the perceptual loss only every N steps")
    add(
        "--perceptual_target",
        choices=("image", "reconstruction"),
        default="image",
        help="compare with the image, or with its VAE reconstruction",
    )
    add("--perceptual_decoder", default="vae", help='"vae", or an AutoencoderTiny, e.g. madebyollin/taesd')
    add("--perceptual_dtype", choices=("float32", "bfloat16"), default="float32")

    add_training_options(parser, output_dir="sd-model-finetuned-lora")
    parser.set_defaults(license="creativeml-openrail-m")
    parser.add_argument("--use_8bit_adam", action="store_true", help="use the 8-bit AdamW of bitsandbytes")

    add = parser.add_argument_group("validation").add_argument
    add(
        "--validation_prompt",
        nargs="+",
        metavar="PROMPT",
        help="prompts to generate from during training and at its end",
    )
    add("--num_validation_images", type=natural, default=4, help="number of images per prompt")
    add(
        "--validation_size",
        type=size,
        metavar="WIDTHxHEIGHT",
        help="of these images; default: a square of --resolution",
    )
    add("--validation_epochs", type=count, default=1, help="generate them every N epochs")

    args = parser.parse_args(argv)
    check_caption_options(parser, args)
    if args.cache_prompts and (args.shuffle_tags or args.train_text_encoder):
        parser.error(f"--cache_prompts cannot be used: {NEW_CAPTIONS if args.shuffle_tags else NEW_ENCODER}")
    if args.text_encoder_lr and not args.train_text_encoder:
        parser.error("--text_encoder_lr needs --train_text_encoder")
    if args.train_text_encoder and args.text_encoder_lr is None:
        args.text_encoder_lr = args.learning_rate
    if args.keep_tags and not args.shuffle_tags:
        parser.error("--keep_tags needs --shuffle_tags")
    if args.lora_alpha is None:
        args.lora_alpha = args.rank
    if args.perceptual_crop is None:
        args.perceptual_crop = max(16, args.resolution // 16 * 8)
    return args


def main(args: argparse.Namespace) -> None:
    if dry_run(args, lambda seed: read_drawings(args, open_data(args, seed))):
        return
    if args.perceptual_resolution is None:
        args.perceptual_resolution = default_resolution(args)
    run = start(args)
    accelerator, seed = run.accelerator, run.seed
    pipeline, noise_scheduler = load_models(args, accelerator)
    perceptual_term = build_term(args, pipeline.vae, noise_scheduler)
    data, keys, random_crops, held_out_data = load_data(args, accelerator, pipeline, seed)
    run.settle(**contents(pipeline, perceptual_term, data, keys))
    args.hub_model_id = hub.create_repo(args, accelerator)
    start_trackers(accelerator, "text2image-fine-tune", args)

    embed = PromptEmbedder(args, pipeline, [data, held_out_data] if held_out_data else [data])
    held_out = HeldOut(args, pipeline, embed, noise_scheduler, perceptual_term, held_out_data, seed)
    groups = [{"params": add_lora(args, pipeline.unet, seed)}]
    if args.train_text_encoder:
        groups.append({"params": add_text_lora(args, pipeline.text_encoder), "lr": args.text_encoder_lr})
    lora_parameters = [parameter for group in groups for parameter in group["params"]]
    loader, sampler = make_loader(
        data, args.train_batch_size, seed, collate, args.dataloader_num_workers, worker_init_fn=ignore_in_worker
    )
    optimizer = make_optimizer(args, groups, adam(args))
    unet, prepared_optimizer, loader = accelerator.prepare(pipeline.unet, optimizer, loader)
    if args.train_text_encoder:
        embed.trained = accelerator.prepare(pipeline.text_encoder)
    models = [model for model in (unet, embed.trained) if model is not None]
    steps = make_steps(args, run, loader, sampler)
    lr_scheduler = make_lr_scheduler(args, run, optimizer, steps)
    if choose_caching(args, run, steps, data, random_crops):
        cache_latents(args, accelerator, pipeline.vae, data, keys, perceptual_term)
    meter = Meter(accelerator)
    logger.info(run_summary(args, run, steps, perceptual_term, lora_parameters))
    run.begin(steps, meter, optimizer, partial(save_adapter, pipeline), partial(load_adapter, pipeline), lr_scheduler)

    held_out.measure(run)
    unet.train()
    with run.training():
        for batch in steps:
            with accelerator.accumulate(*models):
                losses, model_pred, timesteps = compute_losses(
                    args, pipeline.vae, unet, embed, noise_scheduler, perceptual_term, batch, steps
                )
                denoising, perceptual = losses["denoising"], losses["perceptual"]
                loss, pull = balance(denoising.mean(), perceptual, model_pred, args.perceptual_weight)
                accelerator.backward(loss)
                losses |= {"train": denoising + pull["factor"] * perceptual} | pull
                total = noise_scheduler.config.num_train_timesteps
                meter.add(batch["name"], losses | by_decile(denoising, timesteps, total), timesteps)
                if not accelerator.sync_gradients:
                    continue
                grad_norm = accelerator.clip_grad_norm_(lora_parameters, args.max_grad_norm)
                meter.close(steps.done, grad_norm)
                totals = meter.read()  # before the step, which a loss that is not finite must not take
                if meter.may_step():
                    prepared_optimizer.step()
                lr_scheduler.step()
                prepared_optimizer.zero_grad()

            steps.advance()
            run.log(step_logs(args, totals, lr_scheduler, meter))
            if steps.at_epoch_end:
                held_out.measure(run)
            if args.validation_prompt and steps.at_epoch_end and steps.epoch % args.validation_epochs == 0:
                with interruptible():  # nobody waits for pictures to stop a run
                    if accelerator.is_main_process:
                        validate(args, accelerator, pipeline, embed, seed, steps.done)
            run.end_step(save=steps.due(args.checkpointing_steps))

    with run.finishing():
        if accelerator.is_main_process:
            for model in models:  # takes accelerate's autocast off the pipeline's
                accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            files = finish(args, run, pipeline, embed, data)
    run.close()
    if accelerator.is_main_process:
        hub.push(args, args.output_dir, files, at_times=(BEFORE_AFTER,))


def compute_losses(
    args, vae, unet, embed, noise_scheduler, perceptual_term, batch: dict, steps: Steps
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Denoising loss, perceptual loss and gate (1: open) of one batch, (B,); then the prediction and timesteps."""
    draw = steps.draw("noise")
    with torch.no_grad():
        moments = batch["moments"] if "moments" in batch else encode_moments(vae, batch["pixel_values"])
        latents = sample_latents(vae, moments, draw).float()
    prompt_embeds = embed(batch["caption"])
    noise = torch.randn(latents.shape, generator=draw)
    if args.noise_offset:
        noise += args.noise_offset * torch.randn(*latents.shape[:2], 1, 1, generator=draw)
    noise = noise.to(latents.device)
    timesteps = torch.randint(noise_scheduler.config.num_train_timesteps, (len(latents),), generator=draw)
    losses, model_pred = score(
        args,
        unet,
        noise_scheduler,
        perceptual_term,
        latents,
        noise,
        timesteps.to(latents.device),
        prompt_embeds,
        batch.get("pixel_values"),
        batch.get("mask"),
        steps.done,
        draw,
    )
    return losses, model_pred, timesteps


def score(
    args,
    unet,
    noise_scheduler,
    perceptual_term,
    latents,
    noise,
    timesteps,
    prompt_embeds,
    images,
    masks,
    step: int,
    draw,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Denoising loss, perceptual loss and gate (1: open) at these timesteps, each (B,), and the prediction.

    `images` are needed where there is a term; `masks`, (B, 1, H, W) or None, say what counts of them.
    """
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    model_pred = unet(noisy_latents.to(prompt_embeds.dtype), timesteps, prompt_embeds, return_dict=False)[0].float()
    target = denoising_target(latents, noise, timesteps, noise_scheduler)
    errors = F.mse_loss(model_pred, target, reduction="none")
    if masks is None:
        denoising = errors.flatten(1).mean(1)
    else:
        counts = F.interpolate(masks, errors.shape[-2:], mode="area").expand_as(errors).flatten(1)
        denoising = (errors.flatten(1) * counts).sum(1) / counts.sum(1).clamp(min=1)
    if args.snr_gamma is not None:
        denoising = denoising * min_snr_weights(timesteps, args.snr_gamma, noise_scheduler)
    perceptual = gated = torch.zeros_like(denoising)
    if perceptual_term is not None:
        perceptual = perceptual_term(model_pred, noisy_latents, timesteps, images, step, draw, masks)
        gated = perceptual_term.gate(timesteps, step).to(denoising)
    return {"denoising": denoising, "perceptual": perceptual, "gated": gated}, model_pred


def by_decile(losses: torch.Tensor, timesteps: torch.Tensor, total: int) -> dict[str, torch.Tensor]:
    """The losses (B,) of the rows in each tenth of the schedule, 0 for others, and which rows these are."""
    rows = F.one_hot(timesteps.to(losses.device) * 10 // total, 10).to(losses)
    names = [f"t{10 * tenth}-{10 * tenth + 10}%" for tenth in range(10)]
    both = zip(names, (losses[:, None] * rows).T, rows.T, strict=True)
    return {key: value for name, loss, row in both for key, value in ((name, loss), (f"{name} rows", row))}


class HeldOut:
    """The losses on images that are not trained on, at timesteps, noise and squares that stay the same.

    They fall while the model learns to draw, and rise when it learns its images by heart.
    """

    def __init__(
        self, args, pipeline, embed, noise_scheduler, perceptual_term, data: CaptionedImages | None, seed: int
    ):
        self.args, self.pipeline, self.embed, self.seed = args, pipeline, embed, seed
        self.noise_scheduler, self.perceptual_term, self.data = noise_scheduler, perceptual_term, data
        if data is not None:  # encoded now, since the encoder may leave
            bar = tqdm(range(len(data)), "Held-out images", leave=False, disable=None)
            self.latents = [self.encode(data.pixels(index)) for index in bar]
            data.with_pixels = perceptual_term is not None

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        vae = self.pipeline.vae
        mean = encode_moments(vae, pixels[None].to(vae.device)).chunk(2, dim=1)[0]
        return mean.float().cpu() * vae.config.scaling_factor

    def measure(self, run: Run) -> None:
        """Log the losses of the model as it is and keep them; the processes share the images."""
        history = run.state.setdefault("held_out", [])
        if self.data is None or (history and history[-1]["step"] == run.steps.done):
            return
        unet, accelerator = self.pipeline.unet, run.accelerator
        was_training = unet.training
        unet.eval()
        with torch.no_grad(), accelerator.autocast():
            mine = range(accelerator.process_index, len(self.data), accelerator.num_processes)
            bar = tqdm(mine, "Held-out losses", leave=False, disable=None if accelerator.is_main_process else True)
            sums = sum((self.sums(unet, self.data, index) for index in bar), torch.zeros(3, device=accelerator.device))
        unet.train(was_training)
        denoising, perceptual, gated = accelerator.reduce(sums, "sum").tolist()
        losses: dict[str, float | None] = {"denoising_loss": denoising / (HELD_OUT_TIMESTEPS * len(self.data))}
        losses["perceptual_loss"] = perceptual / gated if gated else None
        history.append({"step": run.steps.done} | losses)
        run.log({f"held_out_{name}": value for name, value in losses.items() if value is not None})

    def sums(self, unet, data: CaptionedImages, index: int) -> torch.Tensor:
        """Of one image, over HELD_OUT_TIMESTEPS rows: denoising loss, perceptual loss, and how many were scored."""
        draw, term, rows = generator(self.seed, "held out", index), self.perceptual_term, HELD_OUT_TIMESTEPS
        places = (torch.arange(rows) + torch.rand(rows, generator=draw)) / rows
        timesteps = (places * self.noise_scheduler.config.num_train_timesteps).long()
        latents = self.latents[index].expand(rows, -1, -1, -1)
        noise = torch.randn(latents.shape, generator=draw)
        example = data[0, index]
        images, masks = (
            example[name].expand(rows, -1, -1, -1).to(unet.device) if name in example else None
            for name in ("pixel_values", "mask")
        )
        losses, _ = score(
            self.args,
            unet,
            self.noise_scheduler,
            term,
            latents.to(unet.device),
            noise.to(unet.device),
            timesteps.to(unet.device),
            self.embed([example["caption"]] * rows),
            images,
            masks,
            0 if term is None else term.start_step,
            draw,
        )
        return torch.stack([losses[name].sum() for name in ("denoising", "perceptual", "gated")])


def load_models(args, accelerator: Accelerator) -> tuple[StableDiffusionPipeline, DDPMScheduler]:
    """The frozen pipeline on its device, in the precision of the run, and the scheduler that adds the noise."""
    source, place = args.pretrained_model_name_or_path, {"revision": args.revision, "cache_dir": args.cache_dir}
    pipeline = load_pipeline(
        accelerator,
        source,
        args.resolution,
        variant=args.variant,
        **place,
    )
    factor = max(8, pipeline.vae_scale_factor)  # pipelines ask for multiples of 8 also where a latent is smaller
    if args.validation_size and any(side < 1 or side % factor for side in args.validation_size):
        raise InputError(f"`validation_size` must be two multiples of {factor}")
    noise_scheduler = load_noise_scheduler(source, **place)
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
            raise InputError(f"`enable_xformers_memory_efficient_attention`: {error}") from error
    return pipeline, noise_scheduler


def open_data(args, seed: int) -> CaptionedImages:
    data = load_captioned(
        args,
        seed,
        resolution=args.resolution,
        fit=args.fit,
        center_crop=args.center_crop,
        random_flip=args.random_flip,
        alpha_mask=args.alpha_mask,
        caption_dropout=args.caption_dropout,
        shuffle_tags=args.shuffle_tags,
        keep_tags=args.keep_tags,
        interpolation=args.image_interpolation_mode,
    )
    data.scan_folder = scan_folder(args.feature_dir)
    if pixels := latent_pixels(args.pretrained_model_name_or_path):  # SD-1.x on the Hub has 8
        data.multiple = pixels
    return data


def read_drawings(args, data: CaptionedImages) -> tuple[Contents, Split | None]:
    """What can be read of the drawings, keyed with their masks, and which are held out."""
    scanned, sides = read_once(data, args.on_bad_image, copies=bool(args.validation_share)), None
    drawings = sized(data, scanned)
    if args.fit == "bucket":
        check_shapes(drawings)
    if args.alpha_mask:
        masks = check_masks(drawings)
        scanned = scanned._replace(keys=[f"{key}-{mask}" for key, mask in zip(scanned.keys, masks, strict=True)])
    if args.validation_share:
        sides = split([0] * len(drawings), scanned.keys, scanned.copies, validation_share=args.validation_share)
        logger.info(sides.summary)
    if args.figure_data and not has_complained():
        write_sheet(args.figure_data, sheet_rows(drawings))
    return scanned, sides


def sized(data: CaptionedImages, scanned: Contents) -> CaptionedImages:
    """Select the images that can be read and set their sizes."""
    for index, image_size in zip(scanned.positions, scanned.sizes, strict=True):
        data.sizes[data.rows[index]] = image_size
    return data.select(scanned.positions)


def load_data(
    args, accelerator: Accelerator, pipeline: StableDiffusionPipeline, seed: int
) -> tuple[CaptionedImages, list[str], bool, CaptionedImages | None]:
    """The captioned images of an epoch, all read once, a key to the contents of each, whether any is cropped at
    random, and what is held out."""
    data = open_data(args, seed)
    scanned, sides = on_main(accelerator, read_drawings, args, data)
    data, keys, held_out = sized(data, scanned), scanned.keys, None
    some_not_square = any(width != height for width, height in scanned.sizes)
    if sides is not None:
        held_out, data, keys = data.select(sides.validation), data.select(sides.train), [keys[i] for i in sides.train]
        held_out.center_crop, held_out.random_flip = True, False
        held_out.caption_dropout, held_out.shuffle_tags = 0.0, False
    warn_of_long_captions(pipeline.tokenizer, [text for row in data.rows for text in data.captions[row]])
    count = len(data)
    data, indices = data.repeated()
    if len(data) > count:
        logger.info(f"{count} images, {len(data)} in an epoch")
    keys = [keys[index] for index in indices]
    return data, keys, some_not_square and args.fit == "crop" and not args.center_crop, held_out


def contents(pipeline: StableDiffusionPipeline, perceptual_term, data: CaptionedImages, keys: list[str]) -> dict:
    """What the run is made of, for its identity: the drawings with their captions, and all weights."""
    rows = zip(keys, (data.captions[row] for row in data.rows), strict=True)
    weights: dict[str, str | bool] = {
        name: fingerprint(getattr(pipeline, name)) for name in ("unet", "vae", "text_encoder")
    }
    if perceptual_term is not None:
        loss = perceptual_term.loss
        modules = [module for _, module in named_networks(loss)] if isinstance(loss, torch.nn.Module) else []
        backbones = [module for module in modules if isinstance(module, AttentionVGG16)]
        if modules:
            weights["backbone_weights"] = fingerprint(backbones[0] if len(backbones) == 1 else all_weights(loss))
        if backbones:
            weights["backbone_attention"] = backbones[0].attention
            weights["backbone_pool_after_attention"] = backbones[0].pool_after_attention
            weights["calibration"] = digest(backbone.calibration for backbone in backbones)
    return {"data": f"{len(data)} images {digest(rows)}"} | weights


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

    trained: torch.nn.Module | None = None  # the text encoder as accelerate prepared it, for what wants gradients

    def __init__(self, args, pipeline: StableDiffusionPipeline, data: list[CaptionedImages]):
        self.tokenizer, self.text_encoder = pipeline.tokenizer, pipeline.text_encoder
        self.device = pipeline.unet.device
        captions = {caption for part in data for row in part.rows for caption in part.captions[row]}
        if args.caption_dropout:
            captions.add("")
        caches_all = args.cache_prompts
        if caches_all is None:
            caches_all = len(captions) <= FEW_PROMPTS and not args.shuffle_tags and not args.train_text_encoder
            if args.shuffle_tags:
                logger.info(f"--no-cache_prompts, because {NEW_CAPTIONS}")
        to_draw = ["", *args.validation_prompt] if args.validation_prompt and not args.train_text_encoder else []
        wanted = {*to_draw, *(captions if caches_all else [])}
        self.kept: dict[str, torch.Tensor] = {}
        bar = tqdm(sorted(wanted), "Captions", leave=False, disable=None)
        self.kept = {caption: self([caption]).cpu() for caption in bar}
        if caches_all:
            self.text_encoder = pipeline.text_encoder = None
            logger.info(f"{len(captions)} distinct captions are embedded; the text encoder is not needed any more")

    def __call__(self, captions: list[str]) -> torch.Tensor:
        if all(caption in self.kept for caption in captions):
            return torch.cat([self.kept[caption] for caption in captions]).to(self.device)
        ids = tokenize(self.tokenizer, captions).to(self.device)
        if self.trained is not None and torch.is_grad_enabled():
            return self.trained(ids)[0]
        with torch.no_grad():
            return self.text_encoder(ids)[0]


def choose_caching(args, run: Run, steps: Steps, data: CaptionedImages, random_crops: bool) -> bool:
    """Whether each image is encoded once, as --cache_latents says; a resumed run does as it did before."""
    if args.cache_latents is None:
        batch = args.train_batch_size * args.gradient_accumulation_steps * run.accelerator.num_processes
        pays = steps.total * batch >= len(data) * (2 if args.random_flip else 1)
        if random_crops:
            logger.info(f"--no-cache_latents, because {RANDOM_CROPS}")
        return run.state.setdefault("cache_latents", pays and not random_crops)
    if args.cache_latents and random_crops:
        raise InputError(f"`cache_latents` cannot be used: {RANDOM_CROPS}")
    return args.cache_latents


def cache_latents(
    args, accelerator: Accelerator, vae, data: CaptionedImages, keys: list[str], perceptual_term
) -> None:
    """Have `data` give the moments of its latents, and its images only where they are scored.

    Images are encoded one by one, so that the latents do not depend on what else was missing.
    """
    settings = [args.resolution, fit_key(args.fit), args.image_interpolation_mode, args.background]
    kind = "-".join(map(str, ["latents", fingerprint(vae), *settings, accelerator.mixed_precision]))
    cache = FeatureCache(Path(args.feature_dir or cache_folder(), kind))
    shapes = [data.shape(index) for index in range(len(data))]
    flips = (False, True) if args.random_flip else (False,)
    in_shapes = sorted(range(len(data)), key=shapes.__getitem__)  # a file of the cache has one
    places = [(index, flipped) for index in in_shapes for flipped in flips]
    fill_cache(
        accelerator,
        cache,
        [latents_key(keys[index], flipped) for index, flipped in places],
        partial(read_place, data, places),
        lambda images: encode_moments(vae, images).flatten(1),
        lambda position: data.name(places[position][0]),
        batch_size=1,
        num_workers=args.dataloader_num_workers,
        what="latents",
    )
    data.moments = partial(read_moments, cache, shapes, keys, 2 * vae.config.latent_channels)
    data.with_pixels = perceptual_term is not None
    if perceptual_term is None or perceptual_term.target == "image":
        vae.encoder = None


def latents_key(key: str, flipped: bool) -> str:
    return f"{key}-flipped" if flipped else key


def read_place(data: CaptionedImages, places: list[tuple[int, bool]], position: int) -> torch.Tensor:
    return data.pixels(*places[position])


def read_moments(
    cache: FeatureCache, shapes: list[tuple[int, int]], keys: list[str], channels: int, index: int, flipped: bool
) -> torch.Tensor:
    width, height = shapes[index]
    row = cache.row(latents_key(keys[index], flipped))
    pixels = round((width * height * channels / len(row)) ** 0.5)  # of a latent's side
    return row.view(channels, height // pixels, width // pixels)


def default_resolution(args) -> int | None:
    """What the backbone of the loss was tuned at; None leaves a loss of somebody else's as it is."""
    names = loss_names(args)
    if args.perceptual_weight == 0 or not names <= set(LOSSES):
        return None
    return tuned_resolution(args.backbone or (BUNDLED if names & READ_BUNDLED else "imagenet"))


def loss_names(args) -> set[str]:
    return {name.split("=")[0] for name in args.perceptual_loss}


def build_term(args, vae, noise_scheduler) -> PerceptualTerm | None:
    """The perceptual term; None at weight 0, for which nothing is loaded."""
    if args.perceptual_weight == 0:
        return None
    dtype = getattr(torch, args.perceptual_dtype)
    loss = build_losses(
        args.perceptual_loss,
        size=min(args.perceptual_crop, args.resolution),
        dtype=dtype,
        backbone=args.backbone,
        layers=args.perceptual_layers,
        resolution=args.perceptual_resolution,
    )
    decoder = None
    if args.perceptual_decoder != "vae":
        decoder = load_decoder(args.perceptual_decoder, args.cache_dir).to(vae.device)
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
        raise InputError("`use_8bit_adam` needs bitsandbytes: pip install bitsandbytes") from error
    return AdamW8bit


def lora_config(args, target_modules: list[str]) -> LoraConfig:
    return LoraConfig(
        r=args.rank,
        lora_alpha=args.lora_alpha,
        init_lora_weights="gaussian",
        target_modules=target_modules,
        use_dora=args.use_dora,
        use_rslora=args.use_rslora,
    )


def add_lora(args, unet, seed: int) -> list[torch.nn.Parameter]:
    """Add the adapter and return its parameters, in float32 whatever the precision of the run."""
    set_seed(seed)  # what was loaded before must not change how the adapter starts
    unet.add_adapter(lora_config(args, TARGET_MODULES), adapter_name=ADAPTER)
    cast_training_params(unet, dtype=torch.float32)
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def add_text_lora(args, text_encoder) -> list[torch.nn.Parameter]:
    """The same for the text encoder; without transformers' own method, which asks for a PEFT that is not out yet."""
    inject_adapter_in_model(lora_config(args, TEXT_TARGET_MODULES), text_encoder, ADAPTER)
    cast_training_params(text_encoder, dtype=torch.float32)
    return [parameter for parameter in text_encoder.parameters() if parameter.requires_grad]


def adapted(pipeline) -> dict[str, Any]:
    """The models of a pipeline that have an adapter, by their names in it."""
    models = {name: getattr(pipeline, name) for name in ("unet", "text_encoder")}
    return {name: model for name, model in models.items() if ADAPTER in getattr(model, "peft_config", {})}


def adapter_layers(pipeline) -> dict[str, lora_files.Layer]:
    """What was trained, by module, with the alpha that it was trained with."""
    layers = {}
    for name, model in adapted(pipeline).items():
        weights = get_peft_model_state_dict(model, adapter_name=ADAPTER)
        config = {f"{name}.{key}": getattr(model.peft_config[ADAPTER], key) for key in ("lora_alpha", "use_rslora")}
        own = lora_files.to_layers({f"{name}.{key}": weight for key, weight in weights.items()})
        layers |= lora_files.with_alphas(own, config)
    return layers


def save_adapter(pipeline, folder: str | Path) -> None:
    """Write the adapter as it is trained, for a resume that goes on bit for bit."""
    lora_files.write_diffusers(Path(folder, WEIGHTS), adapter_layers(pipeline))


def load_adapter(pipeline, folder: str | Path) -> None:
    """Read what `save_adapter` wrote into the adapter that the pipeline has."""
    layers = lora_files.read(Path(folder, WEIGHTS)).layers
    for name, model in adapted(pipeline).items():
        weights = {}
        for key in get_peft_model_state_dict(model, adapter_name=ADAPTER):
            module, part = lora_files.locate(f"{name}.{key}")
            weights[key] = getattr(layers[module], part)
        set_peft_model_state_dict(model, weights, adapter_name=ADAPTER)
        cast_training_params(model, dtype=torch.float32)


def export(args, run: Run, pipeline) -> list[str]:
    """Write the adapter for diffusers, its alpha folded into the weights, and for other programs; the files' names."""
    base_model = args.pretrained_model_name_or_path
    layers, kohya_weights = adapter_layers(pipeline), kohya_name(args)
    metadata = lora_files.run_metadata(
        Path(kohya_weights).stem,
        Path(base_model).resolve().name if Path(base_model).exists() else base_model,
        run.record() | {"steps": run.steps.total, "epochs": run.steps.epochs, "license": args.license},
        is_v2=pipeline.unet.config.cross_attention_dim == 1024,
        is_v=pipeline.scheduler.config.prediction_type == "v_prediction",
    )
    with replacing(args.output_dir) as folder:
        lora_files.write_diffusers(folder / WEIGHTS, {name: layer.folded() for name, layer in layers.items()})
        lora_files.write_kohya(folder / kohya_weights, layers, metadata)
    return [WEIGHTS, kohya_weights]


def kohya_name(args) -> str:
    """A file that is called as the run is, which is what the other programs show."""
    name = cards.model_name(args.hub_model_id, args.output_dir).split("/")[-1]
    return f"{name}_kohya.safetensors" if f"{name}.safetensors".endswith(WEIGHTS) else f"{name}.safetensors"


def run_summary(args, run: Run, steps: Steps, perceptual_term, lora_parameters) -> str:
    """What will be trained and written; InputError if the disk cannot hold it."""
    weights = sum(parameter.numel() for parameter in lora_parameters)
    saves = steps.total // args.checkpointing_steps
    space = check_space(args.output_dir, saves, args.checkpoints_total_limit, 12 * weights, 8 * weights)
    lines = [
        f"{steps.total} steps of {args.train_batch_size} x {run.accelerator.num_processes} x"
        f" {args.gradient_accumulation_steps} images, {steps.epochs} epochs, seed {run.seed}; {weights / 1e6:.1f} M"
        f" weights are trained; {space}"
    ]
    if perceptual_term is None:
        lines.append("no perceptual term: --perceptual_weight is 0")
    else:
        open_timesteps = perceptual_term.open
        lines.append(
            f"perceptual term: {args.perceptual_weight:g} x {' + '.join(args.perceptual_loss)}; open at"
            f" {open_timesteps.float().mean():.0%} of the timesteps, up to {int(open_timesteps.nonzero().max())}"
        )
    if pictures := picture_summary(args, run, steps):
        lines.append(pictures)
    return "\n".join(lines)


def picture_summary(args, run: Run, steps: Steps) -> str | None:
    """How many pictures the run will draw, and their share of its passes through the U-Net; None without pictures."""
    prompts = len(args.validation_prompt or []) * args.num_validation_images
    if not prompts:
        return None
    during, at_end = prompts * (steps.epochs // args.validation_epochs), 2 * prompts
    drawing = (during + at_end) * DRAWING_STEPS * 2  # with guidance
    training = 3 * steps.total * args.train_batch_size * args.gradient_accumulation_steps  # backward counts twice
    advice = "; a larger --validation_epochs makes it less" if during and drawing > training else ""
    return (
        f"pictures: {during} during the run and {at_end} at its end, about {drawing / (drawing + training):.0%} of the"
        f" work{advice}"
    )


def step_logs(args, totals: dict[str, float], lr_scheduler, meter: Meter) -> dict[str, float]:
    """Means of one optimizer step: the perceptual loss over the rows that the gate let through."""
    logs = {"grad_norm": totals["grad_norm"]} | dict(
        zip(("lr", "text_encoder_lr"), lr_scheduler.get_last_lr(), strict=False)
    )
    if rows := totals["rows"]:
        logs |= {"train_loss": totals["train"] / rows, "denoising_loss": totals["denoising"] / rows}
        if args.perceptual_weight:
            logs["gated_rows"] = totals["gated"] / rows
        if gated := totals["gated"]:
            logs["perceptual_loss"] = totals["perceptual"] / gated
            logs |= {name: totals[name] / gated for name in ("gradient_ratio", "gradient_cosine")}
        tenths = [name for name in totals if totals.get(f"{name} rows")]
        logs |= {f"denoising_loss/{name}": totals[name] / totals[f"{name} rows"] for name in tenths}
    return logs | ({"skipped_steps": meter.skipped} if meter.skipped else {})


@torch.no_grad()
def generate(args, accelerator: Accelerator, pipeline, embed, seed: int) -> dict[str, list[Image.Image]]:
    """`num_validation_images` of each validation prompt; leaves modes and random state as they were."""
    unet, was_training = pipeline.unet, pipeline.unet.training
    unet.eval()
    wanted = (args.validation_prompt or []) if args.num_validation_images else []
    width, height = args.validation_size or (args.resolution, args.resolution)
    size = {"height": height, "width": width}
    images = {}
    try:
        bar = tqdm(desc="Pictures", total=len(wanted) * args.num_validation_images, leave=False, disable=None)
        with torch.random.fork_rng(), accelerator.autocast(), bar:
            for prompt in wanted:
                prompts = {"prompt_embeds": embed([prompt]), "negative_prompt_embeds": embed([""])}
                draws = [torch.Generator().manual_seed(seed + n) for n in range(args.num_validation_images)]
                images[prompt] = []
                for draw in draws:
                    latents = pipeline(
                        **prompts, num_inference_steps=DRAWING_STEPS, generator=draw, output_type="latent", **size
                    ).images
                    images[prompt].append(to_pil(decode(pipeline.vae, latents)[0]))
                    bar.update()
    finally:
        unet.train(was_training)
    return images


@contextmanager
def optional(what: str):
    """What goes wrong here, too little memory, a decoder that overflows, a full disk, must not end a training.

    Nor must versions that do not fit: transformers 5.24 loads adapters of text encoders with PEFT 0.19 and newer only.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError, ImportError, InputError) as error:
        logger.warning(f"no {what}: {first_line(error)}")
        torch.cuda.empty_cache()


def validate(args, accelerator: Accelerator, pipeline, embed, seed: int, step: int) -> None:
    """Draw the validation prompts to the trackers and to disk."""
    with optional("validation images"):
        if images := generate(args, accelerator, pipeline, embed, seed):
            with replacing(Path(args.output_dir, "validation")) as folder:
                image_grid(images).save(folder / f"step-{step:06d}.png")
            track_images(accelerator, "validation", images, step)


def finish(args, run: Run, pipeline, embed, data: CaptionedImages) -> list[str]:
    """Export the adapter, reload and check it, draw before and after, write the card; the names of these files."""
    for model in adapted(pipeline).values():
        model.to(torch.float32)
    files = [*export(args, run, pipeline), "README.md"]
    is_drawn = False
    with optional("check of the adapter and pictures"):
        verify_export(args, pipeline)
        logger.info(f"adapter: {Path(args.output_dir, WEIGHTS)}, reloaded and checked")
        after = draw_before_after(args, run, pipeline, embed)
        is_drawn = bool(after)
        compare_tones(data, after)
    if is_drawn:
        files.append(BEFORE_AFTER)
    write_card(args, run, data.caption_origins(), [BEFORE_AFTER] if is_drawn else [])
    if run.meter.skipped:
        logger.warning(f"{run.meter.skipped} steps were skipped: their loss or gradient was not finite")
    print(cards.listing(args.output_dir, uses(args, is_drawn)))
    return files


def uses(args, is_drawn: bool) -> dict[str, str]:
    """The files that a run leaves, and what each is for."""
    kohya_weights = kohya_name(args)
    pictures = {BEFORE_AFTER: "the validation prompts without and with the LoRA"} if is_drawn else {}
    return pictures | {
        WEIGHTS: f"for diffusers: pipeline.load_lora_weights({str(args.output_dir)!r}, weight_name={WEIGHTS!r})",
        kohya_weights: "for ComfyUI (models/loras), AUTOMATIC1111 and Forge (models/Lora):"
        f" <lora:{Path(kohya_weights).stem}:1> in a prompt",
    }


def compare_tones(data: CaptionedImages, pictures: list[Image.Image]) -> None:
    """Log ink and colour of the LoRA's pictures beside those of its drawings; warn where they differ widely."""
    if not pictures:
        return
    drawings = [data.image(index) for index in range(0, len(data), -(-len(data) // FEW_DRAWINGS))]
    (drawn_ink, ink_now), (drawn_chroma, chroma_now) = (
        [sum(map(tone, images)) / len(images) for images in (drawings, pictures)] for tone in (ink, chroma)
    )
    logger.info(
        f"ink: {drawn_ink:.1%} of your drawings, {ink_now:.1%} of the LoRA's pictures; colour: {drawn_chroma:.3f},"
        f" {chroma_now:.3f}"
    )
    if ink_now < drawn_ink / 3:
        logger.warning("the LoRA's pictures are nearly blank: train longer, or raise `learning_rate`")
    elif ink_now > 3 * drawn_ink:
        logger.warning("the LoRA's pictures are far darker than the drawings: train longer, or lower `learning_rate`")
    if chroma_now > drawn_chroma + 0.1:
        logger.warning("the LoRA's pictures have more colour than the drawings: train longer, or raise `noise_offset`")


def draw_before_after(args, run: Run, pipeline, embed) -> list[Image.Image]:
    """Write the validation prompts as the pipeline draws them without and with the adapter; returns the latter."""
    after = generate(args, run.accelerator, pipeline, embed, run.seed)
    pipeline.disable_lora()
    before = generate(args, run.accelerator, pipeline, embed, run.seed)
    pipeline.enable_lora()
    if after:
        columns = ["before"] * args.num_validation_images + ["after"] * args.num_validation_images
        rows = {prompt: before[prompt] + after[prompt] for prompt in after}
        with replacing(args.output_dir) as folder:
            image_grid(rows, columns).save(folder / BEFORE_AFTER)
        track_images(run.accelerator, "test", after, run.steps.done)
    return [picture for row in after.values() for picture in row]


@torch.no_grad()
def verify_export(args, pipeline) -> None:
    """Load the exported file as a user would: every module must come back and predict what it was trained to."""
    models = adapted(pipeline)
    unet, text_encoder = pipeline.unet.eval(), models.get("text_encoder")
    draw = generator("verify")
    side = args.resolution // pipeline.vae_scale_factor
    latents = torch.randn(1, unet.config.in_channels, side, side, generator=draw).to(unet.device)
    random_embeds = torch.randn(1, 77, unet.config.cross_attention_dim, generator=draw).to(unet.device)

    def predict() -> list[torch.Tensor]:
        embeds = random_embeds
        if text_encoder is not None:
            embeds = text_encoder(tokenize(pipeline.tokenizer, ["a sketch"]).to(unet.device))[0]
        return [embeds, unet(latents, torch.tensor(200, device=unet.device), embeds, return_dict=False)[0]]

    def modules() -> int:
        layers = [module for model in models.values() for module in model.modules() if isinstance(module, LoraLayer)]
        return sum(ADAPTER in layer.lora_A for layer in layers)

    count, trained = modules(), predict()
    if not all(tensor.isfinite().all() for tensor in trained):
        raise TrainingError("the trained model predicts values that are not finite: lower `learning_rate`")
    pipeline.disable_lora()
    base = predict()
    pipeline.enable_lora()
    pipeline.delete_adapters(ADAPTER)
    pipeline.load_lora_weights(args.output_dir, weight_name=WEIGHTS, adapter_name=ADAPTER)
    path = Path(args.output_dir, WEIGHTS)
    if all(map(torch.equal, trained, base)):
        raise TrainingError(
            f"{path} changes nothing: the learning rate or the weights of the losses are too small to train it"
        )
    if modules() != count:
        raise TrainingError(f"{path} does not load as it was trained: {modules()} of {count} modules came back")
    for expected, reloaded in zip(trained, predict(), strict=True):
        if not torch.allclose(reloaded, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
            difference = float((reloaded - expected).abs().max())
            raise TrainingError(
                f"{path} loads but predicts otherwise than the trained model, by up to {difference:.3g}"
            )


def held_out_words(history: list[dict]) -> str:
    """What the losses on held-out images did, for the card."""
    if not history:
        return ""
    first, last = history[0], history[-1]
    lowest = min(history, key=lambda record: record["denoising_loss"])
    words = [
        f"{name.replace('_', ' ')} {first[name]:.4g} at first, {last[name]:.4g} at last"
        for name in ("denoising_loss", "perceptual_loss")
        if None not in (first[name], last[name])
    ]
    return (
        f" On held-out images: {'; '.join(words)}. The denoising loss was lowest after step {lowest['step']},"
        f" {lowest['denoising_loss']:.4g}."
    )


def write_card(args, run: Run, caption_origins: str, pictures: list[str]) -> None:
    base_model, dataset = cards.hub_id(args.pretrained_model_name_or_path), cards.hub_id(args.dataset_name)
    template = with_trigger(args.caption_template, args.trigger_word)
    prompts = args.validation_prompt or [template.replace("{class}", "house")]
    term = "with the perceptual term" if args.perceptual_weight else "by the script"
    trigger = f" Every caption has the trigger word {args.trigger_word!r}." if args.trigger_word else ""
    readers = "LyCORIS; others compute DoRA otherwise" if args.use_dora else "AUTOMATIC1111, Forge and ComfyUI"
    tags = "stable-diffusion stable-diffusion-diffusers text-to-image diffusers diffusers-training lora sketch"
    snippet = f"""from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("{base_model or "path/to/stable-diffusion-v1-5"}")
pipeline.load_lora_weights("{args.hub_model_id or "path/to/this/folder"}", weight_name="{WEIGHTS}")
pipeline({prompts[0]!r}).images[0].save("sketch.png")"""
    cards.write_card(
        args.output_dir,
        data=ModelCardData(
            license=args.license,
            base_model=base_model,
            datasets=dataset and [dataset],
            library_name="diffusers",
            tags=tags.split(),
            inference=True,
            instance_prompt=args.trigger_word,
            widget=[{"text": prompt} for prompt in prompts],
        ),
        title=f"Sketch LoRA - {cards.model_name(args.hub_model_id, args.output_dir)}",
        description=f"LoRA weights for Stable Diffusion 1.5, fine-tuned on drawings {term} of sketch-perceptual."
        f" `{WEIGHTS}` is for diffusers, `{kohya_name(args)}` for {readers}."
        f" Captions come from {caption_origins}.{trigger}{held_out_words(run.state['held_out'])}",
        install="`pip install diffusers transformers accelerate peft`",
        snippet=snippet,
        options={"steps": run.steps.total} | backbone_of(args) | run.record(),
        pictures=pictures,
    )


def backbone_of(args) -> dict[str, str]:
    """Which network scored, as a card may name it; its hash is among what the run was made of."""
    names = loss_names(args)
    if args.perceptual_weight == 0 or names == {"pixel"} or not (args.backbone or names <= set(LOSSES)):
        return {}
    own = "bundled" if names & READ_BUNDLED else "imagenet"
    return {"backbone": cards.hub_id(args.backbone) or (Path(args.backbone).name if args.backbone else own)}


if __name__ == "__main__":
    entry.run(main, parse_args())
