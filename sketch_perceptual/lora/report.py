"""Summary, metrics and model card of a LoRA training."""

from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import ModelCardData
from torch import Tensor

from ..cli.arguments import Options
from ..diffusion import PerceptualTerm
from ..diffusion.options import describe_backbone
from ..training import cards
from ..training.run import Run
from ..training.startup import check_space
from ..training.steps import Meter, Steps
from .adapter import WEIGHTS
from .samples import Losses
from .validation import BEFORE_AFTER


def run_summary(args: Options, run: Run, steps: Steps, term: PerceptualTerm | None, weights: int) -> str:
    """Describe the training and the files to be written; InputError if the disk cannot hold them."""
    saves = steps.total // args.checkpointing_steps
    space = check_space(args.output_dir, saves, args.checkpoints_total_limit, 12 * weights, 8 * weights)
    training = (
        f"{steps.total} steps of {args.train_batch_size} x {run.accelerator.num_processes} x"
        f" {args.gradient_accumulation_steps} images, {steps.epochs} epochs, seed {run.seed}; {weights / 1e6:.1f} M"
        f" weights are trained; {space}\n"
    )
    if term is None:
        return f"{training}no perceptual term: --perceptual_weight is 0"
    return (
        f"{training}perceptual term: {args.perceptual_weight:g} x {' + '.join(args.perceptual_loss)}; open at"
        f" {term.open.float().mean():.0%} of the timesteps, up to {int(term.open.nonzero().max())}"
    )


def logged(losses: Losses, pull: dict[str, Tensor], num_train_timesteps: int) -> dict[str, Tensor]:
    """Return the quantities of a batch that are summed up for the log, (B,); `pull` is that of `balance`."""
    values = {"denoising": losses.denoising, "perceptual": losses.perceptual, "gated": losses.gated}
    values |= {"train": losses.denoising + pull["factor"] * losses.perceptual} | pull
    return values | by_decile(losses, num_train_timesteps)


def by_decile(losses: Losses, num_train_timesteps: int) -> dict[str, Tensor]:
    """Split the losses by tenths of the schedule: of each the values (B,), 0 for other rows, and a mask of its rows.

    Both depend on the timestep far more than on the training: a single number of a step says little.
    """
    rows = F.one_hot(losses.timesteps * 10 // num_train_timesteps, 10).T.to(losses.denoising)
    split = {}
    kinds = (
        ("denoising", losses.denoising, torch.ones_like(losses.gated)),
        ("perceptual", losses.perceptual, losses.gated),
    )
    for kind, values, counted in kinds:
        for tenth, (loss, row) in enumerate(zip(values * rows, counted * rows, strict=True)):
            name = f"{kind}_loss/t{10 * tenth}-{10 * tenth + 10}%"
            split |= {name: loss, f"{name} rows": row}
    return split


def step_logs(
    totals: dict[str, float], lr_scheduler: torch.optim.lr_scheduler.LRScheduler, meter: Meter, *, has_term: bool
) -> dict[str, float]:
    """Return the means of one optimizer step; those of the perceptual loss are over the rows that were scored."""
    rates = map(float, lr_scheduler.get_last_lr())
    logs = {"grad_norm": totals["grad_norm"]} | dict(zip(("lr", "text_encoder_lr"), rates, strict=False))
    if rows := totals["rows"]:
        logs |= {"train_loss": totals["train"] / rows, "denoising_loss": totals["denoising"] / rows}
        if has_term:
            logs["gated_rows"] = totals["gated"] / rows
        if gated := totals["gated"]:
            logs["perceptual_loss"] = totals["perceptual"] / gated
            logs |= {name: totals[name] / gated for name in ("gradient_ratio", "gradient_cosine")}
        logs |= {name: totals[name] / totals[f"{name} rows"] for name in totals if totals.get(f"{name} rows")}
    return logs | ({"skipped_steps": meter.skipped} if meter.skipped else {})


def kohya_file(hub_model_id: str | None, output_dir: str) -> str:
    """Return the name of the file for other programs, which show it: that of the run."""
    name = cards.model_name(hub_model_id, output_dir).split("/")[-1]
    return f"{name}_kohya.safetensors" if f"{name}.safetensors".endswith(WEIGHTS) else f"{name}.safetensors"


def list_files(output_dir: str, kohya_weights: str, shown: str | None) -> str:
    """List the files of the result with their uses; `shown` describes the pictures, if there are any."""
    pictures = {BEFORE_AFTER: shown} if shown else {}
    weights = {
        WEIGHTS: f"for diffusers: pipeline.load_lora_weights({output_dir!r}, weight_name={WEIGHTS!r})",
        kohya_weights: "for ComfyUI (models/loras), AUTOMATIC1111 and Forge (models/Lora):"
        f" <lora:{Path(kohya_weights).stem}:1> in a prompt",
    }
    return cards.listing(output_dir, pictures | weights)


def write_card(
    args: Options,
    run: Run,
    *,
    description: str,
    prompts: list[str],
    pictures: list[str],
    scheduler: str = "",
    settings: str = "",
) -> None:
    """Write the model card of a LoRA of Stable Diffusion 1.x.

    Args:
        description: what follows "LoRA weights for Stable Diffusion 1.5, ".
        prompts: to try it with.
        pictures: files to show.
        scheduler: diffusers' scheduler as code, such as `DDIMScheduler.from_config(...)`, if it is not the pipeline's.
        settings: keywords of the call of the pipeline, as code.
    """
    base_model = cards.hub_id(args.pretrained_model_name_or_path)
    tags = "stable-diffusion stable-diffusion-diffusers text-to-image diffusers diffusers-training lora sketch"
    imports = ", ".join(filter(None, [scheduler.partition(".")[0], "StableDiffusionPipeline"]))
    lines = [f'pipeline.load_lora_weights("{run.hub_model_id or "path/to/this/folder"}", weight_name="{WEIGHTS}")']
    if scheduler:
        lines.append(f"pipeline.scheduler = {scheduler}")
    lines.append(f'pipeline({", ".join(filter(None, [repr(prompts[0]), settings]))}).images[0].save("sketch.png")')
    snippet = f"""from diffusers import {imports}

pipeline = StableDiffusionPipeline.from_pretrained("{base_model or "path/to/stable-diffusion-v1-5"}")
""" + "\n".join(lines)
    cards.write_card(
        args.output_dir,
        data=ModelCardData(
            **run.card_data,
            base_model=base_model,
            library_name="diffusers",
            tags=tags.split(),
            inference=True,
            instance_prompt=args.trigger_word,
            widget=[{"text": prompt} for prompt in prompts],
        ),
        title=f"Sketch LoRA - {cards.model_name(run.hub_model_id, args.output_dir)}",
        description=f"LoRA weights for Stable Diffusion 1.5, {description}",
        install="`pip install diffusers transformers accelerate peft`",
        snippet=snippet,
        options={"steps": run.steps.total} | describe_backbone(args) | run.record(),
        pictures=pictures,
    )


def describe_training(args: Options, run: Run, caption_origins: str) -> str:
    """Describe a LoRA trained on drawings, for its card."""
    term = "with the perceptual term" if args.perceptual_weight else "by the script"
    trigger = f" Every caption has the trigger word {args.trigger_word!r}." if args.trigger_word else ""
    return (
        f"fine-tuned on drawings {term} of sketch-perceptual. {describe_files(args, run, args.use_dora)} Captions come"
        f" from {caption_origins}.{trigger}{_held_out_losses(run.state['held_out'])}"
    )


def describe_files(args: Options, run: Run, is_dora: bool) -> str:
    """Describe which file is for which program, for the card."""
    readers = "LyCORIS; others compute DoRA otherwise" if is_dora else "AUTOMATIC1111, Forge and ComfyUI"
    return f"`{WEIGHTS}` is for diffusers, `{kohya_file(run.hub_model_id, args.output_dir)}` for {readers}."


def _held_out_losses(history: list[dict]) -> str:
    """Describe the losses on held-out images; "" without any."""
    if not history:
        return ""
    first, last = history[0], history[-1]
    lowest = min(history, key=lambda record: record["denoising_loss"])
    losses = [
        f"{name.replace('_', ' ')} {first[name]:.4g} at the start, {last[name]:.4g} at the end"
        for name in ("denoising_loss", "perceptual_loss")
        if None not in (first[name], last[name])
    ]
    return (
        f" On held-out images: {'; '.join(losses)}. The denoising loss was lowest after step {lowest['step']},"
        f" {lowest['denoising_loss']:.4g}."
    )
