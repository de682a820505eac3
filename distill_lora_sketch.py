#!/usr/bin/env python
"""Distil a LoRA of Stable Diffusion 1.5 into one that draws in four steps without guidance.

    python distill_lora_sketch.py \\
      --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
      --teacher_lora sketch-lora --prompts prompts.txt \\
      --validation_prompt "a sketch of a fox" --output_dir sketch-lora-4-steps --seed 42

The LoRA, the teacher, draws pictures for the prompts. The student starts as the teacher and learns to predict each
picture from the noise that it was drawn from (as rectified flows do, Liu et al. 2023), with a pseudo-Huber loss of
the latents and the perceptual term, at the timesteps at which DDIM draws.
"""

from functools import partial
from pathlib import Path

from sketch_perceptual.extras import require

require("train")

import torch
from accelerate.logging import get_logger
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from sketch_perceptual.cli import entry
from sketch_perceptual.cli.arguments import Options, Parser, at_least
from sketch_perceptual.cli.interruption import ignore_in_worker
from sketch_perceptual.data.captions import CAPTION_TEMPLATE
from sketch_perceptual.data.loaders import make_loader
from sketch_perceptual.data.preview import sheet_rows, write_sheet
from sketch_perceptual.diffusion import Latents, PerceptualTerm, Process, balance, process_of
from sketch_perceptual.diffusion.options import add_term_options, describe_term, make_term
from sketch_perceptual.diffusion.pipelines import (
    add_pipeline_options,
    fingerprints,
    load_noise_scheduler,
    load_pipeline,
)
from sketch_perceptual.errors import InputError
from sketch_perceptual.lora import files as lora_files
from sketch_perceptual.lora.adapter import WEIGHTS, Adapter
from sketch_perceptual.lora.caches import PromptCache
from sketch_perceptual.lora.encoding import encode_prompts, warn_of_long_captions
from sketch_perceptual.lora.export import check, export
from sketch_perceptual.lora.pairs import Pairs, draw_pairs, load_prompts
from sketch_perceptual.lora.pictures import collate
from sketch_perceptual.lora.report import describe_files, list_files, logged, run_summary, step_logs, write_card
from sketch_perceptual.lora.samples import Losses, Sample
from sketch_perceptual.lora.validation import (
    BEFORE_AFTER,
    Validation,
    add_validation_options,
    check_validation_size,
    optional,
)
from sketch_perceptual.training import hub
from sketch_perceptual.training.identity import digest
from sketch_perceptual.training.optimizer import make_lr_scheduler, make_optimizer, make_steps
from sketch_perceptual.training.options import add_training_options
from sketch_perceptual.training.run import Run
from sketch_perceptual.training.startup import dry_run, start
from sketch_perceptual.training.steps import Meter
from sketch_perceptual.training.trackers import start_trackers

logger = get_logger(__name__, log_level="INFO")

DDIM = {"timestep_spacing": "trailing", "clip_sample": False}  # settings of the scheduler that the student needs
HUBER = 0.03  # error of a latent below which the loss is quadratic


def parse_args(argv: list[str] | None = None) -> Options:
    parser, count = Parser(description=__doc__), at_least(1)
    add = parser.group("teacher")
    add_pipeline_options(add, required=True)
    add(
        "--teacher_lora",
        shared=False,
        required=True,
        help="the LoRA to distil: a file of any trainer, or a folder with one",
    )
    add(
        "--prompts",
        shared=False,
        required=True,
        help="a text file with one prompt per line, or a folder of images whose captions are the prompts",
    )
    add("--caption_template", default=CAPTION_TEMPLATE, help="prompt for a folder of a class; {class} is its name")
    add("--trigger_word", metavar="WORD", help="prepend WORD and a comma to each prompt that does not contain it")
    add("--num_pairs", type=count, default=320, help="number of pictures that the teacher draws")
    add("--pairs_dir", shared=False, help="folder of these pictures, which are kept; default: pairs in --output_dir")
    add("--teacher_num_inference_steps", type=count, default=25, help="steps of the teacher, of DPM-Solver++")
    add("--teacher_guidance_scale", type=at_least(0.0, float), default=7.5, help="guidance of the teacher")
    add("--generation_batch_size", shared=False, type=count, default=4, help="pictures drawn at once")
    add("--resolution", type=count, default=512, help="size of the pictures, in pixels")
    add("--cache_dir", shared=False, help="where downloads are cached")
    add = parser.group("student")
    add("--num_inference_steps", type=count, default=4, help="steps that the student draws in, without guidance")
    add_term_options(parser)
    add_training_options(parser, output_dir="sd-model-distilled-lora")
    add_validation_options(parser)
    parser.set_defaults(license="creativeml-openrail-m", perceptual_weight=4.0)
    parser.set_defaults(learning_rate=1e-3, lr_scheduler="cosine", lr_warmup_steps=0)
    parser.set_defaults(train_batch_size=8, num_train_epochs=10)
    return parser.parse_args(argv)


def main(args: Options) -> None:
    if dry_run(args, lambda _: read_inputs(args)):
        return
    run = start(args)
    accelerator, seed = run.accelerator, run.seed
    texts, layers = read_inputs(args)
    pipeline, process = load_models(args, run)
    adapter = Adapter.of_layers(pipeline, layers)
    latents = Latents(pipeline.vae)
    term = make_term(args, latents, process)
    warn_of_long_captions(pipeline.tokenizer, texts)
    weights = fingerprints(pipeline)
    run.settle(prompts=digest(texts), **weights, **describe_term(term))
    hub.create_repo(args, run)
    start_trackers(accelerator, "distill-lora", args)

    prompts = PromptCache(partial(encode_prompts, pipeline.tokenizer, pipeline.text_encoder), pipeline.unet.device)
    pairs, before = draw_with_teacher(args, run, pipeline, prompts, texts, weights)
    pairs.with_pixels = term is not None
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **DDIM)
    pipeline.scheduler.set_timesteps(args.num_inference_steps)
    timesteps = pipeline.scheduler.timesteps.clone()
    prompts.keep({"", *texts, *(args.validation_prompt or [])})
    if "text_encoder" not in adapter.targets:
        prompts.encode = pipeline.text_encoder = None
    parameters = adapter.parameters("unet")
    workers = {"num_workers": args.dataloader_num_workers, "worker_init_fn": ignore_in_worker}
    loader, sampler = make_loader(pairs, args.train_batch_size, seed, collate, **workers)
    optimizer = make_optimizer(args, parameters)
    unet, prepared_optimizer, loader = accelerator.prepare(pipeline.unet, optimizer, loader)
    steps = make_steps(args, run, loader, sampler)
    lr_scheduler = make_lr_scheduler(args, run, optimizer, steps)
    sampling = {"num_inference_steps": args.num_inference_steps, "guidance_scale": 1.0}
    validation = Validation(args, run, pipeline, prompts, **sampling)
    meter = Meter(accelerator)
    logger.info(run_summary(args, run, steps, term, sum(parameter.numel() for parameter in parameters)))
    run.begin(steps, meter, prepared_optimizer, adapter.save, adapter.load, lr_scheduler)

    unet.train()
    with run.training():
        for batch in steps:
            with accelerator.accumulate(unet):
                rng = steps.rng("noise")
                sample = draw_sample(batch, timesteps, prompts, rng)
                losses = score(unet, process, term, timesteps[0], steps.done, sample, rng)
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
                validation.end_epoch()
            run.end_step(save=steps.due(args.checkpointing_steps))

    files: list[str] = []
    with run.finishing():
        if accelerator.is_main_process:
            accelerator.unwrap_model(unet, keep_fp32_wrapper=False)  # takes accelerate's autocast off the pipeline's
            files = finish(args, run, adapter, validation, before)
    run.close()
    hub.push(args, run, args.output_dir, files, at_times=(BEFORE_AFTER,))


def read_inputs(args: Options) -> tuple[list[str], dict[str, lora_files.Layer]]:
    """Return the prompts and the teacher's layers, with their alphas in the weights, and describe them."""
    texts = load_prompts(args.prompts, args.caption_template, args.trigger_word)
    layers = lora_files.folded(lora_files.read(args.teacher_lora).layers)
    if not any(module.startswith("unet.") for module in layers):
        raise InputError(f"`teacher_lora` {args.teacher_lora} has no layers of the U-Net to train")
    passes = args.num_pairs * args.teacher_num_inference_steps * (2 if args.teacher_guidance_scale > 1 else 1)
    ranks = sorted({layer.rank for layer in layers.values()})
    logger.info(
        f"teacher: {len(layers)} layers of rank {', '.join(map(str, ranks))}; {args.num_pairs} pictures of"
        f" {len(texts)} prompts, {passes} passes of the U-Net"
    )
    return texts, layers


def load_models(args: Options, run: Run) -> tuple[StableDiffusionPipeline, Process]:
    """Load the frozen pipeline, on its device and in the precision of the run, and its noise process."""
    source, where = args.pretrained_model_name_or_path, {"revision": args.revision, "cache_dir": args.cache_dir}
    pipeline = load_pipeline(run.accelerator, source, args.resolution, variant=args.variant, **where)
    check_validation_size(args.validation_size, pipeline)
    if args.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    return pipeline, process_of(load_noise_scheduler(source, **where))


def draw_with_teacher(
    args: Options,
    run: Run,
    pipeline: StableDiffusionPipeline,
    prompts: PromptCache,
    texts: list[str],
    weights: dict[str, str],
) -> tuple[Pairs, dict]:
    """Return the pairs, drawn where they are missing, and the teacher's pictures of the validation prompts."""
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing"
    )
    sampling = {
        "num_inference_steps": args.teacher_num_inference_steps,
        "guidance_scale": args.teacher_guidance_scale,
    }
    folder = Path(args.pairs_dir or Path(args.output_dir, "pairs"))
    settings = {"seed": 0, "resolution": args.resolution} | sampling  # so that a run without --seed can go on drawing
    batch_size = args.generation_batch_size
    pairs = draw_pairs(run.accelerator, pipeline, folder, texts, args.num_pairs, batch_size, weights, **settings)
    if args.figure_data:
        write_sheet(args.figure_data, sheet_rows(pairs))
    validation = Validation(args, run, pipeline, prompts, **sampling)
    return pairs, validation.generate() if run.accelerator.is_main_process else {}


def draw_sample(batch: dict, timesteps: Tensor, prompts: PromptCache, rng: torch.Generator) -> Sample:
    """Draw a timestep for each pair of a batch with a CPU generator."""
    chosen = timesteps[torch.randint(len(timesteps), (len(batch["latents"]),), generator=rng)]
    sample = Sample(batch["latents"], batch["noise"], chosen, prompts(batch["caption"]), batch.get("pixel_values"))
    return sample.to(batch["latents"].device)


def score(
    unet: nn.Module,
    process: Process,
    term: PerceptualTerm | None,
    first_timestep: Tensor,
    step: int,
    sample: Sample,
    rng: torch.Generator,
) -> Losses:
    """Pseudo-Huber loss of the predicted latents, and perceptual loss, of each row of a sample."""
    noisy = process.add_noise(sample.latents, sample.noise, sample.timesteps)
    is_first = sample.timesteps == first_timestep.to(noisy.device)
    noisy = sample.noise.where(is_first.view(-1, 1, 1, 1), noisy)  # drawing starts with only noise
    embeds = sample.prompt_embeds
    model_pred = unet(noisy.to(embeds.dtype), sample.timesteps, embeds, return_dict=False)[0].float()
    errors = process.predict_x0(model_pred, noisy, sample.timesteps) - sample.latents
    denoising = sample.mean((errors.square() + HUBER**2).sqrt() - HUBER)
    perceptual = gated = torch.zeros_like(denoising)
    if term is not None:
        assert sample.images is not None
        perceptual = term(model_pred, noisy, sample.timesteps, sample.images, step, rng)
        gated = term.gate(sample.timesteps, step).to(denoising)
    return Losses(denoising, model_pred, sample.timesteps, perceptual, gated)


def finish(args: Options, run: Run, adapter: Adapter, validation: Validation, before: dict) -> list[str]:
    """Export the student, reload and check it, draw it beside the teacher, write the card; the files' names."""
    steps = args.num_inference_steps
    is_dora = any(layer.magnitude is not None for layer in adapter.layers().values())
    in_comfyui = f"sampler ddim, scheduler sgm_uniform, {steps} steps, CFG 1"
    kohya_weights, drawn = export(args, run, adapter, usage_hint=in_comfyui), []
    with optional("check of the adapter and pictures"):
        check(args, adapter)
        if before:
            teacher, student = f"teacher, {args.teacher_num_inference_steps} steps", f"student, {steps} steps"
            drawn = validation.write({teacher: before, student: validation.generate()})
    shown = [BEFORE_AFTER] if drawn else []
    settings = f"num_inference_steps={steps}, guidance_scale=1"
    keywords = ", ".join(f"{name}={value!r}" for name, value in DDIM.items())
    scheduler = f"DDIMScheduler.from_config(pipeline.scheduler.config, {keywords})"
    write_card(
        args,
        run,
        description=f"which draw in {steps} steps without guidance, distilled from another LoRA by sketch-perceptual."
        f" {describe_files(args, run, is_dora)} In ComfyUI: {in_comfyui}.",
        prompts=args.validation_prompt or ["a sketch of a house"],
        pictures=shown,
        scheduler=scheduler,
        settings=settings,
    )
    if run.meter.skipped:
        logger.warning(f"{run.meter.skipped} steps were skipped: their loss or gradient was not finite")
    seen = "the validation prompts by the teacher and by the student" if drawn else None
    print(list_files(args.output_dir, kohya_weights, seen))
    print(f"Draw with diffusers: {scheduler},")
    print(f"pipeline(prompt, {settings}); with ComfyUI: {in_comfyui}")
    return [WEIGHTS, kohya_weights, "README.md", *shown]


if __name__ == "__main__":
    entry.run(main, parse_args())
