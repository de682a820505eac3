#!/usr/bin/env python
"""Train an embedding head on a frozen backbone, to find drawings by drawings (Seo 2025, section 4.2, Table 3).

    python train_retrieval.py \\
      --train_data_dir ImageNet-Sketch/sketch --backbone attention-vgg16/best --seed 42 --output_dir sketch-retrieval

The classifier of VGG-16 becomes a head of 512 outputs, brought to length 1, and learns by cross-entropy and a tenth of
a triplet loss for 20 epochs; nine tenths of the drawings are trained on and are the gallery, the others are queries.
All is done for five seeds, from `--seed` on. `seed-42/` and its like hold what was trained: they load with
`SketchEmbedder.from_pretrained` and go into `sketch-perceptual evaluate`; `nearest.png` beside them shows what some
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
from sketch_perceptual.data.options import add_class_options, check_class_options
from sketch_perceptual.data.preview import fitted
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
from sketch_perceptual.training.feature_cache import extract_features
from sketch_perceptual.training.labelled import LabelledDrawings, open_drawings, preview_drawings, read_drawings
from sketch_perceptual.training.options import add_feature_options, add_run_options
from sketch_perceptual.training.run import Run
from sketch_perceptual.training.startup import check_space, start, versions
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

    add = parser.group("training")
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
    add_run_options(parser, output_dir="sketch-retrieval")
    parser.set_defaults(checkpoints_total_limit=1, gradient_accumulation_steps=1)

    args = parser.parse_args(argv)
    check_class_options(parser, args)
    if args.train_batch_size % args.images_per_class:
        parser.error("--train_batch_size must be a multiple of --images_per_class")
    return args


def main(args: Options) -> None:
    resolution = args.resolution or tuned_resolution(args.backbone)
    see = partial(fitted, resolution, args.fit, args.background)
    if preview_drawings(args, see):
        return
    run = start(args)
    accelerator = run.accelerator
    embedder = build_embedder(args.backbone, args.embedding_dim, args.head, resolution, args.fit, args.background)
    drawings = read_drawings(args, accelerator, open_drawings(args, run.seed), see)
    record = drawings.record | {"classes": drawings.data.classes}
    run.settle(**drawings.identity(), backbone=fingerprint(embedder.backbone.features))
    # Epochs are those of each seed, the finished ones too.
    run.settle(resolution=resolution, num_train_epochs=args.num_train_epochs)
    gallery, queries = embed_drawings(
        drawings,
        embedder,
        accelerator,
        folder=args.feature_dir,
        batch_size=args.extraction_batch_size,
        num_workers=args.dataloader_num_workers,
    )
    hub.create_repo(args, run)
    start_trackers(accelerator, "sketch-retrieval", args)

    head = Head(embedder.backbone.classifier, args.embedding_dim, len(record["classes"]))
    optimizer = torch.optim.Adam(head.parameters(), args.learning_rate)
    model, prepared_optimizer = accelerator.prepare(head, optimizer)
    classes_per_batch = args.train_batch_size // args.images_per_class
    shape = (classes_per_batch, args.images_per_class)
    batches = Batches(accelerator, gallery, run.seed, args.num_seeds, args.num_train_epochs, shape)
    steps = Steps(accelerator, batches, batches.lengths, seed=run.seed)
    meter = Meter(accelerator)
    logger.info(run_summary(args, run, embedder, head, gallery, queries))
    run.state = {"runs": []} | run.state
    keep_finished_seeds(run)
    run.begin(steps, meter, prepared_optimizer, partial(save_head, embedder, head), partial(load_head, embedder, head))

    results = Results(run, embedder, head, gallery, queries, record)
    if accelerator.is_main_process and seed_is_over(run, args.num_train_epochs):  # the run ended before it was scored
        results.end_seed(batches.seed(steps.epoch))
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
            if accelerator.is_main_process and seed_is_over(run, args.num_train_epochs):
                results.end_seed(seed)
            run.end_step(save=steps.at_epoch_end)

    with run.finishing():
        if accelerator.is_main_process:
            results.finish()
    run.close()
    hub.push(args, run, run.folder / f"seed-{run.seed}", FILES)


class Embedded(NamedTuple):
    """The gallery or the queries: N drawings, their features (N, F) on the CPU, classes and ids of copies (N,)."""

    drawings: LabelledImages
    features: Tensor
    labels: Tensor
    ids: Tensor


def embed_drawings(
    drawings: LabelledDrawings, embedder: SketchEmbedder, accelerator: Accelerator, *, folder: str | None, **loading
) -> tuple[Embedded, Embedded]:
    """Features of the gallery, which is trained on, and of the held-out queries, from the cache in `folder`."""
    data, keys = drawings.data, drawings.keys
    cache = extract_features(accelerator, folder, embedder, data, keys, **loading)
    gallery, queries = (
        Embedded(
            data.select(rows),
            cache.read([keys[i] for i in rows]),
            torch.tensor([data.labels[i] for i in rows]),
            torch.tensor([drawings.copies[i] for i in rows]),
        )
        for rows in (drawings.split.train, drawings.split.validation)
    )
    return gallery, queries


class Batches:
    """This process's batches (labels (B,), features (B, F)) of the gallery, in one count of epochs over all seeds."""

    def __init__(
        self,
        accelerator: Accelerator,
        gallery: Embedded,
        first_seed: int,
        num_seeds: int,
        num_epochs: int,
        shape: tuple[int, int],
    ):
        """`shape`: classes a batch, and drawings of each."""
        self.accelerator, self.gallery, self.first_seed = accelerator, gallery, first_seed
        self.num_epochs, self.shape = num_epochs, shape
        self.lengths = [len(self.rows(epoch)) for epoch in range(num_seeds * num_epochs)]

    def seed(self, epoch: int) -> int:
        return self.first_seed + epoch // self.num_epochs

    def rows(self, epoch: int) -> list[list[int]]:
        """The first batches come twice where the processes do not divide them."""
        processes = self.accelerator.num_processes
        rng = generator(self.seed(epoch), "order", epoch % self.num_epochs)
        batches = pk_batches(self.gallery.labels.tolist(), *self.shape, rng)
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
        """Draw new weights, which depend only on the seed."""
        torch.manual_seed(seed)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        embeddings = F.normalize(self.head(features).float())
        return embeddings, self.classes(embeddings)


def build_embedder(source: str, dim: int, head: str, resolution: int, fit: str, background: str) -> SketchEmbedder:
    """The frozen backbone under a new head."""
    backbone = load_backbone(source, attention="none")
    config = backbone.settings | {"num_classes": dim, "head": head, "classes": None}
    embedder = SketchEmbedder(config, "head", resolution, fit, background)
    embedder.backbone.features.load_state_dict(backbone.features.state_dict())
    return embedder


def save_head(embedder: SketchEmbedder, head: Head, folder: Path) -> None:
    """The embedder as `from_pretrained` takes it, and the classes' layer."""
    embedder.save_pretrained(folder)
    save_file(head.classes.state_dict(), folder / "classes.safetensors")


def load_head(embedder: SketchEmbedder, head: Head, folder: Path) -> None:
    embedder.load_state_dict(SketchEmbedder.from_pretrained(folder).state_dict())
    head.classes.load_state_dict(load_file(folder / "classes.safetensors"))


def keep_finished_seeds(run: Run) -> None:
    """The embedders of finished seeds are results: a run that goes on in another folder takes them along."""
    for seed in (one["seed"] for one in run.state["runs"]) if run.accelerator.is_main_process else ():
        folder, before = run.folder / f"seed-{seed}", run.checkpoint.parent / f"seed-{seed}"
        if folder.is_dir():
            continue
        if not before.is_dir():
            raise InputError(f"the embedder of seed {seed} is missing: there is no {before}")
        with replacing(folder) as partial_folder:
            shutil.copytree(before, partial_folder, dirs_exist_ok=True)


def run_summary(args, run: Run, embedder: SketchEmbedder, head: Head, gallery: Embedded, queries: Embedded) -> str:
    """Describe the training and the files to be written; InputError if the disk cannot hold them."""
    counts = Counter(gallery.labels.tolist())
    single = sum(count == 1 for count in counts.values())
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
    if single:
        lines.append(f"classes with one drawing to train on, which forms no triplet: {single}")
    if classes > len(counts):
        lines.append(f"there are fewer classes than --train_batch_size / --images_per_class = {classes}")
    return "\n".join(lines)


@torch.inference_mode()
def evaluate(model: Head, gallery: Embedded, queries: Embedded, device: torch.device) -> Ranking:
    """Rank the gallery for each query."""
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


def seed_is_over(run: Run, num_epochs: int) -> bool:
    """True if the last epoch of a seed that has no scores yet is over."""
    steps, seed = run.steps, run.seed + run.steps.epoch // num_epochs
    is_last = steps.at_epoch_end and (steps.epoch + 1) % num_epochs == 0
    return is_last and all(scores["seed"] != seed for scores in run.state["runs"])


class Results:
    """Scores and files of each seed, and of all.

    Args:
        record: the split as it is saved, with the classes.
    """

    def __init__(
        self, run: Run, embedder: SketchEmbedder, head: Head, gallery: Embedded, queries: Embedded, record: dict
    ):
        self.run, self.embedder, self.head = run, embedder, head
        self.gallery, self.queries, self.record = gallery, queries, record

    def end_seed(self, seed: int) -> None:
        """Score the head of a seed; write its embedder, metrics and card."""
        run, head, gallery, queries = self.run, self.head, self.gallery, self.queries
        run.check_weights()
        ranking = evaluate(head.eval(), gallery, queries, run.accelerator.device)
        scores = ranking.scores
        head.train()
        result = {"seed": seed} | scores | run.state.get("last", {})
        run.log({f"seed-{seed}/{name}": scores[name] for name in ("top1", "top5", "map")})
        logger.info(f"seed {seed}: Top-1 {scores['top1']:.1%}, Top-5 {scores['top5']:.1%}, mAP {scores['map']:.3f}")
        metrics = result | {"settings": run.identity, "changes": run.changes}
        sheet = draw_nearest(gallery, queries, ranking.nearest, seed)
        with replacing(run.folder / f"seed-{seed}") as folder:
            self.embedder.save_pretrained(folder)
            (folder / "metrics.json").write_text(json.dumps(metrics, indent=2), encoding="utf-8")
            (folder / "split.json").write_text(json.dumps(self.record, indent=1), encoding="utf-8")
            self.write_card(folder, result)
            if sheet is not None:
                sheet.save(folder / "nearest.png")  # of the user's own drawings: not for the Hub
        run.state["runs"].append(result)
        if sheet is not None:
            track_images(run.accelerator, "nearest", {f"seed {seed}": [sheet]}, run.steps.done)

    def finish(self) -> None:
        """Write and log mean and deviation over the seeds."""
        run = self.run
        runs = run.state["runs"]
        summary = {}
        for name in ("top1", "top5", "map", "recall@10", "recall@50"):
            values = [one[name] for one in runs]
            deviation = statistics.stdev(values) if len(values) > 1 else None
            summary[name] = {"mean": statistics.mean(values), "deviation": deviation}
            spread = "" if deviation is None else f" +- {deviation:.2%}"
            logger.info(f"{name}: {summary[name]['mean']:.2%}{spread} over {len(values)} seeds")
        metrics = {"summary": summary, "runs": runs, "settings": run.identity, "versions": versions()}
        with replacing(run.folder) as folder:
            (folder / "metrics.json").write_text(json.dumps(metrics, indent=2), encoding="utf-8")
        if run.meter.skipped:
            logger.warning(f"{run.meter.skipped} steps were skipped: their loss or gradient was not finite")
        folder = run.folder / f"seed-{run.seed}"
        uses = {
            "model.safetensors": f"for sketch-perceptual search --model {folder} --query PICTURE --gallery FOLDER",
            "nearest.png": "queries and the drawings that they find",
            "../metrics.json": "scores of all seeds",
        }
        print(cards.listing(folder, uses))

    def write_card(self, folder: Path, scores: dict) -> None:
        run, record = self.run, self.record
        is_pushed = run.hub_model_id and scores["seed"] == run.seed  # only the first of the seeds
        where = run.hub_model_id if is_pushed else "path/to/this/folder"
        (on_hub,) = run.card_data["datasets"] or [None]
        apart = f" by {record['group_column']}" if record["group_column"] else ""
        snippet = f"""from PIL import Image
from sketch_perceptual import SketchEmbedder

embedder = SketchEmbedder.from_pretrained("{where}")
vectors = embedder.embed([Image.new("RGB", (64, 64), colour) for colour in ("black", "white")])
print(vectors @ vectors.T)  # cosine similarities"""
        cards.write_card(
            folder,
            data=ModelCardData(
                **run.card_data,
                library_name="sketch-perceptual",
                pipeline_tag="image-feature-extraction",
                tags=["sketch", "image-retrieval", "vgg16", "attention"],
            ),
            title=f"Sketch embedder - {cards.model_name(run.hub_model_id, run.folder)}",
            description=f"Drawings to vectors of {self.embedder.backbone.num_classes} numbers and length 1 (Seo 2025,"
            f" section 4.2), from {on_hub or 'a data set of its own'}. Of {scores['queries']} held-out drawings{apart}"
            f", which share no copy with the {record['train_images']} trained on, {scores['top1']:.1%} find one of"
            f" their class first among these, {scores['top5']:.1%} among the first five; mean average precision"
            f" {scores['map']:.3f}. {record['summary']}.",
            snippet=snippet,
            options=run.record() | {"seed": scores["seed"]},
        )


def draw_nearest(gallery: Embedded, queries: Embedded, nearest: Tensor, seed: int) -> Image.Image | None:
    """Some queries and what they find; None if a drawing is gone, which must not end a training."""
    try:
        return query_sheet(queries.drawings, gallery.drawings, {"": nearest}, seed)
    except (OSError, InputError) as error:
        logger.warning(f"seed {seed}: what queries find was not drawn ({first_line(error)})")
        return None


if __name__ == "__main__":
    entry.run(main, parse_args())
