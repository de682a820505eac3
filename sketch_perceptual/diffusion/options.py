"""Options of the perceptual term, and the term built from them."""

import re
from pathlib import Path

import torch
from torch import nn

from ..cli.arguments import Options, Parser, at_least
from ..errors import InputError
from ..losses import LOSSES, all_weights, build_losses, named_networks
from ..losses.registry import WITHOUT_NETWORK
from ..networks.backbone import AttentionVGG16
from ..networks.hub_model import fingerprint
from ..training import cards
from ..training.identity import digest
from .latents import Latents
from .pipelines import load_decoder
from .process import Process
from .term import PerceptualTerm

ON_BUNDLED = {"attention_vgg", "gram", "paper_l1"}  # losses on the backbone that comes with the package


def add_term_options(parser: Parser) -> None:
    """Add the options of `make_term`."""
    add, count, natural, rate = parser.group("perceptual term"), at_least(1), at_least(0), at_least(0.0, float)
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
        default=["gram", "tone"],
        help=f"{', '.join(LOSSES)}, an entry point, or module:Class; several, NAME=WEIGHT, are averaged",
    )
    add(
        "--backbone",
        shared=False,
        help="network of the loss: folder, Hub id, .safetensors of VGG-16, imagenet, bundled; default: the loss's own",
    )
    add("--perceptual_layers", nargs="+", metavar="LAYER", help="layers to compare, e.g. relu1_2 relu3_3")
    add(
        "--perceptual_resolution",
        type=count,
        help="downscale larger squares to this size for the loss; default: compare them at their size",
    )
    add(
        "--perceptual_crop",
        type=count,
        default=64,
        help="side of the square that is compared, in pixels; at least --resolution: the whole image",
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
    add(
        "--perceptual_decoder",
        shared=False,
        default="vae",
        help='"vae", or an AutoencoderTiny, e.g. madebyollin/taesd',
    )
    add("--perceptual_dtype", choices=("float32", "bfloat16"), default="float32")


def make_term(args: Options, latents: Latents, process: Process) -> PerceptualTerm | None:
    """Build the perceptual term; None at weight 0, for which nothing is loaded."""
    if args.perceptual_weight == 0:
        return None
    dtype = getattr(torch, args.perceptual_dtype)
    crop = args.perceptual_crop if args.perceptual_crop < args.resolution else None
    decoder = None
    if args.perceptual_decoder != "vae":
        decoder = load_decoder(args.perceptual_decoder, args.cache_dir).to(latents.vae.device)
    try:
        loss = build_losses(
            args.perceptual_loss,
            size=crop or args.resolution,
            dtype=dtype,
            backbone=args.backbone,
            layers=args.perceptual_layers,
            resolution=args.perceptual_resolution,
        )
        return PerceptualTerm(
            loss,
            latents.vae,
            process,
            min_snr=args.perceptual_min_snr,
            max_timestep=args.perceptual_max_timestep,
            start_step=args.perceptual_start_step,
            every=args.perceptual_every,
            target=args.perceptual_target,
            decoder=decoder,
            dtype=dtype,
            crop=crop,
            checkpoint=args.gradient_checkpointing,
        )
    except InputError as error:  # the options of these arguments have longer names
        raise InputError(re.sub(r"`(crop|layers|resolution)`", r"`perceptual_\1`", str(error))) from error


def describe_term(term: PerceptualTerm | None) -> dict:
    """Return facts that a resumed run must share besides the options: weights and calibration of the backbone."""
    facts: dict = {}
    loss = None if term is None else term.loss
    modules = [module for _, module in named_networks(loss)] if isinstance(loss, nn.Module) else []
    backbones = [module for module in modules if isinstance(module, AttentionVGG16)]
    if isinstance(loss, nn.Module):
        facts["backbone_weights"] = fingerprint(backbones[0] if len(backbones) == 1 else all_weights(loss))
    if backbones:
        facts["backbone_attention"] = backbones[0].attention
        facts["backbone_pool_after_attention"] = backbones[0].pool_after_attention
        facts["calibration"] = digest(backbone.calibration for backbone in backbones)
    return facts


def describe_backbone(args: Options) -> dict[str, str]:
    """Return the name of the backbone for the model card; its fingerprint is in `describe_term`."""
    names = _loss_names(args)
    if args.perceptual_weight == 0 or names <= WITHOUT_NETWORK or not (args.backbone or names <= set(LOSSES)):
        return {}
    bundled = "bundled" if names & ON_BUNDLED else "imagenet"
    return {"backbone": (cards.hub_id(args.backbone) or Path(args.backbone).name) if args.backbone else bundled}


def _loss_names(args: Options) -> set[str]:
    return {name.split("=")[0] for name in args.perceptual_loss}
