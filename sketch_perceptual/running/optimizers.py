"""Optimizer, learning rate schedule, number of steps."""

import argparse
import math

import torch


def make_optimizer(
    args: argparse.Namespace, parameters: list[torch.nn.Parameter], optimizer_class=torch.optim.AdamW, **options
) -> torch.optim.Optimizer:
    """AdamW as diffusers' scripts set it up; without weight decay it is Adam."""
    return optimizer_class(
        parameters,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
        **options,
    )


def make_lr_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer):
    """The schedule in optimizer steps: step it once for each; accelerate would count processes as well."""
    from diffusers.optimization import get_scheduler

    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )


def plan_steps(args: argparse.Namespace, batches: int) -> None:
    """Settle `max_train_steps` and `num_train_epochs` for epochs of `batches` batches a process."""
    steps_per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    if args.max_train_steps is None:
        args.max_train_steps = args.num_train_epochs * steps_per_epoch
    args.num_train_epochs = math.ceil(args.max_train_steps / steps_per_epoch)
