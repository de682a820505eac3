"""Options for training data, and functions that load it."""

import argparse
from collections.abc import Callable

import torch

from ..cli.arguments import Parser, at_least
from ..seeds import generator
from .captions import CAPTION_TEMPLATE, captioned_dataset, captioned_folder
from .datasets import CaptionedImages, Kind, LabelledImages
from .hf_dataset import load_rows
from .images import INVERT
from .labels import labelled_dataset, labelled_folder


def add_data_options(parser: Parser, folder: str) -> Callable:
    """Add options for the source of images; return `add_argument` of their group. `folder`: help of a local one."""
    add = parser.group("data")
    add("--train_data_dir", shared=False, help=folder)
    add("--dataset_name", shared=False, help="dataset on the Hub, or a folder that `datasets` can read")
    add(
        "--dataset_config_name",
        shared=False,
    )
    add("--image_column", shared=False, default="image")
    add(
        "--on_bad_image",
        shared=False,
        choices=("error", "skip"),
        default="error",
        help="what to do with images that cannot be read",
    )
    add("--background", default="white", help="colour behind transparent drawings")
    add("--invert", choices=INVERT, default="never", help="invert images; auto: those that are white on black")
    add("--max_train_samples", shared=False, type=at_least(1), help="use a random subset of N images")
    add("--cache_dir", shared=False, help="where downloads are cached")
    return add


def add_caption_options(parser: Parser) -> Callable:
    """Add options for captioned images; return `add_argument` of their group."""
    add = add_data_options(
        parser, "a folder of images with metadata.jsonl or .csv, .txt files beside them, or class folders"
    )
    add("--caption_column", shared=False, default="text", help="captions, lists of captions, or class labels")
    add("--caption_template", default=CAPTION_TEMPLATE, help="caption of an image of a class; {class} is its name")
    add("--default_caption", help="caption of images that have none")
    add(
        "--on_missing_caption",
        choices=("error", "skip", "default"),
        default="error",
        help="what to do with images that have no caption; with --default_caption they get it, unless skipped",
    )
    add("--trigger_word", metavar="WORD", help="prepend WORD and a comma to each caption that does not contain it")
    return add


def check_caption_options(parser: Parser, args: argparse.Namespace) -> None:
    if args.dataset_name is None and args.train_data_dir is None:
        parser.error("pass --train_data_dir with a folder of drawings, or --dataset_name")


def add_class_options(parser: Parser, role: str) -> Callable:
    """Add options for drawings with classes; `role` is the purpose of the held-out drawings."""
    add = add_data_options(parser, "a folder with one folder of images per class, named after it or by an ImageNet id")
    add("--label_column", shared=False, default="label", help="class labels, or names of classes")
    add(
        "--group_column",
        shared=False,
        help="keep images with equal values in this column on one side of the split, e.g. those of one artist",
    )
    add("--validation_share", type=float, default=0.1, help=f"held-out fraction of the images, {role}")
    return add


def check_class_options(parser: Parser, args: argparse.Namespace) -> None:
    if args.dataset_name is None and args.train_data_dir is None:
        parser.error("pass --train_data_dir with a folder of class folders, or --dataset_name")
    if args.group_column is not None and args.dataset_name is None:
        parser.error("--group_column needs --dataset_name: class folders have no columns")


def choose_samples(data: Kind, count: int | None, seed: int) -> Kind:
    """Return a random subset of `count` items, or all of `data`."""
    if count is None or count >= len(data):
        return data
    chosen = torch.randperm(len(data), generator=generator(seed, "samples"))[:count]
    return data.select(sorted(chosen.tolist()))


def load_captioned(args: argparse.Namespace, seed: int, **transform) -> CaptionedImages:
    """Load the images of `add_caption_options`; `transform` are keywords of `CaptionedImages`."""
    names = "caption_column caption_template default_caption on_missing_caption trigger_word background invert".split()
    options = {name: getattr(args, name) for name in names} | {"seed": seed} | transform
    if args.dataset_name is None:
        data = captioned_folder(args.train_data_dir, **options)
    else:
        rows = load_rows(args.dataset_name, args.dataset_config_name, args.train_data_dir, args.cache_dir)
        data = captioned_dataset(rows, name=args.dataset_name, image_column=args.image_column, **options)
    return choose_samples(data, args.max_train_samples, seed)


def load_labelled(args: argparse.Namespace, seed: int, **options) -> LabelledImages:
    """Load the drawings of `add_class_options`; `options` are keywords of `LabelledImages`."""
    options |= {"background": args.background, "invert": args.invert, "seed": seed}
    if args.dataset_name is None:
        data = labelled_folder(args.train_data_dir, **options)
    else:
        rows = load_rows(args.dataset_name, args.dataset_config_name, args.train_data_dir, args.cache_dir)
        columns = {name: getattr(args, name) for name in ("image_column", "label_column", "group_column")}
        data = labelled_dataset(rows, name=args.dataset_name, **columns, **options)
    return choose_samples(data, args.max_train_samples, seed)
