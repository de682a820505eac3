#!/usr/bin/env python
"""Measure what backbones and embedders make of drawings, and find drawings with them.

    accelerate launch evaluate.py distance --train_data_dir ImageNet-Sketch/sketch \
      --models neither=imagenet tuned=vgg16-tuned/best both=attention-vgg16/best --figure ratios.png
    accelerate launch evaluate.py retrieval --train_data_dir ImageNet-Sketch/sketch \
      --models neither=imagenet-retrieval both=sketch-retrieval --figure nearest.png
    accelerate launch evaluate.py transfer --paired_data_dir FS2K --paired_style 1 --models both=sketch-style
    accelerate launch evaluate.py generation --train_data_dir drawings \
      --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
      --models base=none lora=sketch-lora --figure generation.png
    python evaluate.py search --query fox.png --gallery drawings --figure found.png

distance: mean cosine distances within and across classes over all pairs, and their ratio (Seo 2025, section 4.3,
Table 4, Figure 4). retrieval: a gallery is ranked for queries that share no copy with it (section 4.2, Table 3).
transfer: photos through networks of train_johnson.py are compared with the true sketches (section 4.1, Table 1,
Figure 2). generation: pictures for prompts, by a pipeline with adapters or from folders, are compared with drawings
(section 4.1, Table 2, Figure 3). search: the drawings of a folder that are most like one. What networks say of a
drawing is kept on disk and is not computed twice, except by transfer.
"""

import argparse
import hashlib
import json
import math
import os
import statistics
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from sketch_perceptual.data.captions import captioned_folder
from sketch_perceptual.data.checks import Scan, drop_bad, read_keys, read_once, scan_images
from sketch_perceptual.data.class_names import class_names
from sketch_perceptual.data.folders import find_images
from sketch_perceptual.data.image_sets import CaptionedImages, Images, LabelledImages
from sketch_perceptual.data.images import fit_image, load_image, to_pil, to_tensor
from sketch_perceptual.data.options import (
    add_caption_options,
    add_class_options,
    check_caption_options,
    check_class_options,
    load_captioned,
    load_labelled,
)
from sketch_perceptual.data.paired import Pairs, find_pairs
from sketch_perceptual.data.splits import describe_split, split, split_hash
from sketch_perceptual.errors import InputError, first_line
from sketch_perceptual.evaluation.pipelines import add_pipeline_options, load_pipeline
from sketch_perceptual.evaluation.prompts import cycle_prompts, draw_prompts, find_classes, open_folder, read_prompts
from sketch_perceptual.figures import mark, ratio_bars, sheet
from sketch_perceptual.measures.class_distances import ClassDistances
from sketch_perceptual.measures.image_quality import (
    ClipFeatures,
    InceptionFeatures,
    check_installed,
    frechet_distance,
    kernel_distance,
    ssim,
)
from sketch_perceptual.measures.ink import chroma, ink, is_black
from sketch_perceptual.measures.ranking import most_alike, rank, search
from sketch_perceptual.networks.backbone import BUNDLED, load_backbone
from sketch_perceptual.networks.embedder import EMBEDDINGS, SketchEmbedder, load_embedder, make_embedder
from sketch_perceptual.networks.hub_model import fingerprint
from sketch_perceptual.networks.johnson import JohnsonNet, load_johnson
from sketch_perceptual.running.feature_cache import FeatureCache, extract_features, open_cache
from sketch_perceptual.running.options import add_feature_options, at_least
from sketch_perceptual.running.startup import PATIENCE, check_writable, run, start_logging, versions
from sketch_perceptual.seeds import generator

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

logger = get_logger(__name__, log_level="INFO")

KERNELS = {"fid": "kid", "frechet": "kernel"}  # the distance of sets, and what is less biased in small ones
FEW = 2048  # as many numbers as Inception's features have: fewer pictures have no full covariance
SHEET_ROWS, SHEET_COLUMNS = 12, 6
SHEET_SIZE = 160  # pixels a picture


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    about = {
        "distance": "distances within and across classes",
        "retrieval": "how well queries find their class in a gallery",
        "transfer": "how near stylised photos come to the true sketches",
        "generation": "how near generated pictures come to drawings and to their prompts",
        "search": "the drawings of a folder that are most like one",
    }
    parsers = {name: tasks.add_parser(name, help=text, description=text) for name, text in about.items()}
    for name in ("distance", "retrieval"):
        add = add_class_options(parsers[name], "as queries" if name == "retrieval" else "for --subset validation")
        add_common_options(add)
        add = parsers[name].add_argument_group("evaluation").add_argument
        add(
            "--models",
            nargs="+",
            default=[f"bundled={BUNDLED}"],
            metavar="[NAME=]MODEL",
            help="a backbone, an embedder, a folder of train_retrieval.py with one a seed, VGG-16 weights or imagenet",
        )
        add("--seed", type=at_least(0), default=0, help="of --max_train_samples and of what the sheet shows")
        add("--output", default=f"{name}.json", help="all figures, as JSON")
    parsers["distance"].add_argument(
        "--subset",
        choices=("all", "validation"),
        default="all",
        help="validation: what train_backbone.py with the same data options kept apart",
    )
    parsers["distance"].add_argument("--figure", help="write a picture with a bar for each ratio")
    parsers["retrieval"].add_argument("--figure", help="write a sheet of queries and the five nearest to each")
    add = parsers["transfer"].add_argument
    add("--paired_data_dir", required=True, help="CUFS, FS2K or another paired set: see sketch_perceptual.paired")
    add("--part", choices=("test", "train", "all"), default="test")
    add("--paired_style", type=int, choices=(1, 2, 3), help="of FS2K")
    add("--models", nargs="+", required=True, metavar="[NAME=]MODEL", help="folders or Hub ids of train_johnson.py")
    add("--resolution", type=at_least(32), default=256, help="photos and sketches become this wide and high")
    add("--fit", choices=("crop", "pad"), default="crop", help="how what is not square becomes so")
    add("--background", default="white", help="colour behind transparent pictures")
    add("--inception_weights", help=".safetensors of FID's Inception; without it, the features of --backbone")
    add("--backbone", default=str(BUNDLED), help="for the Frechet distance that takes FID's place")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: what accelerate was told")
    add("--seed", type=at_least(0), default=0, help="of what the sheet shows")
    add("--output", default="transfer.json", help="all figures, as JSON")
    add("--figure", help="write a sheet of photos, true sketches and what each model makes of them")
    add_generation_options(parsers["generation"])
    add = parsers["search"].add_argument
    add("--query", required=True, help="a picture")
    add("--gallery", required=True, help="a folder of pictures, searched with all its folders")
    add("--model", default=str(BUNDLED), help="an embedder, a backbone, VGG-16 weights or imagenet")
    add("--count", type=at_least(1), default=10, help="how many to show")
    add("--figure", help="write the query and what was found as a picture")
    add("--on_bad_image", choices=("error", "skip"), default="error", help="what to do with unreadable images")
    add("--background", default="white", help="colour behind transparent drawings")
    add_common_options(add)
    args = parser.parse_args(argv)
    if args.task in ("distance", "retrieval"):
        check_class_options(parsers[args.task], args)
    if args.task == "generation":
        check_caption_options(parsers[args.task], args)
    return args


def add_common_options(add: Callable) -> None:
    add("--embedding", choices=EMBEDDINGS, help="default: an embedder's own, of a backbone the pooled last map")
    add("--resolution", type=at_least(32), help="in pixels; default: an embedder's own, of a backbone 224")
    add("--fit", choices=("pad", "crop"), help="default: an embedder's own, of a backbone pad")
    add("--dataloader_num_workers", type=at_least(0), default=0, help="processes that read images; 0 is the main one")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: what accelerate was told")
    add_feature_options(add)


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    add = add_caption_options(parser)
    add("--resolution", type=at_least(32), default=512, help="of what is drawn and of what is compared, in pixels")
    add("--fit", choices=("crop", "pad"), default="crop", help="how what is not square becomes so")
    add = parser.add_argument_group("generation").add_argument
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
    add("--output_dir", default="generated", help="pictures are kept here and drawn once, in a folder a model")
    add("--num_inference_steps", type=at_least(1), default=30)
    add("--guidance_scale", type=at_least(0.0, float), default=7.5)
    add("--generation_batch_size", type=at_least(1), default=4, help="pictures a pass of the pipeline")
    add("--disable_safety_checker", action="store_true", help="what it flags becomes black and is not scored")
    add("--seed", type=at_least(0), default=0, help="of the noise, with the prompt; of the shuffled prompts")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: what accelerate was told")
    add = parser.add_argument_group("evaluation").add_argument
    add("--backbone", default=str(BUNDLED), help="of the Frechet distance and the nearest drawing")
    add("--inception_weights", help=".safetensors of FID's Inception, for FID and KID")
    add("--clip_model", help="a CLIP of transformers, for the CLIP score, e.g. openai/clip-vit-large-patch14")
    add("--classifier", help="a network of train_backbone.py, for the share of pictures that show their class")
    add("--dataloader_num_workers", type=at_least(0), default=0, help="processes that read images; 0 is the main one")
    add_feature_options(add)
    add("--output", default="generation.json", help="all figures, as JSON")
    add("--figure", help="write a sheet of prompts, what each model draws for them, and the drawing nearest to that")


def main(args: argparse.Namespace) -> None:
    try:
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)]
        )
    except ValueError as error:
        raise InputError(f"accelerate refuses --mixed_precision: {error}") from error
    start_logging(accelerator)
    for option, ending in (("figure", ".png"), ("output", ".json")):
        if path := vars(args).get(option):
            check_file(f"--{option}", Path(path), ending)
    tasks = {"distance": distance, "retrieval": retrieval, "transfer": transfer, "generation": generation}
    (tasks | {"search": find})[args.task](args, accelerator)
    accelerator.end_training()


def check_file(option: str, path: Path, ending: str) -> None:
    """InputError if what will be found could not be written there."""
    if path.suffix != ending:
        raise InputError(f"{option} {path} must end in {ending}")
    if path.is_dir() or not os.access(path.resolve().parent, os.W_OK):
        raise InputError(f"{option} {path} cannot be written")


def distance(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Table 4: intra, inter and ratio of each model, on all drawings or on those kept apart."""
    data = load_labelled(args, accelerator)
    data, keys, copies = read_once(args, accelerator, data)
    about = {"copies": len(copies) - len(set(copies))}
    if args.subset == "validation":
        sides = split(data.labels, keys, copies, data.groups, args.validation_share)
        about |= {"split": split_hash(describe_split(args, sides, keys))}
        data, keys = data.select(sides.validation), [keys[row] for row in sides.validation]
    labels, runs = torch.tensor(data.labels), []
    for model, embedder, cache in embedders(args, accelerator, data, keys):
        distances = ClassDistances(len(data.classes))
        for positions, features in cache.parts(keys):
            distances.update(embedder.project(features.to(accelerator.device)), labels[positions])
        runs.append(model | vars(distances.compute()))
    if not runs:
        return
    counts = runs[0]["counts"]
    about |= {"images": len(data), "classes": sum(count > 0 for count in counts), "alone": counts.count(1)}
    about["class_names"] = class_names(data.classes)
    if about["alone"]:
        logger.info(f"classes of one drawing, which have no distance within: {about['alone']}")
    results = summarize(runs)
    print_table(results, {"embedding": "", "intra": ".3f", "inter": ".3f", "ratio": ".2f"})
    write_results(args, about, results)
    if args.figure:
        ratios = {name: result["mean"]["ratio"] for name, result in results.items()}
        ratio_bars(ratios, f"{len(data)} drawings of {about['classes']} classes").savefig(args.figure, dpi=150)


def retrieval(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Table 3: how well queries find their class in the gallery, for each model."""
    data = load_labelled(args, accelerator)
    data, keys, copies = read_once(args, accelerator, data)
    sides = split(data.labels, keys, copies, data.groups, args.validation_share)
    logger.info(sides.summary)
    queries, gallery = (
        Side(data.select(rows), [keys[row] for row in rows], [copies[row] for row in rows])
        for rows in (sides.validation, sides.train)
    )
    used = sorted(sides.train + sides.validation)
    runs, nearest = [], {}
    for model, embedder, cache in embedders(args, accelerator, data.select(used), [keys[row] for row in used]):
        ranking = rank(
            embed_cached(accelerator, embedder, cache, queries.keys),
            embed_cached(accelerator, embedder, cache, gallery.keys),
            queries.data.labels,
            gallery.data.labels,
            queries.ids,
            gallery.ids,
        )
        runs.append(model | ranking.scores)
        nearest.setdefault(model["name"], ranking.nearest)
    if not runs:
        return
    if unmatched := runs[0]["unmatched"]:
        logger.info(f"queries without a drawing of their class in the gallery, which do not count: {unmatched}")
    results = summarize(runs)
    columns = {"top1": ".1%", "top5": ".1%", "map": ".3f", "recall@10": ".1%", "recall@50": ".1%"}
    print_table(results, {"embedding": ""} | columns)
    about = {"queries": len(queries.keys), "gallery": len(gallery.keys), "classes": len(set(data.labels))}
    about |= {"left_out": len(sides.left_out), "split": split_hash(describe_split(args, sides, keys))}
    write_results(args, about, results)
    if args.figure:
        query_sheet(args, queries.data, gallery.data, nearest).save(args.figure)


def transfer(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Table 1: how near each model's drawings come to the true sketches, in pairs and as a set."""
    pairs = find_pairs(args.paired_data_dir, None if args.part == "all" else args.part, args.paired_style)
    logger.info(pairs.summary)
    if len(pairs.names) < 2:
        raise InputError(f"--paired_data_dir {args.paired_data_dir}: one pair is no set to compare")
    if args.inception_weights:
        kind, judge = "fid", InceptionFeatures(args.inception_weights).to(accelerator.device)
        judged_by = f"Inception {fingerprint(judge)} at 299 px"
    else:
        embedder = make_embedder(load_backbone(args.backbone, "none")).to(accelerator.device)
        kind, judge = "frechet", embedder.features
        judged_by = f"the pooled last map of VGG-16 {embedder.feature_key.split('-')[0]} at {args.resolution} px"
    networks = [(name, load_johnson(path).to(accelerator.device).eval()) for name, path in expand_models(args.models)]

    found = []  # index, features of the sketch, SSIM of the baselines; each model's SSIM, shuffled SSIM, features
    mine = range(len(pairs.names))[accelerator.process_index :: accelerator.num_processes]
    for index in tqdm(mine, "Pairs", disable=None if accelerator.is_main_process else True):
        photo, sketch, other = (
            read_square(args, path)[None].to(accelerator.device)
            for path in (pairs.photos[index], pairs.sketches[index], pairs.sketches[(index + 1) % len(pairs.names)])
        )
        baselines = [float(ssim(picture, sketch)) for picture in (torch.ones_like(sketch), photo)]
        drawings = [draw(accelerator, network, photo) for _, network in networks]
        scores = [(float(ssim(x, sketch)), float(ssim(x, other)), judge(x).cpu()) for x in drawings]
        found.append((index, judge(sketch).cpu(), baselines, scores))
    found = sorted(gather_object(found), key=lambda item: item[0])
    if not accelerator.is_main_process:
        return
    _, reference, baselines, scores = zip(*found, strict=True)
    runs = [
        {"name": name, "ssim": statistics.fmean(values)}
        for name, values in zip(("blank page", "the photo"), zip(*baselines, strict=True), strict=True)
    ]
    for (name, network), own in zip(networks, zip(*scores, strict=True), strict=True):
        paired, shuffled, features = zip(*own, strict=True)
        run = {"name": name, "weights": fingerprint(network), "ssim": statistics.fmean(paired)}
        run["ssim_shuffled"] = statistics.fmean(shuffled)
        runs.append(run | set_distances(kind, torch.cat(features), torch.cat(reference)))
    results = summarize(runs)
    print_table(results, {"ssim": ".3f", "ssim_shuffled": ".3f", kind: ".4g", KERNELS[kind]: ".3g"})
    say_of_sets(kind, len(found), len(found), judged_by)
    write_results(args, {"pairs": len(found), "layout": pairs.summary, "judged_by": judged_by}, results)
    if args.figure:
        transfer_sheet(args, accelerator, pairs, networks).save(args.figure)


def set_distances(kind: str, features: Tensor, reference: Tensor) -> dict[str, float]:
    """Frechet and kernel distance; NaN, and said, for drawings that are all the same."""
    mean, deviation = kernel_distance(features, reference)
    try:
        frechet = frechet_distance(features, reference)
    except InputError as error:
        logger.warning(f"no {kind}: {error}")
        frechet = math.nan
    return {kind: frechet, KERNELS[kind]: mean, f"{KERNELS[kind]}_deviation": deviation}


def say_of_sets(kind: str, drawn: int, true: int, judged_by: str) -> None:
    logger.info(f"{kind} of {drawn} drawings and {true} true ones, by {judged_by}")
    if drawn < FEW:
        logger.warning(f"{kind} of fewer than {FEW} pictures is too large: compare it at this number only")


def read_square(args: argparse.Namespace, path: Path) -> Tensor:
    """(3, resolution, resolution) in [-1, 1]."""
    return to_tensor(fit_image(load_image(path, args.background), args.resolution, args.fit, args.background))


@torch.no_grad()
def draw(accelerator: Accelerator, network: JohnsonNet, photo: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1], as it can be saved."""
    with accelerator.autocast():
        return network(photo).float().clamp(-1, 1)


def transfer_sheet(args: argparse.Namespace, accelerator: Accelerator, pairs: Pairs, networks: list) -> Image.Image:
    """Figure 2: some photos, their true sketches, and what each network makes of them."""
    shown = torch.randperm(len(pairs.names), generator=generator(args.seed, "sheet"))[:SHEET_COLUMNS].tolist()
    photos, sketches = ([read_square(args, of[index]) for index in shown] for of in (pairs.photos, pairs.sketches))
    rows = {"photo": photos, "true sketch": sketches}
    for name, network in networks:
        rows[name] = [draw(accelerator, network, photo[None].to(accelerator.device))[0] for photo in photos]
    return sheet({name: list(map(to_pil, row)) for name, row in rows.items()}, size=SHEET_SIZE)


@dataclass(frozen=True)
class Pictures:
    """Captioned pictures, none of them black, with the keys of their features."""

    data: CaptionedImages
    keys: list[str]
    black: int
    chroma: float
    ink: float

    @property
    def captions(self) -> list[list[str]]:
        return [self.data.captions[row] for row in self.data.rows]


def generation(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Table 2: what each model draws for the prompts, as a set, against its prompts, and how colourful it is."""
    check_installed()
    drawings = look_at(args, accelerator, load_captioned(args, accelerator), "the drawings")
    if args.prompts:
        prompts = read_prompts(args.prompts)
    else:
        captions = list(dict.fromkeys(caption for of in drawings.captions for caption in of))
        order = torch.randperm(len(captions), generator=generator(args.seed, "prompts"))
        prompts = [captions[index] for index in order]
    judges = load_judges(args)
    drawn = draw_models(args, accelerator, cycle_prompts(prompts, args.num_images or len(prompts)))
    about, true = score(args, accelerator, judges, drawings)
    runs, alike = [{"name": "the drawings"} | about], {}
    for name, model, data in drawn:
        pictures = look_at(args, accelerator, data, name)
        scores, features = score(args, accelerator, judges, pictures)
        if not accelerator.is_main_process:
            continue
        for kind in KERNELS:
            if kind in judges:
                scores |= set_distances(kind, features[kind], true[kind])
        similar = most_alike(features["frechet"], true["frechet"])
        same = [of[0] in drawings.captions[index] for of, index in zip(pictures.captions, similar, strict=True)]
        runs.append({"name": name} | model | scores | {"nearest_same": statistics.fmean(same)})
        alike.setdefault(name, (pictures, similar))
    if not accelerator.is_main_process:
        return
    results = summarize(runs)
    columns = {"images": "", "frechet": ".4g", "kernel": ".3g", "fid": ".4g", "kid": ".3g", "clip": ".2f"}
    columns |= {"accuracy": ".1%", "nearest_same": ".1%", "chroma": ".3f", "ink": ".3f"}
    print_table(results, {name: form for name, form in columns.items() if any(name in run for run in runs)})
    judged_by = {kind: f"{type(judge).__name__} {judge.feature_key}" for kind, judge in judges.items()}
    for kind in KERNELS:
        if kind in judges:
            say_of_sets(kind, min(run["images"] for run in runs[1:]), len(drawings.keys), judged_by[kind])
    write_results(args, {"drawings": len(drawings.keys), "distinct_prompts": len(set(prompts))} | judged_by, results)
    if args.figure:
        generation_sheet(args, drawings, alike).save(args.figure)


def score(
    args: argparse.Namespace, accelerator: Accelerator, judges: dict[str, nn.Module], pictures: Pictures
) -> tuple[dict, dict[str, Tensor]]:
    """On the main process what can be said of the pictures alone, and what each of the networks says of them."""
    caches = {
        kind: extract_features(args, accelerator, judge, pictures.data, pictures.keys)
        for kind, judge in judges.items()
    }
    if not accelerator.is_main_process:
        return {}, {}
    features = {kind: cache.read(pictures.keys) for kind, cache in caches.items()}
    found = {"images": len(pictures.keys), "black": pictures.black, "chroma": pictures.chroma, "ink": pictures.ink}
    prompts = [of[0] for of in pictures.captions]
    if "clip" in judges:
        cosines = F.cosine_similarity(features["clip"], judges["clip"].texts(prompts))
        found |= {"clip": float(100 * cosines.clamp(min=0).mean()), "clip_cosine": float(cosines.mean())}
    if "class" in judges:
        logits = judges["class"].project(features["class"].to(accelerator.device))
        named = find_classes(prompts, judges["class"].backbone.classes)
        right = [label in of for label, of in zip(logits.argmax(1).tolist(), named, strict=True) if of]
        found |= {"accuracy": statistics.fmean(right) if right else math.nan, "with_class": len(right)}
    return found, features


def load_judges(args: argparse.Namespace) -> dict[str, nn.Module]:
    """The networks that look at the pictures, by what they are for."""
    looks = {"resolution": min(224, args.resolution), "fit": args.fit, "background": args.background}
    judges = {"frechet": make_embedder(load_backbone(args.backbone, "none"), **looks)}
    if args.inception_weights:
        judges["fid"] = InceptionFeatures(args.inception_weights, args.resolution, args.fit)
    if args.clip_model:
        judges["clip"] = ClipFeatures(args.clip_model, args.resolution, args.fit)
    if args.classifier:
        classifier = load_backbone(args.classifier, "none")
        if not classifier.classes:
            raise InputError(f"--classifier {args.classifier} has no classes; train_backbone.py makes one that has")
        judges["class"] = make_embedder(classifier, embedding="logits", **looks)
    return judges


def draw_models(
    args: argparse.Namespace, accelerator: Accelerator, prompts: list[tuple[str, int]]
) -> list[tuple[str, dict, CaptionedImages]]:
    """Name, what it is, and the captioned pictures of each of `--models`; what is on disk is not drawn again."""
    found, pipeline, folders = [], None, set()
    names = ("caption_column", "caption_template", "background")
    for name, source in expand_models(args.models, "seed-*/*.safetensors"):
        model = {"model": Path(source).name}
        if is_pictures(source):
            found.append(
                (name, model, captioned_folder(source, **{option: getattr(args, option) for option in names}))
            )
            continue
        folder = Path(args.output_dir, name, model["model"] if model["model"].startswith("seed-") else "")
        if folder in folders:
            raise InputError(f"--models: two are called {name}; write NAME=MODEL")
        folders.add(folder)
        pipeline = pipeline or load_generator(args, accelerator)
        if source != "none":
            load_adapter(pipeline, source)
        paths, weights = draw_missing(args, accelerator, pipeline, folder, prompts)
        if source != "none":
            pipeline.unload_lora_weights()
        captions = [prompt for prompt, _ in prompts]
        found.append((name, model | weights, CaptionedImages(paths, list(map(str, paths)), captions)))
    return found


def draw_missing(
    args: argparse.Namespace,
    accelerator: Accelerator,
    pipeline: "StableDiffusionPipeline",
    folder: Path,
    prompts: list[tuple[str, int]],
) -> tuple[list[Path], dict[str, str]]:
    """The paths of the pictures for the prompts, which the processes draw together, and the weights that drew them."""
    names = ("seed", "resolution", "num_inference_steps", "guidance_scale")
    options = {name: getattr(args, name) for name in names}
    weights = {part: fingerprint(getattr(pipeline, part)) for part in ("unet", "text_encoder", "vae")}
    settings = weights | options | {"scheduler": type(pipeline.scheduler).__name__}
    settings |= {"safety_checker": pipeline.safety_checker is not None, "mixed_precision": accelerator.mixed_precision}
    paths = open_folder(folder, prompts, settings) if accelerator.is_main_process else None
    paths = broadcast_object_list([paths])[0]
    missing = [index for index, path in enumerate(paths) if not path.is_file()]
    accelerator.wait_for_everyone()  # nobody draws before all have looked
    starts = range(0, len(missing), args.generation_batch_size)
    batches = [missing[start : start + args.generation_batch_size] for start in starts]
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    for batch in tqdm(mine, f"Drawing {folder}", disable=None if accelerator.is_main_process else True):
        with accelerator.autocast():
            draw_prompts(pipeline, [prompts[index] for index in batch], [paths[index] for index in batch], **options)
    accelerator.wait_for_everyone()
    return paths, weights


def is_pictures(source: str) -> bool:
    return Path(source).is_dir() and not any(Path(source).glob("*.safetensors"))


def load_generator(args: argparse.Namespace, accelerator: Accelerator) -> "StableDiffusionPipeline":
    if args.pretrained_model_name_or_path is None:
        raise InputError("--models: a LoRA and none need --pretrained_model_name_or_path")
    check_writable(Path(args.output_dir))
    unchecked = {"safety_checker": None, "requires_safety_checker": False} if args.disable_safety_checker else {}
    pipeline = load_pipeline(args, accelerator, **unchecked)
    if pipeline.safety_checker is not None:
        pipeline.safety_checker.to(pipeline.device, pipeline.unet.dtype)
    pipeline.unet.eval()
    return pipeline


def load_adapter(pipeline: "StableDiffusionPipeline", source: str) -> None:
    try:
        pipeline.load_lora_weights(source, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(
            f"--models {source} does not load into the pipeline as a LoRA: {first_line(error)}"
        ) from error
    if not pipeline.get_list_adapters():
        raise InputError(f"--models {source} holds no LoRA that this pipeline knows")


def look_at(args: argparse.Namespace, accelerator: Accelerator, data: CaptionedImages, name: str) -> Pictures:
    """Each picture is read once; those that are black all over are counted and left out."""
    looks = {}

    def note(index: int, image: Image.Image) -> None:
        looks[index] = is_black(image), chroma(image), ink(image)

    data, keys = read_keys(args, accelerator, data, note)
    looks = broadcast_object_list([[looks[index] for index in sorted(looks)]])[0]
    seen = [index for index, (black, _, _) in enumerate(looks) if not black]
    if black := len(looks) - len(seen):
        logger.warning(f"{name}: {black} of {len(looks)} pictures are black all over and are not scored")
    if len(seen) < 2:
        raise InputError(f"{name}: {len(seen)} pictures are no set to score")
    colour, dark = (statistics.fmean(looks[index][which] for index in seen) for which in (1, 2))
    return Pictures(data.select(seen), [keys[index] for index in seen], black, colour, dark)


def generation_sheet(
    args: argparse.Namespace, drawings: Pictures, alike: dict[str, tuple[Pictures, list[int]]]
) -> Image.Image:
    """Figure 3: prompts by models, beside each picture the drawing nearest to it, which shows that it is no copy."""
    rows = {}
    for name, (pictures, similar) in alike.items():
        for index, (caption, *_) in enumerate(pictures.captions):
            row = rows.setdefault(caption, {})
            row.setdefault(name, [pictures.data.image(index), drawings.data.image(similar[index])])
    rows = {caption: row for caption, row in rows.items() if len(row) == len(alike)}
    if not rows:
        raise InputError("--figure: the models have no prompt in common")
    shown = {
        textwrap.shorten(caption, 40): [pad(picture, args.background) for pair in row.values() for picture in pair]
        for caption, row in islice(rows.items(), SHEET_ROWS)
    }
    return sheet(shown, [head for name in alike for head in (name, "nearest drawing")], SHEET_SIZE)


def find(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Print and draw what in the gallery is nearest to the query; the query itself is named, not ranked."""
    embedder = load_embedder(args.model, **embedder_options(args))
    query = load_image(args.query, args.background)
    paths = [Path(args.gallery, image) for image in find_images(Path(args.gallery), "--gallery")[1]]
    with ThreadPoolExecutor(8) as pool:
        query_key, *keys = pool.map(file_key, [Path(args.query), *paths])
    for path, key in zip(paths, keys, strict=True):
        if key == query_key and accelerator.is_main_process:
            print(f"the query itself\t{path}")
    data = Images(paths, list(map(str, paths)), args.background)
    new = {keys[index] for index in open_cache(args, accelerator, embedder).missing(keys)}
    unread = [index for index, key in enumerate(keys) if key in new]
    bad = scan_images(accelerator, data.select(unread)).bad if unread else []
    data = drop_bad(data, Scan([(unread[index], message) for index, message in bad], [], 0, ""), args.on_bad_image)
    data = data.select(index for index in range(len(data)) if keys[data.rows[index]] != query_key)
    if not len(data):
        raise InputError(f"--gallery: {args.gallery} holds nothing but the query")
    keys = [keys[row] for row in data.rows]
    cache = extract_features(args, accelerator, embedder, data, keys)
    if not accelerator.is_main_process:
        return
    with accelerator.autocast():
        vector = embedder.to(accelerator.device).embed([query])[0]
    similarities, order = search(vector, embed_cached(accelerator, embedder, cache, keys), args.count)
    for similarity, index in zip(similarities, order, strict=True):
        print(f"{similarity:.4f}\t{data.name(index)}")
    if args.figure:
        row = [pad(picture, args.background) for picture in (query, *map(data.image, order))]
        heads = ["query", *(f"{similarity:.3f}" for similarity in similarities)]
        sheet({Path(args.query).name: row}, heads, SHEET_SIZE).save(args.figure)


@dataclass(frozen=True)
class Side:
    """The queries or the gallery, with the keys of their features and the ids of copies."""

    data: LabelledImages
    keys: list[str]
    ids: list[int]


def embedders(
    args: argparse.Namespace, accelerator: Accelerator, data: LabelledImages, keys: list[str]
) -> Iterator[tuple[dict, SketchEmbedder, FeatureCache]]:
    """For each of `--models` what it is, itself, and its features of `data`; only the main process gets them."""
    for name, source in expand_models(args.models):
        embedder = load_embedder(source, **embedder_options(args))
        cache = extract_features(args, accelerator, embedder, data, keys)
        if not accelerator.is_main_process:
            continue
        settings = {option: getattr(embedder, option) for option in ("embedding", "resolution", "fit", "background")}
        model = {"name": name, "model": Path(source).name, "weights": fingerprint(embedder)} | settings
        yield model, embedder.to(accelerator.device), cache


def expand_models(models: list[str], seeds: str = "seed-*/config.json") -> list[tuple[str, str]]:
    """Name and source of each; a folder with a folder for each of several `seeds` is one of a name for each."""
    found = []
    for model in models:
        name, _, source = model.rpartition("=")
        folders = sorted({path.parent for path in Path(source).glob(seeds)})
        found += [(name or Path(source).name, str(path)) for path in folders or [source]]
    return found


def embedder_options(args: argparse.Namespace) -> dict:
    return {name: getattr(args, name) for name in ("embedding", "resolution", "fit", "background")}


def embed_cached(accelerator: Accelerator, embedder: SketchEmbedder, cache: FeatureCache, keys: list[str]) -> Tensor:
    """(N, D) of length 1, on the CPU, in the order of the keys."""
    embeddings = torch.empty(0)
    for positions, features in cache.parts(keys):
        part = embedder.project(features.to(accelerator.device)).cpu()
        if not len(embeddings):
            embeddings = part.new_empty(len(keys), part.shape[1])
        embeddings[positions] = part
    return embeddings


def summarize(runs: list[dict]) -> dict[str, dict]:
    """Name -> mean over its runs, their deviation if there are several, and the runs."""
    results = {}
    for name in dict.fromkeys(one["name"] for one in runs):
        own = [one for one in runs if one["name"] == name]
        values = {key: [one[key] for one in own] for key, value in own[0].items() if isinstance(value, float)}
        results[name] = {"mean": {key: statistics.fmean(of) for key, of in values.items()}, "runs": own}
        if len(own) > 1:
            results[name]["deviation"] = {key: statistics.stdev(of) for key, of in values.items()}
    return results


def print_table(results: dict[str, dict], columns: dict[str, str]) -> None:
    """One line a model; with several seeds mean and deviation."""
    lines = [["", *columns]]
    for name, result in results.items():
        cells = []
        for column, form in columns.items():
            value = result["mean"].get(column, result["runs"][0].get(column))
            cells.append("" if value is None else format(value, form))
            if column in result.get("deviation", ()):
                cells[-1] += " +- " + format(result["deviation"][column], form)
        lines.append([name, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def write_results(args: argparse.Namespace, about: dict, results: dict[str, dict]) -> None:
    """All that was found, and what it rests on; what is not a number there is null here."""
    names = """dataset_name train_data_dir group_column validation_share max_train_samples paired_data_dir part
        paired_style resolution fit mixed_precision seed pretrained_model_name_or_path prompts num_images
        num_inference_steps guidance_scale"""
    options = {name: getattr(args, name) for name in names.split() if name in args}
    record = {"task": args.task, "data": options | about, "models": results, "versions": versions()}
    text = json.dumps(without_nan(record), indent=1, allow_nan=False)
    Path(args.output).write_text(text, encoding="utf-8")
    print(args.output)


def without_nan(value):
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def query_sheet(
    args: argparse.Namespace, queries: LabelledImages, gallery: LabelledImages, nearest: dict[str, Tensor]
) -> Image.Image:
    """Some queries of different classes, for each a row a model with the five nearest: framed green if right."""
    rows, seen, names = {}, set(), class_names(queries.classes)
    findable = set(gallery.labels)
    for index in torch.randperm(len(queries), generator=generator(args.seed, "sheet")).tolist():
        label = queries.labels[index]
        if label in seen or label not in findable or len(rows) + len(nearest) > max(SHEET_ROWS, len(nearest)):
            continue
        seen.add(label)
        for name, found in nearest.items():
            row = [pad(queries.image(index), args.background)]
            for position in filter(lambda position: position >= 0, found[index].tolist()):
                picture = pad(gallery.image(position), args.background)
                row.append(mark(picture, gallery.labels[position] == label))
            rows[names[label] if len(nearest) == 1 else f"{names[label]}: {name}"] = row
    return sheet(rows, ["query", *"12345"], SHEET_SIZE)


def pad(picture: Image.Image, background: str) -> Image.Image:
    return fit_image(picture, SHEET_SIZE, "pad", background)


def file_key(path: Path) -> str:
    """What a file holds, unread as a picture."""
    try:
        return "file-" + hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


if __name__ == "__main__":
    run(main, parse_args())
