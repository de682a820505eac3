"""Measure what backbones and embedders make of drawings, and what models draw.

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
(section 4.1, Table 2, Figure 3). Features are kept on disk and are not computed twice, except by transfer.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from ..extras import require

require("eval")

from accelerate import Accelerator
from accelerate.logging import get_logger

from ..cli.arguments import Parser, at_least
from ..cli.console import print_result
from ..cli.entry import run
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
from ..evaluation.prompts import cycle_prompts, read_prompts
from ..evaluation.retrieval import rank_models
from ..evaluation.sampling import draw_models, is_pictures
from ..evaluation.set_distances import load_features
from ..evaluation.tables import Report, expand_models, write_json
from ..evaluation.transfer import compare_styles
from ..figures import write_figure
from ..measures.image_quality import check_installed
from ..networks.backbone import BUNDLED, AttentionVGG16
from ..training.cards import hub_id, set_section
from ..training.distributed import on_main
from ..training.feature_cache import scan_folder
from ..training.options import add_feature_options
from ..training.startup import check_writable, versions

logger = get_logger(__name__, log_level="INFO")

SEEDS = "seed-*/*.safetensors"  # of a folder of LoRAs
RECORDED = """dataset_name train_data_dir group_column validation_share max_train_samples trigger_word
    paired_data_dir part paired_style resolution fit mixed_precision seed pretrained_model_name_or_path prompts
    num_images num_inference_steps guidance_scale""".split()  # the options that stand in the JSON


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="sketch-perceptual evaluate",
        description=__doc__,
    )
    tasks = parser.add_subparsers(dest="task", required=True, parser_class=Parser)
    parsers = {
        name: tasks.add_parser(name, help=text, description=text)
        for name, text in {
            "distance": "distances within and across classes",
            "retrieval": "how well queries find their class in a gallery",
            "transfer": "how near stylised photos come to the true sketches",
            "generation": "how near generated pictures come to drawings and to their prompts",
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
        help="validation: what train_backbone.py with the same data options held out",
    )
    parser.add_argument("--figure", help="write a picture with a bar for each ratio")


def add_retrieval_options(parser: Parser) -> None:
    add_labelled_options(parser, "as queries; what a model of train_retrieval.py held out comes before it")
    parser.add_argument("--figure", help="write a sheet of queries and the five nearest to each")


def add_labelled_options(parser: Parser, role: str) -> None:
    """The options that distance and retrieval share; `role` of the held-out drawings."""
    add = add_class_options(parser, role)
    parser.set_defaults(background=None)
    add_embedder_options(add)
    add = parser.group("evaluation")
    add(
        "--models",
        nargs="+",
        default=[f"bundled={BUNDLED}"],
        metavar="[NAME=]MODEL",
        help="a backbone, an embedder, a folder of train_retrieval.py with one a seed, VGG-16 weights, imagenet or"
        " bundled",
    )
    add("--seed", type=at_least(0), default=0, help="of --max_train_samples and of what the sheet shows")
    add("--output", default=f"{parser.prog.split()[-1]}.json", help="all results, as JSON")


def add_transfer_options(add: Callable) -> None:
    add("--paired_data_dir", required=True, help="CUFS, FS2K or another paired set: see sketch_perceptual.data.paired")
    add("--part", choices=("test", "train", "all"), default="test", help="photos that are compared")
    add("--paired_style", type=int, choices=(1, 2, 3), help="of FS2K")
    add("--models", nargs="+", required=True, metavar="[NAME=]MODEL", help="folders or Hub ids of train_johnson.py")
    add("--resolution", type=at_least(32), default=256, help="size of the square photos and sketches, in pixels")
    add("--fit", choices=("crop", "pad"), default="crop", help="how images that are not square are made square")
    add("--background", default="white", help="colour behind transparent pictures")
    add("--inception_weights", help=".safetensors of FID's Inception; without it, the features of --backbone")
    add("--backbone", default=str(BUNDLED), help="for the Frechet distance that takes FID's place")
    add_precision(add)
    add("--seed", type=at_least(0), default=0, help="of what the sheet shows")
    add("--output", default="transfer.json", help="all results, as JSON")
    add("--figure", help="write a sheet of photos, true sketches and what each model makes of them")


def add_generation_options(parser: Parser) -> None:
    add = add_caption_options(parser)
    add("--resolution", type=at_least(32), default=512, help="of what is drawn and of what is compared, in pixels")
    add("--fit", choices=("crop", "pad"), default="crop", help="how images that are not square are made square")
    add = parser.group("generation")
    add_pipeline_options(add, required=False)
    add(
        "--models",
        nargs="+",
        required=True,
        metavar="[NAME=]MODEL",
        help="a LoRA (folder, Hub id, .safetensors), a folder of seed-*/ with one each, a folder of captioned"
        " pictures, or none: the pipeline alone",
    )
    add("--prompts", help="a text file with a prompt a line; default: the captions of the drawings, shuffled")
    add("--num_images", type=at_least(2), help="of each model; default: one a prompt")
    add("--output_dir", default="generated", help="one folder for each model; existing pictures are reused")
    add("--num_inference_steps", type=at_least(1), default=30, help="steps of the sampler")
    add("--guidance_scale", type=at_least(0.0, float), default=7.5, help="how closely pictures follow their prompts")
    add("--generation_batch_size", type=at_least(1), default=4, help="batch size of the pipeline")
    add("--disable_safety_checker", action="store_true", help="what it flags becomes black and is not scored")
    add("--seed", type=at_least(0), default=0, help="of the noise, with the prompt; of the shuffled prompts")
    add_precision(add)
    add = parser.group("evaluation")
    add("--backbone", default=str(BUNDLED), help="of the Frechet distance and the nearest drawing")
    add("--inception_weights", help=".safetensors of FID's Inception, for FID and KID")
    add("--clip_model", help="a CLIP of transformers, for the CLIP score, e.g. openai/clip-vit-large-patch14")
    add("--classifier", help="a network of train_backbone.py, for the share of pictures that show their class")
    add_workers(add)
    add_feature_options(add)
    add("--output", default="generation.json", help="all results, as JSON")
    add("--figure", help="write a sheet of prompts, what each model draws for them, and the drawing nearest to that")
    add("--write_scores", action="store_true", help="put the table into the card of each of --models that has one")


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
    """Files first: whoever reads the table may stop at any line."""
    options = {name: getattr(args, name) for name in RECORDED if name in args}
    record = {"task": args.task, "data": options | report.data, "models": report.results, "versions": versions()}
    write_json(args.output, record)
    try:
        if args.figure and report.draw:
            write_figure(args.figure, report.draw())
    finally:
        print_result(f"{report.table()}\n{shown(args.output)}")
    if vars(args).get("write_scores"):
        write_scores(args, report)


def write_scores(args: argparse.Namespace, report: Report) -> None:
    """Into the cards of the models; one that is trained further has a new card without."""
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
    """The drawings, the models, and what extracts features."""
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
    drawings = read_pictures(accelerator, data, "the drawings", args.on_bad_image)
    prompts = read_prompts(args.prompts) if args.prompts else shuffled_captions(drawings, args.seed)
    names = ("backbone", "inception_weights", "clip_model", "classifier", "resolution", "fit", "background")
    extractors = load_extractors(**{name: getattr(args, name) for name in names})
    drawn = draw(args, accelerator, prompts)
    report = score_models(accelerator, drawings, drawn, extractors, extractor(args, accelerator), args.on_bad_image)
    if report is not None:
        report.data["distinct_prompts"] = len(set(prompts))
    return report


def drawn_folders(args: argparse.Namespace) -> list[Path]:
    """The folders in `output_dir` that keep what the models draw."""
    models = expand_models(args.models, SEEDS)
    return [Path(args.output_dir, name) for name, source in models if not is_pictures(source)]


def draw(args: argparse.Namespace, accelerator: Accelerator, prompts: list[str]) -> list:
    """The pictures of each of --models; the pipeline is loaded if one of them is not a folder of pictures."""

    def load():
        if args.pretrained_model_name_or_path is None:
            raise InputError("`models`: a LoRA and none need `pretrained_model_name_or_path`")
        on_main(accelerator, check_writable, Path(args.output_dir))
        place = {name: getattr(args, name) for name in ("revision", "variant", "cache_dir")}
        source = args.pretrained_model_name_or_path
        return load_generator(accelerator, source, args.resolution, not args.disable_safety_checker, **place)

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
