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

from functools import partial

from sketch_perceptual.extras import require

require("train")

import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from diffusers import StableDiffusionPipeline
from torch import nn

from sketch_perceptual.cli import entry
from sketch_perceptual.cli.arguments import Options, Parser, above, at_least
from sketch_perceptual.cli.interruption import ignore_in_worker
from sketch_perceptual.data.loaders import make_loader
from sketch_perceptual.data.tags import with_trigger
from sketch_perceptual.diffusion import Latents, PerceptualTerm, Process, balance, process_of
from sketch_perceptual.diffusion.options import add_term_options, describe_term, make_term
from sketch_perceptual.diffusion.pipelines import (
    add_pipeline_options,
    fingerprints,
    load_noise_scheduler,
    load_pipeline,
)
from sketch_perceptual.diffusion.process import PREDICTION_TYPES
from sketch_perceptual.errors import InputError
from sketch_perceptual.lora.adapter import WEIGHTS, Adapter
from sketch_perceptual.lora.caches import PromptCache, cache_latents, should_cache_latents
from sketch_perceptual.lora.encoding import encode_prompts, warn_of_long_captions
from sketch_perceptual.lora.export import check, export
from sketch_perceptual.lora.held_out import HeldOut
from sketch_perceptual.lora.options import add_lora_options, check_lora_options, optimizer_class
from sketch_perceptual.lora.pictures import (
    FEW_PROMPTS,
    NEW_CAPTIONS,
    Pictures,
    add_picture_options,
    check_picture_options,
    collate,
    load_pictures,
    preview_pictures,
)
from sketch_perceptual.lora.report import (
    describe_training,
    list_files,
    logged,
    run_summary,
    step_logs,
    write_card,
)
from sketch_perceptual.lora.samples import Losses, Sample
from sketch_perceptual.lora.validation import (
    BEFORE_AFTER,
    Validation,
    add_validation_options,
    check_validation_size,
    compare_looks,
    optional,
)
from sketch_perceptual.training import hub
from sketch_perceptual.training.optimizer import make_lr_scheduler, make_optimizer, make_steps
from sketch_perceptual.training.options import add_training_options
from sketch_perceptual.training.run import Run
from sketch_perceptual.training.startup import start
from sketch_perceptual.training.steps import Meter
from sketch_perceptual.training.trackers import start_trackers

logger = get_logger(__name__, log_level="INFO")

TARGETS = {
    "unet": ["to_k", "to_q", "to_v", "to_out.0"],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"],  # with --train_text_encoder
}


def parse_args(argv: list[str] | None = None) -> Options:
    parser = Parser(description=__doc__)
    add = parser.group("model")
    add_pipeline_options(add, required=True)
    add("--prediction_type", choices=PREDICTION_TYPES, help="default: the scheduler's own")
    add(
        "--noise_offset",
        type=at_least(0.0, float),
        default=0.0,
        help="scale of an extra noise that is constant within each channel",
    )
    add(
        "--snr_gamma",
        type=above(0),
        help="Min-SNR weighting of the denoising loss; 5 is usual, 1 leaves fewer broken strokes; default: off",
    )
    add("--enable_xformers_memory_efficient_attention", action="store_true")
    add_lora_options(parser)
    add_picture_options(parser, resolution=512)
    add_term_options(parser)
    add_training_options(parser, output_dir="sd-model-finetuned-lora")
    add_validation_options(parser)
    parser.set_defaults(license="creativeml-openrail-m")
    args = parser.parse_args(argv)
    check_picture_options(parser, args)
    check_lora_options(parser, args)
    return args


def main(args: Options) -> None:
    if preview_pictures(args):
        return
    run = start(args)
    accelerator, seed = run.accelerator, run.seed
    pipeline, process = load_models(args, run)
    latents = Latents(pipeline.vae)
    term = make_term(args, latents, process)
    pictures = load_pictures(args, accelerator, seed)
    warn_of_long_captions(pipeline.tokenizer, pictures.captions(held_out=False))
    run.settle(**pictures.identity(), **fingerprints(pipeline), **describe_term(term))
    hub.create_repo(args, run)
    start_trackers(accelerator, "text2image-fine-tune", args)

    held_out = HeldOut(pictures.held_out, latents, seed, with_images=term is not None)
    prompts = PromptCache(partial(encode_prompts, pipeline.tokenizer, pipeline.text_encoder), pipeline.unet.device)
    if keep_prompts(args, prompts, pictures):
        prompts.encode = pipeline.text_encoder = None
    adapter, groups = make_adapter(args, pipeline, seed)
    parameters = adapter.parameters()
    workers = {"num_workers": args.dataloader_num_workers, "worker_init_fn": ignore_in_worker}
    loader, sampler = make_loader(pictures.train, args.train_batch_size, seed, collate, **workers)
    optimizer = make_optimizer(args, groups, optimizer_class(args.use_8bit_adam))
    unet, prepared_optimizer, loader = accelerator.prepare(pipeline.unet, optimizer, loader)
    trained = [unet]
    if args.train_text_encoder:
        trained.append(accelerator.prepare(pipeline.text_encoder))
        prompts.encode = partial(encode_prompts, pipeline.tokenizer, pipeline.text_encoder, trained=trained[1])
    steps = make_steps(args, run, loader, sampler)
    lr_scheduler = make_lr_scheduler(args, run, optimizer, steps)
    images_per_step = args.train_batch_size * args.gradient_accumulation_steps
    seen = steps.total * images_per_step * accelerator.num_processes
    if should_cache_latents(args.cache_latents, pictures, run, seen):
        cache = {"folder": args.feature_dir, "num_workers": args.dataloader_num_workers}
        cache_latents(accelerator, latents, pictures, **cache, with_images=term is not None)
        if term is None or term.target == "image":
            pipeline.vae.encoder = None
    validation = Validation(args, run, pipeline, prompts)
    meter = Meter(accelerator)
    weights = sum(parameter.numel() for parameter in parameters)
    summary = [run_summary(args, run, steps, term, weights), validation.summary(steps, images_per_step)]
    logger.info("\n".join(filter(None, summary)))
    run.begin(steps, meter, prepared_optimizer, adapter.save, adapter.load, lr_scheduler)

    first_scored = 0 if term is None else term.start_step
    scorer = partial(score, pipeline.unet, process, term, args.snr_gamma, first_scored)
    measure_held_out = partial(held_out.measure, run, pipeline.unet, scorer, prompts, process.num_train_timesteps)
    measure_held_out()
    unet.train()
    with run.training():
        for batch in steps:
            with accelerator.accumulate(*trained):
                rng = steps.rng("noise")
                sample = draw_sample(batch, latents, prompts, process, args.noise_offset, rng)
                losses = score(unet, process, term, args.snr_gamma, steps.done, sample, rng)
                loss, pull = balance(
                    losses.denoising.mean(), losses.perceptual, losses.model_pred, args.perceptual_weight
                )
                accelerator.backward(loss)
                meter.add(batch["name"], logged(losses, pull, process.num_train_timesteps), losses.timesteps)
                if not accelerator.sync_gradients:
                    continue
                totals = run.optimize(parameters, args.max_grad_norm)

            steps.advance()
            run.log(step_logs(totals, lr_scheduler, meter, has_term=term is not None))
            if steps.at_epoch_end:
                measure_held_out()
                validation.end_epoch()
            run.end_step(save=steps.due(args.checkpointing_steps))

    files: list[str] = []
    with run.finishing():
        if accelerator.is_main_process:
            for model in trained:  # takes accelerate's autocast off the pipeline's
                accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            files = finish(args, run, adapter, validation, pictures)
    run.close()
    hub.push(args, run, args.output_dir, files, at_times=(BEFORE_AFTER,))


def make_adapter(args: Options, pipeline: StableDiffusionPipeline, seed: int) -> tuple[Adapter, list[dict]]:
    """Add the LoRAs; return them and the optimizer's groups of parameters."""
    targets = TARGETS if args.train_text_encoder else {"unet": TARGETS["unet"]}
    names = ("lora_alpha", "use_dora", "use_rslora")
    adapter = Adapter(pipeline, targets, seed, r=args.rank, **{name: getattr(args, name) for name in names})
    groups: list[dict] = [{"params": adapter.parameters("unet")}]
    if args.train_text_encoder:
        groups.append({"params": adapter.parameters("text_encoder"), "lr": args.text_encoder_lr})
    return adapter, groups


def draw_sample(
    batch: dict, latents: Latents, prompts: PromptCache, process: Process, noise_offset: float, rng: torch.Generator
) -> Sample:
    """Draw noise and timesteps for a batch with a CPU generator."""
    with torch.no_grad():
        moments = batch["moments"] if "moments" in batch else latents.encode(batch["pixel_values"])
        clean = latents.sample(moments, rng).float()
    noise = torch.randn(clean.shape, generator=rng)
    if noise_offset:
        noise += noise_offset * torch.randn(*clean.shape[:2], 1, 1, generator=rng)
    timesteps = process.draw(len(clean), rng)
    sample = Sample(clean, noise, timesteps, prompts(batch["caption"]), batch.get("pixel_values"), batch.get("mask"))
    return sample.to(clean.device)


def score(
    unet: nn.Module,
    process: Process,
    term: PerceptualTerm | None,
    snr_gamma: float | None,
    step: int,
    sample: Sample,
    rng: torch.Generator,
) -> Losses:
    """Denoising loss and perceptual loss of each row of a sample."""
    noisy = process.add_noise(sample.latents, sample.noise, sample.timesteps)
    embeds = sample.prompt_embeds
    model_pred = unet(noisy.to(embeds.dtype), sample.timesteps, embeds, return_dict=False)[0].float()
    target = process.target(sample.latents, sample.noise, sample.timesteps)
    denoising = sample.mean(F.mse_loss(model_pred, target, reduction="none"))
    if snr_gamma is not None:
        denoising = denoising * process.min_snr_weights(sample.timesteps, snr_gamma)
    perceptual = gated = torch.zeros_like(denoising)
    if term is not None:
        assert sample.images is not None
        perceptual = term(model_pred, noisy, sample.timesteps, sample.images, step, rng, sample.masks)
        gated = term.gate(sample.timesteps, step).to(denoising)
    return Losses(denoising, model_pred, sample.timesteps, perceptual, gated)


def load_models(args: Options, run: Run) -> tuple[StableDiffusionPipeline, Process]:
    """Load the frozen pipeline, on its device and in the precision of the run, and its noise process."""
    source, where = args.pretrained_model_name_or_path, {"revision": args.revision, "cache_dir": args.cache_dir}
    pipeline = load_pipeline(run.accelerator, source, args.resolution, variant=args.variant, **where)
    noise_scheduler = load_noise_scheduler(source, **where)
    if args.prediction_type is not None:
        noise_scheduler.register_to_config(prediction_type=args.prediction_type)
        pipeline.scheduler = type(pipeline.scheduler).from_config(
            pipeline.scheduler.config, prediction_type=args.prediction_type
        )
    check_validation_size(args.validation_size, pipeline)
    if args.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        try:
            pipeline.unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError) as error:
            raise InputError(f"`enable_xformers_memory_efficient_attention`: {error}") from error
    return pipeline, process_of(noise_scheduler)


def keep_prompts(args: Options, prompts: PromptCache, pictures: Pictures) -> bool:
    """Embed the prompts that stay the same; True if these are all, so that the text encoder may be unloaded."""
    captions = {*pictures.captions(), *([""] if args.caption_dropout else [])}
    keeps_all = args.cache_prompts
    if keeps_all is None:
        keeps_all = len(captions) <= FEW_PROMPTS and not args.shuffle_tags and not args.train_text_encoder
        if args.shuffle_tags:
            logger.info(f"--no-cache_prompts, because {NEW_CAPTIONS}")
    if not args.train_text_encoder:
        to_generate = ["", *args.validation_prompt] if args.validation_prompt else []
        prompts.keep({*to_generate, *(captions if keeps_all else [])})
    if keeps_all:
        logger.info(f"{len(captions)} distinct captions are embedded; the text encoder is unloaded")
    return keeps_all


def finish(args: Options, run: Run, adapter: Adapter, validation: Validation, pictures: Pictures) -> list[str]:
    """Export the adapter, reload and check it, draw before and after, write the card; the names of these files."""
    kohya_weights, drawn = export(args, run, adapter), []
    with optional("check of the adapter and pictures"):
        check(args, adapter)
        drawn = validation.before_and_after()
        compare_looks(pictures.train, drawn)
    shown = [BEFORE_AFTER] if drawn else []
    template = with_trigger(args.caption_template, args.trigger_word)
    write_card(
        args,
        run,
        description=describe_training(args, run, pictures.train.caption_origins()),
        prompts=args.validation_prompt or [template.replace("{class}", "house")],
        pictures=shown,
    )
    if run.meter.skipped:
        logger.warning(f"{run.meter.skipped} steps were skipped: their loss or gradient was not finite")
    seen = "the validation prompts without and with the LoRA" if drawn else None
    print(list_files(args.output_dir, kohya_weights, seen))
    return [WEIGHTS, kohya_weights, "README.md", *shown]


if __name__ == "__main__":
    entry.run(main, parse_args())
