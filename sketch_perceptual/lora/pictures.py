"""Captioned pictures of a LoRA training: options, reading, split and preview."""

import argparse
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from PIL import Image

from ..cli.arguments import Options, Parser, at_least, fraction
from ..data.datasets import CaptionedImages
from ..data.images import INTERPOLATIONS, to_pil
from ..data.options import add_caption_options, check_caption_options, load_captioned
from ..data.preview import sheet_rows, write_sheet
from ..data.scan import Contents, check_masks, check_shapes, read_once
from ..data.splits import Split, split
from ..diffusion.pipelines import latent_pixels
from ..errors import has_complained
from ..measures.strokes import describe_strokes
from ..training.distributed import on_main
from ..training.feature_cache import scan_folder
from ..training.identity import describe_images
from ..training.options import add_feature_dir
from ..training.startup import dry_run

logger = get_logger(__name__, log_level="INFO")

NEW_CAPTIONS = "--shuffle_tags makes new captions all the time"
NEW_ENCODER = "--train_text_encoder changes what captions mean"
FEW_PROMPTS = 1000  # are cached
FEW_DRAWINGS = 16  # whose strokes are measured


def add_picture_options(parser: Parser, resolution: int) -> None:
    """Add the options of `load_pictures` and of the caches; `resolution` is the default."""
    add, natural = add_caption_options(parser), at_least(0)
    add("--caption_dropout", type=fraction, default=0.0, help="share of captions that are left empty, for guidance")
    add("--shuffle_tags", action="store_true", help="put what stands between commas in another order each time")
    add("--keep_tags", type=natural, default=0, help="number of leading tags that --shuffle_tags keeps in place")
    add("--resolution", type=at_least(1), default=resolution, help="size of the square training images, in pixels")
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
        help="fraction of images held out (copies stay together); the losses on them are logged after each epoch",
    )
    add_feature_dir(add, "cache of latents, keyed by image, VAE, resolution, fit and precision")


def check_picture_options(parser: Parser, args: Options) -> None:
    """Exit with a message for options that exclude each other."""
    check_caption_options(parser, args)
    if args.cache_prompts and (args.shuffle_tags or args.train_text_encoder):
        parser.error(f"--cache_prompts cannot be used: {NEW_CAPTIONS if args.shuffle_tags else NEW_ENCODER}")
    if args.keep_tags and not args.shuffle_tags:
        parser.error("--keep_tags needs --shuffle_tags")


@dataclass
class Pictures:
    """The pictures of a training.

    Args:
        train: pictures of an epoch; some may be repeated.
        keys: content key of each of them.
        held_out: pictures not trained on; None without `validation_share`.
        random_crops: whether any picture is cropped at random.
    """

    train: CaptionedImages
    keys: list[str]
    held_out: CaptionedImages | None
    random_crops: bool

    def captions(self, *, held_out: bool = True) -> list[str]:
        """Return the distinct captions, in order."""
        parts = [self.train, self.held_out] if held_out else [self.train]
        return list(dict.fromkeys(text for part in parts if part for row in part.rows for text in part.captions[row]))

    def identity(self) -> dict[str, str]:
        """Return what a resumed run must share: a hash of the pictures with their captions."""
        return {"data": describe_images(self.keys, (self.train.captions[row] for row in self.train.rows))}


def preview_pictures(args: Options) -> bool:
    """Return True after a dry run, which only reports on the pictures."""
    return dry_run(args, lambda seed: _read(args, _open(args, seed)))


def load_pictures(args: Options, accelerator: Accelerator, seed: int) -> Pictures:
    """Read each picture once and split them. InputError lists what cannot be used."""
    data = _open(args, seed)
    scanned, sides = on_main(accelerator, _read, args, data)
    data, keys, held_out = _select(data, scanned), scanned.keys, None
    some_not_square = any(width != height for width, height in scanned.sizes)
    if sides is not None:
        held_out, data, keys = data.select(sides.validation), data.select(sides.train), [keys[i] for i in sides.train]
        held_out.center_crop, held_out.random_flip = True, False
        held_out.caption_dropout, held_out.shuffle_tags = 0.0, False
    count = len(data)
    data, indices = data.repeated()
    if len(data) > count:
        logger.info(f"{count} images, {len(data)} in an epoch")
    random_crops = some_not_square and args.fit == "crop" and not args.center_crop
    return Pictures(data, [keys[index] for index in indices], held_out, random_crops)


def some_drawings(data: CaptionedImages) -> list[Image.Image]:
    """Return up to FEW_DRAWINGS of the drawings, as the model sees them."""
    return [to_pil(data.pixels(index)) for index in data.spread(FEW_DRAWINGS)]


def collate(examples: list[dict]) -> dict:
    batch = {key: [example[key] for example in examples] for key in examples[0]}
    return {key: torch.stack(x) if isinstance(x[0], torch.Tensor) else x for key, x in batch.items()}


def _open(args: Options, seed: int) -> CaptionedImages:
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


def _read(args: Options, data: CaptionedImages) -> tuple[Contents, Split | None]:
    """Scan the pictures, with their masks in the keys, and split them."""
    scanned, sides = read_once(data, args.on_bad_image, copies=bool(args.validation_share)), None
    pictures = _select(data, scanned)
    if args.fit == "bucket":
        check_shapes(pictures)
    if args.alpha_mask:
        masks = check_masks(pictures)
        scanned = scanned._replace(keys=[f"{key}-{mask}" for key, mask in zip(scanned.keys, masks, strict=True)])
    if args.validation_share:
        sides = split([0] * len(pictures), scanned.keys, scanned.copies, validation_share=args.validation_share)
        logger.info(sides.summary)
    if not has_complained():
        logger.info(f"at --resolution {args.resolution}: {describe_strokes(some_drawings(pictures))}")
        if args.figure_data:
            write_sheet(args.figure_data, sheet_rows(pictures))
    return scanned, sides


def _select(data: CaptionedImages, scanned: Contents) -> CaptionedImages:
    """Select the readable images and set their sizes."""
    for index, image_size in zip(scanned.positions, scanned.sizes, strict=True):
        data.sizes[data.rows[index]] = image_size
    return data.select(scanned.positions)
