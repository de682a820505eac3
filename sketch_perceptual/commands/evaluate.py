"""Evaluate backbones and embedders on drawings, and image models by their pictures.

    sketch-perceptual evaluate distance --train_data_dir ImageNet-Sketch/sketch \\
      --models neither=imagenet tuned=vgg16-tuned/best both=attention-vgg16/best --figure ratios.png
    sketch-perceptual evaluate retrieval --train_data_dir ImageNet-Sketch/sketch \\
      --models neither=imagenet-retrieval both=sketch-retrieval --figure nearest.png
    sketch-perceptual evaluate transfer --paired_data_dir FS2K --paired_style 1 \\
      --models both=sketch-style --figure transfer.png
    sketch-perceptual evaluate generation --train_data_dir drawings \\
      --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
      --models base=none lora=sketch-lora --figure generation.png

distance: mean cosine distances within and across classes over all pairs, and their ratio (Seo 2025, section 4.3,
Table 4, Figure 4). retrieval: a gallery is ranked for queries that share no copy with it (section 4.2, Table 3).
transfer: photos through networks of train_johnson.py are compared with the true sketches (section 4.1, Table 1,
Figure 2). generation: pictures for prompts, by a pipeline with adapters or from folders, are compared with drawings
(section 4.1, Table 2, Figure 3). Features are cached on disk, except by transfer.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..extras import require

require("eval")

from accelerate import Accelerator
from accelerate.logging import get_logger

from ..cli.arguments import Parser, at_least
from ..cli.console import print_result
from ..cli.entry import run
from ..data.images import fit_image
from ..data.options import (
    add_caption_options,
    add_class_options,
    check_caption_options,
    check_class_options,
    load_captioned,
    load_labelled,
)
from ..data.paired import find_pairs
from ..diffusion.pipelines import add_pipeline_options, load_generator
from ..errors import InputError, shown
from ..evaluation.distance import measure_distances
from ..evaluation.generation import load_extractors, read_pictures, score_models, shuffled_captions
from ..evaluation.options import add_embedder_options, add_precision, add_workers, begin, embedder, extractor
from ..evaluation.retrieval import rank_models
from ..evaluation.sampling import draw_models, is_pictures
from ..evaluation.set_distances import load_features
from ..evaluation.tables import Report, expand_models, write_json
from ..evaluation.transfer import compare_styles
from ..figures import write_figure
from ..lora.prompts import cycle_prompts, read_prompts
from ..measures.image_quality import check_installed
from ..networks.backbone import BUNDLED, AttentionVGG16
from ..training.cards import hub_id, set_section
from ..training.distributed import on_main
from ..training.feature_cache import scan_folder
from ..training.options import add_feature_options
from ..training.startup import check_writable, versions

logger = get_logger(__name__, log_level="INFO")

SEEDS = "seed-*/*.safetensors"  # in a folder of LoRAs
RECORDED = """dataset_name train_data_dir group_column validation_share max_train_samples trigger_word
    paired_data_dir part paired_style resolution fit mixed_precision seed pretrained_model_name_or_path prompts
    num_images num_inference_steps guidance_scale""".split()  # options written to the JSON


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="sketch-perceptual evaluate", usage="%(prog)s TASK [options]", description=__doc__)
    tasks = parser.add_subparsers(dest="task", required=True, parser_class=Parser, prog=parser.prog)
    parsers = {
        name: tasks.add_parser(name, help=text, description=text)
        for name, text in {
            "distance": "distances within and across classes",
            "retrieval": "retrieval of the query's class from a gallery",
            "transfer": "stylised photos against the true sketches",
            "generation": "generated pictures against drawings and their prompts",
        }.items()
    }
    add_distance_options(parsers["distance"])
    add_retrieval_options(parsers["retrieval"])
    add_transfer_options(parsers["transfer"].add_argument)
    add_generation_options(parsers["generation"])
    args = parser.parse_args(argv)
    if args.task in ("distance", "retrieval"):
        check_class_options(parsers[args.task], args)
    if args.task == "generation":
        check_caption_options(parsers[args.task], args)
    return args


def add_distance_options(parser: Parser) -> None:
    add_labelled_options(parser, "for --subset validation")
    parser.add_argument(
        "--subset",
        choices=("all", "validation"),
        default="all",
        help="validation: only what train_backbone.py with the same data options held out",
    )
    parser.add_argument("--figure", help="write a picture with a bar for each ratio")


def add_retrieval_options(parser: Parser) -> None:
    add_labelled_options(parser, "as queries, unless a model of train_retrieval.py has a split")
    parser.add_argument("--figure", help="write a sheet of queries and the five nearest drawings to each")


def add_labelled_options(parser: Parser, role: str) -> None:
    """Add the options that distance and retrieval share; `role`: use of the held-out drawings."""
    add = add_class_options(parser, role)
    parser.set_defaults(background=None)
    add_embedder_options(add)
    add = parser.group("evaluation")
    add(
        "--models",
        nargs="+",
        default=[f"bundled={BUNDLED}"],
        metavar="[NAME=]MODEL",
        help="a backbone, an embedder, a folder of train_retrieval.py with one per seed, VGG-16 weights, imagenet or"
        " bundled",
    )
    add("--seed", type=at_least(0), default=0, help="seed of --max_train_samples and of the queries in the figure")
    add("--output", default=f"{parser.prog.split()[-1]}.json", help="JSON file for all results")


def add_transfer_options(add: Callable) -> None:
    add("--paired_data_dir", required=True, help="CUFS, FS2K or another paired set: see sketch_perceptual.data.paired")
    add("--part", choices=("test", "train", "all"), default="test", help="photos to compare")
    add("--paired_style", type=int, choices=(1, 2, 3), help="style of FS2K")
    add("--models", nargs="+", required=True, metavar="[NAME=]MODEL", help="folders or Hub ids of train_johnson.py")
    add("--resolution", type=at_least(32), default=256, help="size of the square photos and sketches, in pixels")
    add("--fit", choices=("crop", "pad"), default="crop", help="how images that are not square are made square")
    add("--background", default="white", help="colour behind transparent pictures")
    add("--inception_weights", help=".safetensors of FID's Inception; without it, the features of --backbone")
    add("--backbone", default=str(BUNDLED), help="network of the Frechet distance that replaces FID")
    add_precision(add)
    add("--seed", type=at_least(0), default=0, help="seed of the photos in the figure")
    add("--output", default="transfer.json", help="JSON file for all results")
    add("--figure", help="write a sheet of photos, true sketches and each model's drawings")


def add_generation_options(parser: Parser) -> None:
    add = add_caption_options(parser)
    add("--resolution", type=at_least(32), default=512, help="size of the pictures, drawn and compared, in pixels")
    add("--fit", choices=("crop", "pad"), default="crop", help="how images that are not square are made square")
    add = parser.group("generation")
    add_pipeline_options(add, required=False)
    add(
        "--models",
        nargs="+",
        required=True,
        metavar="[NAME=]MODEL",
        help="a LoRA (folder, Hub id, .safetensors), a folder of seed-*/ with one each, a folder of captioned"
        " pictures, or none: only the pipeline",
    )
    add("--prompts", help="a text file with one prompt per line; default: the captions of the drawings, shuffled")
    add("--num_images", type=at_least(2), help="number of pictures per model; default: one per prompt")
    add("--output_dir", default="generated", help="one folder per model; existing pictures are reused")
    add("--num_inference_steps", type=at_least(1), default=30, help="steps of the sampler")
    add("--guidance_scale", type=at_least(0.0, float), default=7.5, help="how closely pictures follow their prompts")
    add("--generation_batch_size", type=at_least(1), default=4, help="batch size of the pipeline")
    add("--disable_safety_checker", action="store_true", help="without it, flagged pictures are black and not scored")
    add("--seed", type=at_least(0), default=0, help="seed of the noise and of the order of prompts")
    add_precision(add)
    add = parser.group("evaluation")
    add("--backbone", default=str(BUNDLED), help="network of the Frechet distance and the nearest drawings")
    add("--inception_weights", help=".safetensors of FID's Inception, for FID and KID")
    add("--clip_model", help="a CLIP of transformers, for the CLIP score, e.g. openai/clip-vit-large-patch14")
    add("--classifier", help="a network of train_backbone.py, for the fraction of pictures that show their class")
    add_workers(add)
    add_feature_options(add)
    add("--output", default="generation.json", help="JSON file for all results")
    add("--figure", help="write a sheet of prompts, each model's pictures, and the nearest drawings")
    add("--write_scores", action="store_true", help="add the table to the card of each of --models that has one")


def main(argv: list[str] | None = None) -> None:
    run(evaluate, parse_args(argv), "sketch-perceptual evaluate")


def evaluate(args: argparse.Namespace) -> None:
    accelerator = begin(args, drawn_folders(args) if args.task == "generation" else ())
    tasks = {"distance": distance, "retrieval": retrieval, "transfer": transfer, "generation": generation}
    report = tasks[args.task](args, accelerator)
    if report is not None:
        publish(args, report)
    accelerator.end_training()


def publish(args: argparse.Namespace, report: Report) -> None:
    """Write the files, then print the table, since its reader may close the pipe."""
    options = {name: getattr(args, name) for name in RECORDED if name in args}
    record = {"task": args.task, "data": options | report.data, "models": report.results, "versions": versions()}
    write_json(args.output, record)
    try:
        if args.figure and report.render:
            write_figure(args.figure, report.render())
    finally:
        print_result(f"{report.table()}\n{shown(args.output)}")
    if vars(args).get("write_scores"):
        write_scores(args, report)


def write_scores(args: argparse.Namespace, report: Report) -> None:
    """Add the table to the cards of the models; training a model further writes a new card without it."""
    is_bundled = Path(AttentionVGG16.locate(args.backbone)) == BUNDLED
    backbone = "the bundled backbone" if is_bundled else hub_id(args.backbone) or "another backbone"
    about = (
        f"{report.data['distinct_prompts']} prompts, {args.num_inference_steps} steps at guidance"
        f" {args.guidance_scale:g}, seed {args.seed}; `frechet` in the features of {backbone}."
    )
    for _, source in expand_models(args.models, SEEDS):
        if card := set_section(source, "Scores", report.cells(), about):
            print_result(shown(card))


def distance(args: argparse.Namespace, accelerator: Accelerator) -> Report | None:
    held_out = args.validation_share if args.subset == "validation" else None
    return measure_distances(
        accelerator, *labelled(args, accelerator), on_bad_image=args.on_bad_image, held_out=held_out, **embedder(args)
    )


def retrieval(args: argparse.Namespace, accelerator: Accelerator) -> Report | None:
    return rank_models(
        accelerator,
        *labelled(args, accelerator),
        on_bad_image=args.on_bad_image,
        held_out=args.validation_share,
        seed=args.seed,
        **embedder(args),
    )


def labelled(args: argparse.Namespace, accelerator: Accelerator) -> tuple:
    """Return the drawings, the models and the feature extraction."""
    with accelerator.main_process_first():
        data = load_labelled(args, args.seed)
    data.scan_folder = scan_folder(args.feature_dir)
    return data, expand_models(args.models), extractor(args, accelerator)


def transfer(args: argparse.Namespace, accelerator: Accelerator) -> Report | None:
    pairs = find_pairs(args.paired_data_dir, None if args.part == "all" else args.part, args.paired_style)
    logger.info(pairs.summary)
    features = load_features(args.inception_weights, args.backbone, args.resolution, accelerator.device)
    return compare_styles(
        accelerator,
        pairs,
        expand_models(args.models),
        features,
        resolution=args.resolution,
        fit=args.fit,
        background=args.background,
        seed=args.seed,
    )


def generation(args: argparse.Namespace, accelerator: Accelerator) -> Report | None:
    check_installed()
    with accelerator.main_process_first():
        data = load_captioned(args, args.seed)
    fit = partial(fit_image, resolution=args.resolution, fit=args.fit, background=args.background)
    drawings = read_pictures(accelerator, data, "the drawings", args.on_bad_image, fit)
    prompts = read_prompts(args.prompts) if args.prompts else shuffled_captions(drawings, args.seed)
    names = ("backbone", "inception_weights", "clip_model", "classifier", "resolution", "fit", "background")
    extractors = load_extractors(**{name: getattr(args, name) for name in names})
    drawn = draw_pictures(args, accelerator, prompts)
    extract = extractor(args, accelerator)
    report = score_models(accelerator, drawings, drawn, extractors, extract, fit, args.on_bad_image)
    if report is not None:
        report.data["distinct_prompts"] = len(set(prompts))
    return report


def drawn_folders(args: argparse.Namespace) -> list[Path]:
    """Return the folders in `output_dir` for the pictures of the models."""
    models = expand_models(args.models, SEEDS)
    return [Path(args.output_dir, name) for name, source in models if not is_pictures(source)]


def draw_pictures(args: argparse.Namespace, accelerator: Accelerator, prompts: list[str]) -> list:
    """Return the pictures of each of --models; the pipeline is loaded if one of them needs it."""

    def load():
        if args.pretrained_model_name_or_path is None:
            raise InputError("`models`: a LoRA and none need `pretrained_model_name_or_path`")
        on_main(accelerator, check_writable, Path(args.output_dir))
        kwargs = {name: getattr(args, name) for name in ("revision", "variant", "cache_dir")}
        source = args.pretrained_model_name_or_path
        return load_generator(accelerator, source, args.resolution, not args.disable_safety_checker, **kwargs)

    captions = ("caption_column", "caption_template", "default_caption", "on_missing_caption", "background")
    settings = ("seed", "resolution", "num_inference_steps", "guidance_scale")
    return draw_models(
        accelerator,
        expand_models(args.models, SEEDS),
        cycle_prompts(prompts, args.num_images or len(prompts)),
        load,
        args.output_dir,
        caption_options={name: getattr(args, name) for name in captions},
        batch_size=args.generation_batch_size,
        **{name: getattr(args, name) for name in settings},
    )
