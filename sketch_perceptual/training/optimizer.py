"""Steps, optimizer and learning rate schedule from the options of `add_training_options`."""

import argparse

import torch
from accelerate.logging import get_logger

from ..errors import InputError
from .run import Run
from .steps import Steps, loader_batches

logger = get_logger(__name__, log_level="INFO")

ANY_LENGTH = ("constant", "constant_with_warmup")  # the other schedules depend on the length of the run


def make_steps(args: argparse.Namespace, run: Run, loader, sampler) -> Steps:
    """Return the steps of a run over a prepared DataLoader whose `sampler` orders each epoch."""
    return Steps(
        run.accelerator,
        loader_batches(run.accelerator, loader, sampler),
        len(loader),
        seed=run.seed,
        total=args.max_train_steps,
        epochs=args.num_train_epochs,
        accumulation=args.gradient_accumulation_steps,
    )


def make_optimizer(
    args: argparse.Namespace, parameters: list, optimizer_class=torch.optim.AdamW, **options
) -> torch.optim.Optimizer:
    """Return AdamW (Adam if there is no weight decay) with the options of `add_training_options`."""
    return optimizer_class(
        parameters,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
        **options,
    )


def make_lr_scheduler(
    args: argparse.Namespace, run: Run, optimizer: torch.optim.Optimizer, steps: Steps
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the schedule, to be stepped once per optimizer step; accelerate would step it once per process."""
    from diffusers.optimization import get_scheduler

    if args.lr_scheduler not in ANY_LENGTH:
        run.settle(max_train_steps=steps.total)
    processes = run.accelerator.num_processes
    warmup = 0 if args.lr_scheduler == "constant" else args.lr_warmup_steps
    if args.scale_lr:
        for group in optimizer.param_groups:
            group["lr"] *= args.gradient_accumulation_steps * args.train_batch_size * processes
    if warmup and steps.total == 1:
        raise InputError("`lr_warmup_steps`: the only step of this run would have a rate of 0; pass 0")
    if warmup >= steps.total:
        logger.warning(
            f"`lr_warmup_steps` {warmup} is longer than the run of {steps.total} steps: its rate ends at"
            f" {(steps.total - 1) / warmup:.0%} of `learning_rate`"
        )
    try:
        return get_scheduler(args.lr_scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=steps.total)
    except ValueError as error:
        raise InputError(f"`lr_scheduler` {args.lr_scheduler} with this `learning_rate`: {error}") from error
