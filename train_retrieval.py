#!/usr/bin/env python
"""Train an embedding head on a frozen backbone, to find drawings by drawings (Seo 2025, section 4.2, Table 3).

    accelerate launch train_retrieval.py \
      --train_data_dir ImageNet-Sketch/sketch --backbone attention-vgg16/best --seed 42 --output_dir sketch-retrieval

The classifier of VGG-16 becomes a head of 512 outputs, brought to length 1, and learns by cross-entropy and a tenth of
a triplet loss for 20 epochs; nine tenths of the drawings are trained on and are the gallery, the others are queries.
All is done for five seeds, from `--seed` on. `seed-42/` and its like hold what was trained: they load with
`SketchEmbedder.from_pretrained` and go into `evaluate.py`. `metrics.json` has the accuracies, mean and deviation.
"""

import argparse
import json
import statistics
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from huggingface_hub import ModelCardData
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from sketch_perceptual.data.batches import pk_batches
from sketch_perceptual.data.checks import read_once
from sketch_perceptual.data.options import add_class_options, check_class_options, load_labelled
from sketch_perceptual.data.splits import describe_split, split, split_hash
from sketch_perceptual.losses.triplet import MINING, triplet_loss
from sketch_perceptual.measures.ranking import rank
from sketch_perceptual.networks.backbone import BUNDLED, load_backbone
from sketch_perceptual.networks.embedder import SketchEmbedder
from sketch_perceptual.networks.hub_model import fingerprint
from sketch_perceptual.running import cards
from sketch_perceptual.running.checkpoints import load_checkpoint, save_checkpoint
from sketch_perceptual.running.feature_cache import extract_features
from sketch_perceptual.running.interruption import catch_signals
from sketch_perceptual.running.options import add_feature_options, add_run_options, at_least
from sketch_perceptual.running.startup import check_space, run, start, versions
from sketch_perceptual.running.steps import NonFiniteGuard
from sketch_perceptual.running.trackers import start_trackers
from sketch_perceptual.seeds import generator

logger = get_logger(__name__, log_level="INFO")

FILES = ["config.json", "model.safetensors", "README.md", "metrics.json", "split.json"]
COLLAPSED = 0.1  # deviation of embeddings of length 1: 0 if all are one, nearly 1 if they point everywhere


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count, rate = at_least(1), at_least(0.0, float)

    add = parser.add_argument_group("model").add_argument
    add("--backbone", default=str(BUNDLED), help='a folder or Hub id, a .safetensors with VGG-16 weights, "imagenet"')
    add("--head", choices=("vgg", "linear"), default="vgg", help="VGG-16's classifier, or one layer for small data")
    add("--embedding_dim", type=count, default=512)

    add = add_class_options(parser, "as queries; the others are trained on and are the gallery")
    add("--resolution", type=at_least(32), default=224, help="drawings become this wide and high, in pixels")
    add("--fit", choices=("pad", "crop"), default="pad", help="crop cuts the longer side")
    add_feature_options(add)

    add = add_run_options(parser, output_dir="sketch-retrieval")
    add("--num_seeds", type=count, default=5, help="trainings, from --seed on")
    add("--num_train_epochs", type=count, default=20)
    add("--train_batch_size", type=count, default=32, help="drawings a step and process")
    add("--images_per_class", type=count, default=4, help="of these drawings, as many of one class")
    add("--triplet_weight", type=rate, default=0.1, help="of the triplet loss, beside the cross-entropy")
    add("--triplet_margin", type=rate, default=0.2, help="in cosine distance")
    add("--mining", choices=MINING, default="batch_hard")
    add("--learning_rate", type=rate, default=1e-4, help="of Adam")
    add("--lr_step_size", type=count, default=7, help="the rate falls to --lr_gamma after every so many epochs")
    add("--lr_gamma", type=rate, default=0.1)
    parser.set_defaults(checkpoints_total_limit=1, gradient_accumulation_steps=1, scale_lr=False)

    args = parser.parse_args(argv)
    check_class_options(parser, args)
    if args.train_batch_size % args.images_per_class:
        parser.error("--train_batch_size must be a multiple of --images_per_class")
    return args


def main(args: argparse.Namespace) -> None:
    accelerator = start(args)
    embedder = build_embedder(args)
    data = load_labelled(args, accelerator)
    repo_id = None
    if args.push_to_hub and accelerator.is_main_process:
        repo_id = cards.create_repo(cards.model_name(args.hub_model_id, args.output_dir), args.hub_token)
    data, keys, copies = read_once(args, accelerator, data)
    sides = split(data.labels, keys, copies, data.groups, args.validation_share)
    logger.info(sides.summary)
    cache = extract_features(args, accelerator, embedder, data, keys)
    gallery, queries = (
        Side(cache.read([keys[i] for i in rows]), [data.labels[i] for i in rows], [copies[i] for i in rows])
        for rows in (sides.train, sides.validation)
    )

    head = Head(embedder.backbone.classifier, args.embedding_dim, len(data.classes))
    optimizer = torch.optim.Adam(head.parameters(), args.learning_rate)
    model, prepared_optimizer = accelerator.prepare(head, optimizer)
    register_head_hooks(accelerator, embedder, head)
    record = describe_split(args, sides, keys)
    settings = resumable_settings(args, accelerator, embedder, record)
    state = {"global_step": 0, "run": 0, "epoch": 0, "batch": 0, "sums": [0] * 5, "skipped_steps": 0, "runs": []}
    state |= load_checkpoint(accelerator, args, settings) or {"settings": settings}
    guard = NonFiniteGuard(state["skipped_steps"], scaled=accelerator.scaler is not None)
    start_trackers(accelerator, "sketch-retrieval", args)
    logger.info(run_summary(args, embedder, head, gallery, queries))

    def save(**place) -> None:
        state.update(place, global_step=step, skipped_steps=guard.total)
        save_checkpoint(accelerator, args, state)

    stop = catch_signals()
    step = state["global_step"]
    progress = tqdm(
        total=args.num_seeds * args.num_train_epochs,
        initial=state["run"] * args.num_train_epochs + state["epoch"],
        desc="Epochs",
        disable=not accelerator.is_local_main_process,
    )
    for number in range(state["run"], args.num_seeds):
        seed = args.seed + number
        if state["epoch"] == state["batch"] == 0:
            head.reset(seed)
            optimizer.state.clear()
        for epoch in range(state["epoch"], args.num_train_epochs):
            model.train()
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * args.lr_gamma ** (epoch // args.lr_step_size)  # StepLR
            batches = epoch_batches(args, accelerator, gallery.labels, seed, epoch)
            for position, rows in list(enumerate(batches))[state["batch"] :]:
                draw = generator(seed, "dropout", epoch, position, accelerator.process_index)
                torch.manual_seed(draw.initial_seed())
                labels = gallery.labels[rows].to(accelerator.device)
                embeddings, logits = model(gallery.features[rows].to(accelerator.device))
                cross_entropy = F.cross_entropy(logits.float(), labels)
                triplet, active = triplet_loss(embeddings, labels, args.triplet_margin, args.mining)
                accelerator.backward(cross_entropy + args.triplet_weight * triplet)
                grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), float("inf")))
                is_finite = guard.is_finite(step, [grad_norm], [])
                if is_finite or accelerator.scaler is not None:  # a scaler skips by itself, and settles its scale
                    prepared_optimizer.step()
                prepared_optimizer.zero_grad()
                step += 1
                spread = (1 - embeddings.detach().mean(0).square().sum()).clamp(min=0).sqrt()
                numbers = torch.stack([cross_entropy.detach(), triplet.detach(), triplet.new_tensor(active), spread])
                *logs, stopped = accelerator.reduce(
                    torch.cat([numbers, numbers.new_tensor([stop() > 0])]), "mean"
                ).tolist()
                if is_finite:
                    state["sums"] = [old + new for old, new in zip(state["sums"], [*logs, 1], strict=True)]
                if stopped:
                    save(run=number, epoch=epoch, batch=position + 1)
                    logger.warning(f"interrupted after step {step}; go on with --resume_from_checkpoint latest")
                    accelerator.end_training()
                    sys.exit(128 + (stop() or 15))

            *sums, count = state["sums"]
            names = ("cross_entropy", "triplet_loss", "active_triplets", "embedding_std")
            state["last"] = {name: value / max(1, count) for name, value in zip(names, sums, strict=True)}
            progress.update()
            progress.set_postfix({name: f"{value:.3g}" for name, value in state["last"].items()}, refresh=False)
            accelerator.log({f"seed-{seed}/{name}": value for name, value in state["last"].items()}, step)
            if state["last"]["embedding_std"] < COLLAPSED:
                logger.warning(
                    f"seed {seed}, epoch {epoch + 1}: the embeddings are nearly all alike, either because the backbone"
                    " sees no difference or because they collapsed: lower --learning_rate"
                )
            save(run=number, epoch=epoch + 1, batch=0, sums=[0] * 5)

        if accelerator.is_main_process:
            found = evaluate(head.eval(), gallery, queries, accelerator.device)
            state["runs"].append({"seed": seed} | found | state["last"])
            logger.info(f"seed {seed}: Top-1 {found['top1']:.1%}, Top-5 {found['top5']:.1%}, mAP {found['map']:.3f}")
            report(args, embedder, state, record, Path(args.output_dir, f"seed-{seed}"))
        save(run=number + 1, epoch=0)

    progress.close()
    if accelerator.is_main_process:
        finish(args, state, guard)
        if repo_id:
            cards.push(Path(args.output_dir, f"seed-{args.seed}"), repo_id, FILES, args.hub_token)
    accelerator.end_training()


class Side:
    """The gallery or the queries: features (N, F) on the CPU, classes and ids of copies (N,)."""

    def __init__(self, features: Tensor, labels: list[int], ids: list[int]):
        self.features, self.labels, self.ids = features, torch.tensor(labels), torch.tensor(ids)


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


def build_embedder(args) -> SketchEmbedder:
    """The frozen backbone under a new head."""
    backbone = load_backbone(args.backbone, attention="none")
    config = backbone._hub_mixin_config | {"num_classes": args.embedding_dim, "head": args.head, "classes": None}
    embedder = SketchEmbedder(config, "head", args.resolution, args.fit, args.background)
    embedder.backbone.features.load_state_dict(backbone.features.state_dict())
    return embedder


def epoch_batches(args, accelerator: Accelerator, labels: Tensor, seed: int, epoch: int) -> list[list[int]]:
    """This process's batches; the first ones come twice where the processes do not divide them."""
    classes = args.train_batch_size // args.images_per_class
    batches = pk_batches(labels.tolist(), classes, args.images_per_class, generator(seed, "order", epoch))
    short = -len(batches) % accelerator.num_processes
    return (batches + batches[:short])[accelerator.process_index :: accelerator.num_processes]


def register_head_hooks(accelerator: Accelerator, embedder: SketchEmbedder, head: Head) -> None:
    """Checkpoints hold the embedder as `from_pretrained` takes it, and the classes' layer."""

    def save(models, weights, output_dir):
        weights.clear()
        if accelerator.is_main_process:
            embedder.save_pretrained(output_dir)
            save_file(head.classes.state_dict(), Path(output_dir, "classes.safetensors"))

    def load(models, input_dir):
        models.clear()
        embedder.load_state_dict(SketchEmbedder.from_pretrained(input_dir).state_dict())
        head.classes.load_state_dict(load_file(Path(input_dir, "classes.safetensors")))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def resumable_settings(args, accelerator: Accelerator, embedder: SketchEmbedder, record: dict) -> dict:
    """What a resumed run must share with the run that it continues."""
    names = """head embedding_dim resolution fit dataset_name train_data_dir group_column validation_share seed
        num_train_epochs train_batch_size images_per_class triplet_weight triplet_margin mining learning_rate
        lr_step_size lr_gamma"""
    return {
        "backbone": "the bundled one" if args.backbone == str(BUNDLED) else Path(args.backbone).name,
        "backbone_weights": fingerprint(embedder.backbone.features),
        **{name: getattr(args, name) for name in names.split()},
        "split": split_hash(record),
        "processes": accelerator.num_processes,
    }


def run_summary(args, embedder: SketchEmbedder, head: Head, gallery: Side, queries: Side) -> str:
    """What will be trained and written; InputError if the disk cannot hold it."""
    counts = Counter(gallery.labels.tolist())
    alone = sum(count == 1 for count in counts.values())
    classes = args.train_batch_size // args.images_per_class
    weights = 4 * sum(weight.numel() for weight in embedder.parameters())
    trained = 4 * sum(weight.numel() for weight in head.parameters())
    space = check_space(args, args.num_seeds * args.num_train_epochs, weights + 2 * trained, args.num_seeds * weights)
    lines = [
        f"{len(gallery.labels)} drawings of {len(counts)} classes to train on and to find, {len(queries.labels)} to"
        f" find them by; batches of {classes} x {args.images_per_class}; seeds {args.seed} to"
        f" {args.seed + args.num_seeds - 1}; {trained / 4e6:.1f} M weights are trained; {space}"
    ]
    if alone:
        lines.append(f"classes with one drawing to train on, which forms no triplet: {alone}")
    if classes > len(counts):
        lines.append(f"there are fewer classes than --train_batch_size / --images_per_class = {classes}")
    return "\n".join(lines)


@torch.inference_mode()
def evaluate(model: Head, gallery: Side, queries: Side, device: torch.device) -> dict:
    """How well the queries find drawings of their class."""
    embeddings = [
        torch.cat([model(part.to(device))[0].cpu() for part in side.features.split(1024)])
        for side in (queries, gallery)
    ]
    return rank(*embeddings, queries.labels, gallery.labels, queries.ids, gallery.ids).scores


def report(args, embedder: SketchEmbedder, state: dict, record: dict, folder: Path) -> None:
    """Write the embedder of the last seed and all that is to be told of it."""
    found = state["runs"][-1]
    embedder.save_pretrained(folder)
    metrics = found | {"settings": state["settings"]}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2), encoding="utf-8")
    (folder / "split.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    write_card(args, folder, state["settings"], found, record)


def finish(args, state: dict, guard: NonFiniteGuard) -> None:
    """Mean and deviation over the seeds, on disk and on the screen."""
    runs = state["runs"]
    summary = {}
    for name in ("top1", "top5", "map", "recall@10", "recall@50"):
        values = [found[name] for found in runs]
        deviation = statistics.stdev(values) if len(values) > 1 else None
        summary[name] = {"mean": statistics.mean(values), "deviation": deviation}
        spread = "" if deviation is None else f" +- {deviation:.2%}"
        logger.info(f"{name}: {summary[name]['mean']:.2%}{spread} over {len(values)} seeds")
    metrics = {"summary": summary, "runs": runs, "settings": state["settings"], "versions": versions()}
    Path(args.output_dir, "metrics.json").write_text(json.dumps(metrics, indent=2), encoding="utf-8")
    if guard.total:
        logger.warning(f"{guard.total} steps were skipped: their loss or gradient was not finite")
    print(Path(args.output_dir, f"seed-{args.seed}"))


def write_card(args, folder: Path, settings: dict, found: dict, record: dict) -> None:
    where = args.hub_model_id or "path/to/this/folder"
    on_hub = cards.dataset_id(args.dataset_name)
    settings = {k: v for k, v in settings.items() if k not in ("dataset_name", "train_data_dir")}
    apart = f" by {args.group_column}" if args.group_column else ""
    snippet = f"""from PIL import Image
from sketch_perceptual import SketchEmbedder

embedder = SketchEmbedder.from_pretrained("{where}")
vectors = embedder.embed([Image.new("RGB", (64, 64), colour) for colour in ("black", "white")])
print(vectors @ vectors.T)  # cosine similarities"""
    cards.write_card(
        folder,
        data=ModelCardData(
            license="apache-2.0",
            library_name="sketch-perceptual",
            pipeline_tag="image-feature-extraction",
            datasets=on_hub and [on_hub],
            tags=["sketch", "image-retrieval", "vgg16", "attention"],
        ),
        title=f"Sketch embedder - {cards.model_name(args.hub_model_id, args.output_dir)}",
        description=f"Drawings to vectors of {args.embedding_dim} numbers and length 1 (Seo 2025, section 4.2), from"
        f" {on_hub or 'a data set of its own'}. Of {found['queries']} drawings kept apart{apart}, which share no copy"
        f" with the {record['train_images']} trained on, {found['top1']:.1%} find one of their class first among"
        f" these, {found['top5']:.1%} among the first five; mean average precision {found['map']:.3f}."
        f" {record['summary']}.",
        snippet=snippet,
        options=settings | {"seed": found["seed"]},
    )


if __name__ == "__main__":
    run(main, parse_args())
