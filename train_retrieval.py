#!/usr/bin/env python
"""Train an embedding head on a frozen backbone, to find drawings by drawings (Seo 2025, section 4.2, Table 3).

    python train_retrieval.py \\
      --train_data_dir ImageNet-Sketch/sketch --backbone attention-vgg16/best --seed 42 --output_dir sketch-retrieval

The classifier of VGG-16 becomes a head of 512 outputs, brought to length 1, and learns by cross-entropy and a tenth of
a triplet loss for 20 epochs; nine tenths of the drawings are trained on and are the gallery, the others are queries.
All is done for five seeds, from `--seed` on. `seed-42/` and its like hold what was trained: they load with
`SketchEmbedder.from_pretrained` and go into `sketch_perceptual.evaluation`; `nearest.png` beside them shows what some
queries find. `metrics.json` has the accuracies, mean and deviation.
"""

import json
import shutil
import statistics
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from sketch_perceptual.extras import require

require("train")

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from huggingface_hub import ModelCardData
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sketch_perceptual.cli import entry
from sketch_perceptual.cli.arguments import Options, Parser, above, at_least
from sketch_perceptual.data.datasets import LabelledImages
from sketch_perceptual.data.loaders import pk_batches
from sketch_perceptual.data.options import add_class_options, check_class_options, load_labelled
from sketch_perceptual.data.preview import fitted, read_data
from sketch_perceptual.data.scan import Contents
from sketch_perceptual.data.splits import Split, describe_split, split, split_hash
from sketch_perceptual.errors import InputError, first_line
from sketch_perceptual.evaluation.retrieval import query_sheet
from sketch_perceptual.files import replacing
from sketch_perceptual.losses.triplet import MINING, triplet_loss
from sketch_perceptual.measures.ranking import Ranking, rank
from sketch_perceptual.networks.backbone import BUNDLED, load_backbone, tuned_resolution
from sketch_perceptual.networks.embedder import SketchEmbedder
from sketch_perceptual.networks.hub_model import fingerprint
from sketch_perceptual.seeds import generator
from sketch_perceptual.training import cards, hub
from sketch_perceptual.training.distributed import on_main
from sketch_perceptual.training.feature_cache import extract_features, scan_folder
from sketch_perceptual.training.identity import digest
from sketch_perceptual.training.options import add_feature_options, add_run_options
from sketch_perceptual.training.run import Run
from sketch_perceptual.training.startup import check_space, dry_run, start, versions
from sketch_perceptual.training.steps import Meter, Steps
from sketch_perceptual.training.trackers import start_trackers, track_images

logger = get_logger(__name__, log_level="INFO")

FILES = ["config.json", "model.safetensors", "README.md", "metrics.json", "split.json"]
QUANTITIES = ("cross_entropy", "triplet_loss", "active_triplets", "embedding_std")
COLLAPSED = 0.1  # deviation of embeddings of length 1: 0 if all are one, nearly 1 if they point everywhere


def parse_args(argv: list[str] | None = None) -> Options:
    parser = Parser(description=__doc__)
    count, rate = at_least(1), at_least(0.0, float)

    add = parser.group("model")
    add(
        "--backbone",
        shared=False,
        default=str(BUNDLED),
        help='a folder or Hub id, a .safetensors with VGG-16 weights, "imagenet" or "bundled"',
    )
    add(
        "--head",
        fixed=True,
        choices=("vgg", "linear"),
        default="vgg",
        help="VGG-16's classifier, or one layer for small data",
    )
    add("--embedding_dim", fixed=True, type=count, default=512)

    add = add_class_options(parser, "the queries; the others are trained on and are the gallery")
    add(
        "--resolution",
        shared=False,
        type=at_least(32),
        help="size of the square drawings in pixels; default: the backbone's",
    )
    add("--fit", choices=("pad", "crop"), default="pad", help="pad to a square, or crop the longer side")
    add_feature_options(add)

    add = add_run_options(parser, output_dir="sketch-retrieval")
    add("--num_seeds", shared=False, type=count, default=5, help="number of trainings, with seeds from --seed on")
    add("--num_train_epochs", shared=False, type=count, default=20)
    add("--train_batch_size", type=count, default=32, help="batch size per process")
    add("--images_per_class", type=count, default=4, help="images per class in a batch; must divide the batch size")
    add("--triplet_weight", type=rate, default=0.1, help="weight of the triplet loss; that of the cross-entropy is 1")
    add("--triplet_margin", type=rate, default=0.2, help="margin of the triplet loss, in cosine distance")
    add("--mining", choices=MINING, default="batch_hard")
    add("--learning_rate", type=above(0), default=1e-4, help="learning rate of Adam")
    add("--lr_step_size", type=count, default=7, help="multiply the learning rate by --lr_gamma every N epochs")
    add("--lr_gamma", type=rate, default=0.1)
    parser.set_defaults(checkpoints_total_limit=1, gradient_accumulation_steps=1)

    args = parser.parse_args(argv)
    check_class_options(parser, args)
    if args.train_batch_size % args.images_per_class:
        parser.error("--train_batch_size must be a multiple of --images_per_class")
    return args


def main(args: Options) -> None:
    if dry_run(args, lambda seed: read_drawings(args, open_data(args, seed))):
        return
    run = start(args)
    accelerator = run.accelerator
    embedder = build_embedder(args)
    gallery, queries, record = load_data(args, run, embedder)
    hub.create_repo(args, run)
    start_trackers(accelerator, "sketch-retrieval", args)

    head = Head(embedder.backbone.classifier, args.embedding_dim, len(record["classes"]))
    optimizer = torch.optim.Adam(head.parameters(), args.learning_rate)
    model, prepared_optimizer = accelerator.prepare(head, optimizer)
    batches = Batches(args, accelerator, gallery, run.seed)
    steps = Steps(accelerator, batches, batches.lengths, seed=run.seed)
    meter = Meter(accelerator)
    logger.info(run_summary(args, run, embedder, head, gallery, queries))
    run.state = {"runs": []} | run.state
    keep_finished_seeds(args, run)
    run.begin(steps, meter, prepared_optimizer, partial(save_head, embedder, head), partial(load_head, embedder, head))

    if accelerator.is_main_process and seed_is_over(args, run):  # the run ended before it was scored
        end_seed(args, run, embedder, head, gallery, queries, record, batches.seed(steps.epoch))
    model.train()
    with run.training():
        for labels, features in steps:
            epoch, seed = steps.epoch % args.num_train_epochs, batches.seed(steps.epoch)
            if epoch == steps.number == 0:
                head.reset(seed)
                optimizer.state.clear()
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * args.lr_gamma ** (epoch // args.lr_step_size)  # StepLR
            draw = generator(seed, "dropout", epoch, steps.number, accelerator.process_index)
            torch.manual_seed(draw.initial_seed())
            embeddings, logits = model(features)
            cross_entropy = F.cross_entropy(logits.float(), labels)
            triplet, active = triplet_loss(embeddings, labels, args.triplet_margin, args.mining)
            accelerator.backward(cross_entropy + args.triplet_weight * triplet)
            spread = (1 - embeddings.detach().mean(0).square().sum()).clamp(min=0).sqrt()
            values = (cross_entropy, triplet, triplet.new_tensor(active), spread)
            meter.add([], {name: value[None] for name, value in zip(QUANTITIES, values, strict=True)})
            run.optimize(model.parameters(), float("inf"))

            steps.advance()
            if steps.at_epoch_end:
                end_epoch(run, seed, epoch + 1)
            if accelerator.is_main_process and seed_is_over(args, run):
                end_seed(args, run, embedder, head, gallery, queries, record, seed)
            run.end_step(save=steps.at_epoch_end)

    with run.finishing():
        if accelerator.is_main_process:
            finish(args, run)
    run.close()
    hub.push(args, run, Path(args.output_dir, f"seed-{run.seed}"), FILES)


class Embedded(NamedTuple):
    """The gallery or the queries: N drawings, their features (N, F) on the CPU, classes and ids of copies (N,)."""

    drawings: LabelledImages
    features: Tensor
    labels: Tensor
    ids: Tensor


def open_data(args, seed: int) -> LabelledImages:
    data = load_labelled(args, seed)
    data.scan_folder = scan_folder(args.feature_dir)
    return data


def read_drawings(args, data: LabelledImages) -> tuple[Contents, Split]:
    """What can be read of the drawings, and how that is split."""
    see = partial(fitted, resolution_of(args), args.fit, args.background)
    scanned = read_data(data, args.on_bad_image, args.figure_data, copies=True, see=see)
    data = data.select(scanned.positions)
    return scanned, split(data.labels, scanned.keys, scanned.copies, data.groups, args.validation_share)


def load_data(args, run: Run, embedder: SketchEmbedder) -> tuple[Embedded, Embedded, dict]:
    """Features of the gallery, which is trained on, and of the held-out queries; the split as it is saved."""
    accelerator = run.accelerator
    data = open_data(args, run.seed)
    (positions, keys, _, copies), result = on_main(accelerator, read_drawings, args, data)
    data = data.select(positions)
    logger.info(result.summary)
    record = describe_split(result, keys, args.validation_share, args.group_column) | {"classes": data.classes}
    rows = digest(zip(keys, (data.classes[label] for label in data.labels), strict=True))
    weights = fingerprint(embedder.backbone.features)
    run.settle(data=f"{len(data)} images {rows}", split=split_hash(record), backbone=weights)
    # Epochs are those of each seed, the finished ones too.
    run.settle(resolution=resolution_of(args), num_train_epochs=args.num_train_epochs)
    cache = extract_features(
        accelerator,
        args.feature_dir,
        embedder,
        data,
        keys,
        batch_size=args.extraction_batch_size,
        num_workers=args.dataloader_num_workers,
    )
    gallery, queries = (
        Embedded(
            data.select(rows),
            cache.read([keys[i] for i in rows]),
            torch.tensor([data.labels[i] for i in rows]),
            torch.tensor([copies[i] for i in rows]),
        )
        for rows in (result.train, result.validation)
    )
    return gallery, queries, record


class Batches:
    """This process's batches (labels (B,), features (B, F)) of the gallery, in one count of epochs over all seeds."""

    def __init__(self, args, accelerator: Accelerator, gallery: Embedded, first_seed: int):
        self.args, self.accelerator, self.gallery, self.first_seed = args, accelerator, gallery, first_seed
        self.lengths = [len(self.rows(epoch)) for epoch in range(args.num_seeds * args.num_train_epochs)]

    def seed(self, epoch: int) -> int:
        return self.first_seed + epoch // self.args.num_train_epochs

    def rows(self, epoch: int) -> list[list[int]]:
        """The first batches come twice where the processes do not divide them."""
        args, processes = self.args, self.accelerator.num_processes
        draw = generator(self.seed(epoch), "order", epoch % args.num_train_epochs)
        classes = args.train_batch_size // args.images_per_class
        batches = pk_batches(self.gallery.labels.tolist(), classes, args.images_per_class, draw)
        return (batches + batches[: -len(batches) % processes])[self.accelerator.process_index :: processes]

    def __call__(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.accelerator.device
        for rows in self.rows(epoch)[first:]:
            yield self.gallery.labels[rows].to(device), self.gallery.features[rows].to(device)


class Head(nn.Module):
    """Features (B, F) -> embeddings (B, D) of length 1 and what a layer on top of them says of the classes."""

    def __init__(self, head: nn.Module, dim: int, classes: int):
        super().__init__()
        self.head, self.classes = head.requires_grad_(True), nn.Linear(dim, classes)

    def reset(self, seed: int) -> None:
        """New weights, which depend on the seed alone."""
        torch.manual_seed(seed)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        embeddings = F.normalize(self.head(features).float())
        return embeddings, self.classes(embeddings)


def resolution_of(args) -> int:
    """What is asked for, or what the backbone was tuned at."""
    return args.resolution or tuned_resolution(args.backbone)


def build_embedder(args) -> SketchEmbedder:
    """The frozen backbone under a new head."""
    backbone = load_backbone(args.backbone, attention="none")
    config = backbone.settings | {"num_classes": args.embedding_dim, "head": args.head, "classes": None}
    embedder = SketchEmbedder(config, "head", resolution_of(args), args.fit, args.background)
    embedder.backbone.features.load_state_dict(backbone.features.state_dict())
    return embedder


def save_head(embedder: SketchEmbedder, head: Head, folder: Path) -> None:
    """The embedder as `from_pretrained` takes it, and the classes' layer."""
    embedder.save_pretrained(folder)
    save_file(head.classes.state_dict(), folder / "classes.safetensors")


def load_head(embedder: SketchEmbedder, head: Head, folder: Path) -> None:
    embedder.load_state_dict(SketchEmbedder.from_pretrained(folder).state_dict())
    head.classes.load_state_dict(load_file(folder / "classes.safetensors"))


def keep_finished_seeds(args, run: Run) -> None:
    """The embedders of finished seeds are results: a run that goes on in another folder takes them along."""
    for seed in (one["seed"] for one in run.state["runs"]) if run.accelerator.is_main_process else ():
        folder, before = Path(args.output_dir, f"seed-{seed}"), run.checkpoint.parent / f"seed-{seed}"
        if folder.is_dir():
            continue
        if not before.is_dir():
            raise InputError(f"the embedder of seed {seed} is missing: there is no {before}")
        with replacing(folder) as partial_folder:
            shutil.copytree(before, partial_folder, dirs_exist_ok=True)


def run_summary(args, run: Run, embedder: SketchEmbedder, head: Head, gallery: Embedded, queries: Embedded) -> str:
    """What will be trained and written; InputError if the disk cannot hold it."""
    counts = Counter(gallery.labels.tolist())
    alone = sum(count == 1 for count in counts.values())
    classes = args.train_batch_size // args.images_per_class
    weights = 4 * sum(weight.numel() for weight in embedder.parameters())
    trained = 4 * sum(weight.numel() for weight in head.parameters())
    saves, checkpoint = args.num_seeds * args.num_train_epochs, weights + 2 * trained
    space = check_space(args.output_dir, saves, args.checkpoints_total_limit, checkpoint, args.num_seeds * weights)
    lines = [
        f"{len(gallery.labels)} drawings of {len(counts)} classes to train on and to find, {len(queries.labels)} to"
        f" find them by; batches of {classes} x {args.images_per_class}; seeds {run.seed} to"
        f" {run.seed + args.num_seeds - 1}; {trained / 4e6:.1f} M weights are trained; {space}"
    ]
    if alone:
        lines.append(f"classes with one drawing to train on, which forms no triplet: {alone}")
    if classes > len(counts):
        lines.append(f"there are fewer classes than --train_batch_size / --images_per_class = {classes}")
    return "\n".join(lines)


@torch.inference_mode()
def evaluate(model: Head, gallery: Embedded, queries: Embedded, device: torch.device) -> Ranking:
    """How well the queries find drawings of their class."""
    query_embeddings, gallery_embeddings = (
        torch.cat([model(part.to(device))[0].cpu() for part in side.features.split(1024)])
        for side in (queries, gallery)
    )
    return rank(
        query_embeddings,
        gallery_embeddings,
        *(side.tolist() for side in (queries.labels, gallery.labels, queries.ids, gallery.ids)),
    )


def end_epoch(run: Run, seed: int, epoch: int) -> None:
    """Log the means of an epoch."""
    sums = run.meter.start_epoch()
    count = sums.pop("rows")
    if not count:
        return  # no step was finite, which has been said
    means = run.state["last"] = {name: value / count for name, value in sums.items()}
    run.log({f"seed-{seed}/{name}": value for name, value in means.items()})
    if means["embedding_std"] < COLLAPSED:
        logger.warning(
            f"seed {seed}, epoch {epoch}: the embeddings are nearly all alike, either because the backbone sees no"
            " difference or because they collapsed: lower --learning_rate"
        )


def seed_is_over(args, run: Run) -> bool:
    """Whether the last epoch of a seed that has no scores yet is over."""
    steps, seed = run.steps, run.seed + run.steps.epoch // args.num_train_epochs
    is_last = steps.at_epoch_end and (steps.epoch + 1) % args.num_train_epochs == 0
    return is_last and all(scores["seed"] != seed for scores in run.state["runs"])


def end_seed(args, run: Run, embedder, head: Head, gallery: Embedded, queries: Embedded, record: dict, seed) -> None:
    """Score the head of a seed; write its embedder and all that is to be told of it."""
    run.check_weights()
    ranking = evaluate(head.eval(), gallery, queries, run.accelerator.device)
    scores = ranking.scores
    head.train()
    result = {"seed": seed} | scores | run.state.get("last", {})
    run.log({f"seed-{seed}/{name}": scores[name] for name in ("top1", "top5", "map")})
    logger.info(f"seed {seed}: Top-1 {scores['top1']:.1%}, Top-5 {scores['top5']:.1%}, mAP {scores['map']:.3f}")
    metrics = result | {"settings": run.identity, "changes": run.changes}
    sheet = draw_nearest(gallery, queries, ranking.nearest, seed)
    with replacing(Path(args.output_dir, f"seed-{seed}")) as folder:
        embedder.save_pretrained(folder)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2), encoding="utf-8")
        (folder / "split.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        write_card(args, folder, run, record, result)
        if sheet is not None:
            sheet.save(folder / "nearest.png")  # of the user's own drawings: not for the Hub
    run.state["runs"].append(result)
    if sheet is not None:
        track_images(run.accelerator, "nearest", {f"seed {seed}": [sheet]}, run.steps.done)


def draw_nearest(gallery: Embedded, queries: Embedded, nearest: Tensor, seed: int) -> Image.Image | None:
    """Some queries and what they find; None if a drawing is gone, which must not end a training."""
    try:
        return query_sheet(queries.drawings, gallery.drawings, {"": nearest}, seed)
    except (OSError, InputError) as error:
        logger.warning(f"seed {seed}: what queries find was not drawn ({first_line(error)})")
        return None


def finish(args, run: Run) -> None:
    """Mean and deviation over the seeds, on disk and on the screen."""
    runs = run.state["runs"]
    summary = {}
    for name in ("top1", "top5", "map", "recall@10", "recall@50"):
        values = [one[name] for one in runs]
        deviation = statistics.stdev(values) if len(values) > 1 else None
        summary[name] = {"mean": statistics.mean(values), "deviation": deviation}
        spread = "" if deviation is None else f" +- {deviation:.2%}"
        logger.info(f"{name}: {summary[name]['mean']:.2%}{spread} over {len(values)} seeds")
    metrics = {"summary": summary, "runs": runs, "settings": run.identity, "versions": versions()}
    with replacing(args.output_dir) as folder:
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2), encoding="utf-8")
    if run.meter.skipped:
        logger.warning(f"{run.meter.skipped} steps were skipped: their loss or gradient was not finite")
    folder = Path(args.output_dir, f"seed-{run.seed}")
    uses = {
        "model.safetensors": f"for sketch-perceptual search --model {folder} --query PICTURE --gallery FOLDER",
        "nearest.png": "queries and the drawings that they find",
        "../metrics.json": "scores of all seeds",
    }
    print(cards.listing(folder, uses))


def write_card(args, folder: Path, run: Run, record: dict, scores: dict) -> None:
    is_pushed = run.hub_model_id and scores["seed"] == run.seed  # the first of the seeds alone
    where = run.hub_model_id if is_pushed else "path/to/this/folder"
    on_hub = cards.hub_id(args.dataset_name)
    apart = f" by {args.group_column}" if args.group_column else ""
    snippet = f"""from PIL import Image
from sketch_perceptual import SketchEmbedder

embedder = SketchEmbedder.from_pretrained("{where}")
vectors = embedder.embed([Image.new("RGB", (64, 64), colour) for colour in ("black", "white")])
print(vectors @ vectors.T)  # cosine similarities"""
    cards.write_card(
        folder,
        data=ModelCardData(
            license=args.license,
            library_name="sketch-perceptual",
            pipeline_tag="image-feature-extraction",
            datasets=on_hub and [on_hub],
            tags=["sketch", "image-retrieval", "vgg16", "attention"],
        ),
        title=f"Sketch embedder - {cards.model_name(run.hub_model_id, args.output_dir)}",
        description=f"Drawings to vectors of {args.embedding_dim} numbers and length 1 (Seo 2025, section 4.2), from"
        f" {on_hub or 'a data set of its own'}. Of {scores['queries']} held-out drawings{apart}, which share no copy"
        f" with the {record['train_images']} trained on, {scores['top1']:.1%} find one of their class first among"
        f" these, {scores['top5']:.1%} among the first five; mean average precision {scores['map']:.3f}."
        f" {record['summary']}.",
        snippet=snippet,
        options=run.record() | {"seed": scores["seed"]},
    )


if __name__ == "__main__":
    entry.run(main, parse_args())
