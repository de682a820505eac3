"""Options of a LoRA and its optimizer, for any model."""

import torch

from ..cli.arguments import Options, Parser, above, at_least
from ..errors import InputError


def add_lora_options(parser: Parser) -> None:
    """Add the options of `Adapter` and `optimizer_class`."""
    add, count = parser.group("LoRA"), at_least(1)
    add("--rank", fixed=True, type=count, default=4, help="rank of the LoRA")
    add("--lora_alpha", type=count, help="scale of the LoRA is alpha / rank; default: the rank")
    add(
        "--use_dora",
        fixed=True,
        action="store_true",
        help="use DoRA; load the file for diffusers, since other programs compute DoRA differently",
    )
    add("--use_rslora", action="store_true", help="scale by alpha / sqrt(rank) instead of alpha / rank")
    add(
        "--train_text_encoder",
        fixed=True,
        action="store_true",
        help="train a LoRA of the text encoder too; captions are not cached",
    )
    add("--text_encoder_lr", type=above(0), help="learning rate of the text encoder; default: --learning_rate")
    add("--use_8bit_adam", fixed=True, action="store_true", help="use the 8-bit AdamW of bitsandbytes")


def check_lora_options(parser: Parser, args: Options) -> None:
    """Fill in defaults that depend on other options; exit with a message for options that exclude each other."""
    if args.text_encoder_lr and not args.train_text_encoder:
        parser.error("--text_encoder_lr needs --train_text_encoder")
    if args.train_text_encoder and args.text_encoder_lr is None:
        args.text_encoder_lr = args.learning_rate
    if args.lora_alpha is None:
        args.lora_alpha = args.rank


def optimizer_class(use_8bit_adam: bool) -> type[torch.optim.Optimizer]:
    """Return AdamW of torch or bitsandbytes; InputError if that is not installed."""
    if not use_8bit_adam:
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise InputError("`use_8bit_adam` needs bitsandbytes: pip install bitsandbytes") from error
    return AdamW8bit
