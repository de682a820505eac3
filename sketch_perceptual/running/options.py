"""The options that trainers share."""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path

SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")


def at_least(minimum, kind=int) -> Callable[[str], int | float]:
    """An argparse type: a finite number no smaller than `minimum`."""

    def number(text: str):
        value = kind(text)
        if not (math.isfinite(value) and value >= minimum):
            raise argparse.ArgumentTypeError(f"must be a number of at least {minimum}, got {text}")
        return value

    number.__name__ = kind.__name__
    return number


def add_run_options(parser: argparse.ArgumentParser, output_dir: str) -> Callable:
    """The options that every trainer has beside its own; returns `add_argument` of their group for more of them."""
    add = parser.add_argument_group("training").add_argument
    count, natural = at_least(1), at_least(0)
    add("--output_dir", default=output_dir, help="where the model, the checkpoints and the logs are written")
    add("--seed", type=natural, help="decides every random draw; one is drawn and saved if not given")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: what accelerate was told")
    add("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere GPUs and newer")
    add("--dataloader_num_workers", type=natural, default=0, help="processes that read images; 0 is the main one")
    add("--logging_dir", default="logs", help="inside --output_dir")
    add(
        "--report_to",
        default="tensorboard",
        help="tensorboard, wandb, comet_ml, another tracker of accelerate's, all or none",
    )
    add("--local_rank", type=int, default=-1, help="for launchers that pass it; the environment decides")
    add("--checkpoints_total_limit", type=count, help="keep only the newest so many")
    add("--resume_from_checkpoint", help='a checkpoint\'s folder or its name in --output_dir, or "latest"')
    add("--push_to_hub", action="store_true", help="upload the result to the Hugging Face Hub")
    add("--hub_token", help="better: hf auth login")
    add("--hub_model_id", help="the Hub repository; default: the name of --output_dir")
    return add


def add_training_options(parser: argparse.ArgumentParser, output_dir: str) -> None:
    """The options that diffusers' training scripts share, with their names, defaults and meaning."""
    add = add_run_options(parser, output_dir)
    count, natural, rate = at_least(1), at_least(0), at_least(0.0, float)
    add("--train_batch_size", type=count, default=16, help="images a step and process")
    add("--num_train_epochs", type=count, default=100)
    add("--max_train_steps", type=count, help="optimizer steps in all; overrides --num_train_epochs")
    add("--gradient_accumulation_steps", type=count, default=1, help="batches an optimizer step")
    add("--gradient_checkpointing", action="store_true", help="less memory, a slower backward pass")
    add("--learning_rate", type=rate, default=1e-4)
    add("--scale_lr", action="store_true", help="multiply the rate by processes, accumulation and batch size")
    add("--lr_scheduler", default="constant", choices=SCHEDULES)
    add("--lr_warmup_steps", type=natural, default=500, help="optimizer steps")
    add("--adam_beta1", type=rate, default=0.9)
    add("--adam_beta2", type=rate, default=0.999)
    add("--adam_weight_decay", type=rate, default=1e-2)
    add("--adam_epsilon", type=rate, default=1e-8)
    add("--max_grad_norm", type=at_least(1e-12, float), default=1.0, help="gradients are clipped to this norm")
    add("--checkpointing_steps", type=count, default=500, help="save a checkpoint every so many optimizer steps")


def add_feature_options(add: Callable) -> None:
    """The options of `extract_features`."""
    add("--extraction_batch_size", type=at_least(1), default=64, help="images a forward pass of the frozen network")
    add("--feature_dir", default=CACHE, help="features are kept here, by content, weights, resolution and precision")


CACHE = str(Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "sketch-perceptual", "features").expanduser())
