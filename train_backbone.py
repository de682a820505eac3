#!/usr/bin/env python
"""Tune (attention-)VGG-16 to classify drawings: the backbone of the perceptual loss (Seo 2025, section 3).

    accelerate launch --mixed_precision bf16 train_backbone.py \\
      --train_data_dir ImageNet-Sketch/sketch --dataloader_num_workers 8 --seed 42 --output_dir attention-vgg16

Defaults are Algorithm 1 of the paper: ImageNet weights, the first two max-pools replaced by attention, 90/10, random
resized crops of 224 px, Adam without weight decay, batches of 32, 25 epochs. `best/` holds the network of the epoch
with the best validation accuracy, `last/` that of the last; both load with `AttentionVGG16.from_pretrained` and go
into `train_lora_sketch.py --backbone`.
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from huggingface_hub import ModelCardData
from tqdm.auto import tqdm

from sketch_perceptual.data.batches import make_loader
from sketch_perceptual.data.checks import read_once
from sketch_perceptual.data.class_names import are_imagenets, class_names
from sketch_perceptual.data.image_sets import LabelledImages
from sketch_perceptual.data.options import add_class_options, check_class_options, load_labelled
from sketch_perceptual.data.splits import describe_split, split, split_hash
from sketch_perceptual.errors import InputError
from sketch_perceptual.figures import learning_curve
from sketch_perceptual.losses import calibrate
from sketch_perceptual.networks.backbone import AttentionVGG16, is_vgg16_weights, load_backbone
from sketch_perceptual.networks.hub_model import fingerprint
from sketch_perceptual.running import cards
from sketch_perceptual.running.checkpoints import keep_whole, load_checkpoint, save_checkpoint
from sketch_perceptual.running.interruption import catch_signals
from sketch_perceptual.running.optimizers import make_lr_scheduler, make_optimizer, plan_steps
from sketch_perceptual.running.options import add_training_options, at_least
from sketch_perceptual.running.startup import check_space, run, start
from sketch_perceptual.running.steps import NonFiniteGuard
from sketch_perceptual.running.trackers import start_trackers
from sketch_perceptual.seeds import generator

logger = get_logger(__name__, log_level="INFO")

FORECAST_STEPS = (2, 6)  # the first steps allocate and compile
FILES = ["config.json", "model.safetensors", "README.md", "metrics.json", "split.json", "curve.png"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count = at_least(1)

    add = parser.add_argument_group("model").add_argument
    add(
        "--attention",
        choices=("cbam", "none"),
        default="cbam",
        help="in place of the first two max-pools; none: VGG-16",
    )
    add("--pool_after_attention", action="store_true", help="keep these pools: a twelfth of the cost, not the paper's")
    add("--spatial_kernel", type=count, default=7, help="width of the spatial attention's convolution")
    add("--reduction", type=count, default=16, help="bottleneck of the channel attention")
    add("--head", choices=("vgg", "linear"), default="vgg", help="classifier: VGG-16's, or one layer for small data")
    add(
        "--init_weights",
        default="imagenet",
        help='"imagenet", a .safetensors with the names of torchvision\'s vgg16, a network saved here, or "none"',
    )
    add(
        "--freeze",
        choices=("convolutions", "features"),
        help="train all but the convolutions, or the classifier alone: the accuracy of untuned features",
    )
    add("--torch_compile", action="store_true", help="compile the network: a slow first step, faster ones after it")

    add = add_class_options(parser, "for validation")
    add("--resolution", type=at_least(32), default=224, help="images are cropped to this width and height, in pixels")

    add_training_options(parser, output_dir="attention-vgg16")
    add = parser.add_argument_group("backbone training").add_argument
    add("--logging_steps", type=count, default=10, help="losses are read and logged every so many steps")
    parser.set_defaults(
        train_batch_size=32,
        num_train_epochs=25,
        lr_warmup_steps=0,
        adam_weight_decay=0.0,
        max_grad_norm=None,
        dataloader_num_workers=4,
        checkpointing_steps=None,
        checkpoints_total_limit=2,
    )

    args = parser.parse_args(argv)
    check_class_options(parser, args)
    return args


def main(args: argparse.Namespace) -> None:
    accelerator = start(args)
    data = load_data(args, accelerator)
    network, untouched, origin = build_network(args, data.classes)
    repo_id = None
    if args.push_to_hub and accelerator.is_main_process:
        repo_id = cards.create_repo(cards.model_name(args.hub_model_id, args.output_dir), args.hub_token)
    train_data, validation_data, split_record = split_data(args, accelerator, data)

    network.to(memory_format=torch.channels_last)
    network.gradient_checkpointing = args.gradient_checkpointing
    if args.torch_compile:
        network.compile()
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    sampler, loader = make_loader(args, train_data, collate)
    optimizer = make_optimizer(args, trainable, fused=True)
    model, prepared_optimizer, loader, validation_loader = accelerator.prepare(
        network, optimizer, loader, make_validation_loader(args, validation_data)
    )
    plan_steps(args, len(loader))
    lr_scheduler = make_lr_scheduler(args, optimizer)
    keep_whole(accelerator, load_backbone)
    settings = resumable_settings(args, accelerator, origin, split_record)
    state = {"global_step": 0, "epoch": 0, "batch": 0, "epoch_sums": [0, 0, 0], "skipped_steps": 0, "history": []}
    state |= load_checkpoint(accelerator, args, settings) or {"settings": settings}
    if "lr_scheduler" in state:
        lr_scheduler.load_state_dict(state["lr_scheduler"])
    guard = NonFiniteGuard(state["skipped_steps"], scaled=accelerator.scaler is not None)
    start_trackers(accelerator, "sketch-backbone", args)
    logger.info(run_summary(args, accelerator, network, len(train_data), len(validation_data)))
    if untouched is not None and not state["global_step"]:
        untouched = accelerator.prepare_model(untouched, evaluation_mode=True)
        state["before_tuning"] = evaluate(accelerator, untouched, validation_loader, data.classes)
        logger.info(f"before tuning: {accuracies(state['before_tuning'])}")
    del untouched

    def save(**place) -> None:
        state.update(place, global_step=step, skipped_steps=guard.total, lr_scheduler=lr_scheduler.state_dict())
        saved = save_checkpoint(accelerator, args, state)
        logger.info(f"saved {saved}")

    stop = catch_signals()
    step = first_step = state["global_step"]
    ledger = Ledger(accelerator.device)
    progress = tqdm(
        total=args.max_train_steps, initial=step, desc="Steps", disable=not accelerator.is_local_main_process
    )
    for epoch in range(state["epoch"], args.num_train_epochs):
        model.train()
        sampler.epoch = epoch
        first = state["batch"]
        batches = loader
        if first:  # accelerate 1.8 trips over a loader with nothing left in it
            batches = accelerator.skip_first_batches(loader, first) if first < len(loader) else []
        for number, batch in enumerate(batches, first):
            if step >= args.max_train_steps:
                break
            with accelerator.accumulate(model):
                draw = generator(args.seed, "dropout", epoch, number, accelerator.process_index)
                torch.manual_seed(draw.initial_seed())
                logits = model(batch["pixel_values"]).float()
                losses = F.cross_entropy(logits, batch["label"], reduction="none")
                accelerator.backward(losses.mean())
                ledger.add(batch["name"], losses.detach(), logits.argmax(1) == batch["label"])
                if not accelerator.sync_gradients:
                    continue
                grad_norm = accelerator.clip_grad_norm_(trainable, args.max_grad_norm or math.inf)
                optimizer.found_inf = (~grad_norm.isfinite()).float()  # a fused optimizer then skips by itself
                prepared_optimizer.step()
                lr_scheduler.step()
                prepared_optimizer.zero_grad()

            ledger.close(step, grad_norm)
            step += 1
            progress.update()
            is_due = args.checkpointing_steps is not None and step % args.checkpointing_steps == 0
            is_last = number + 1 == len(loader) or step == args.max_train_steps
            is_early = step - first_step in FORECAST_STEPS
            is_alone = accelerator.num_processes == 1
            if not (is_due or is_last or is_early or step % args.logging_steps == 0 or (is_alone and stop())):
                continue  # nobody waits for a number
            sums, logs, stopped = ledger.read(accelerator, guard, stop() > 0)
            state["epoch_sums"] = [old + new for old, new in zip(state["epoch_sums"], sums, strict=True)]
            logs["lr"] = lr_scheduler.get_last_lr()[0]
            progress.set_postfix({name: f"{value:.3g}" for name, value in logs.items()}, refresh=False)
            accelerator.log(logs, step)
            if step - first_step == FORECAST_STEPS[1]:
                logger.info(
                    cost_forecast(args, network, logs["images_per_second"], len(train_data), len(validation_data))
                )
            if is_due or stopped:
                save(epoch=epoch, batch=number + 1)
                ledger.restart_clock()
            if stopped:
                logger.warning(f"interrupted after step {step}; go on with --resume_from_checkpoint latest")
                accelerator.end_training()
                sys.exit(128 + (stop() or 15))

        loss, correct, images = state["epoch_sums"]
        found = evaluate(accelerator, model, validation_loader, data.classes)
        record = {"epoch": epoch + 1, "step": step, "train_loss": loss / images, "train_top1": correct / images}
        state["history"].append(record | found)
        accelerator.log({"epoch": epoch + 1} | {f"validation_{k}": found[k] for k in ("loss", "top1", "top5")}, step)
        logger.info(f"epoch {epoch + 1}: train loss {record['train_loss']:.3f}, validation {accuracies(found)}")
        if accelerator.is_main_process:
            report(args, accelerator.unwrap_model(model), state, split_record)
        state["epoch_sums"] = [0, 0, 0]
        if args.checkpointing_steps is None:
            save(epoch=epoch + 1, batch=0)
        state["batch"] = 0
        ledger.restart_clock()

    progress.close()
    if accelerator.is_main_process:
        finish(args, accelerator.unwrap_model(model), state, guard)
        if repo_id:
            cards.push(Path(args.output_dir, "best"), repo_id, FILES, args.hub_token)
    accelerator.end_training()


class Ledger:
    """What the steps since the last look did; it stays on the device, so that no step waits for a number."""

    def __init__(self, device: torch.device):
        self.sums, self.steps, self.seen = torch.zeros(3, device=device), [], []
        self.restart_clock()

    def restart_clock(self) -> None:
        self.clock = time.perf_counter()

    def add(self, names: list[str], losses: torch.Tensor, hits: torch.Tensor) -> None:
        finite = losses.isfinite()
        self.sums += torch.stack([torch.where(finite, losses, 0).sum(), hits.sum(), finite.sum()])
        self.seen.append((names, losses))

    def close(self, step: int, grad_norm: torch.Tensor) -> None:
        self.steps.append((step, grad_norm, self.seen))
        self.seen = []

    def read(self, accelerator: Accelerator, guard: NonFiniteGuard, stop: bool) -> tuple[list, dict, bool]:
        """Sums over all processes of loss, hits and images; what to log; whether any process was told to stop."""
        *sums, stopped = accelerator.reduce(torch.cat([self.sums, self.sums.new_tensor([stop])]), "sum").tolist()
        norms = torch.stack([norm for _, norm, _ in self.steps]).tolist()
        elapsed = time.perf_counter() - self.clock
        for norm, (step, _, seen) in zip(norms, self.steps, strict=True):
            guard.is_finite(step, [norm], seen)
        logs = {
            "train_loss": sums[0] / max(1, sums[2]),
            "grad_norm": norms[-1],
            "images_per_second": sums[2] / elapsed,
        }
        self.sums, self.steps = torch.zeros_like(self.sums), []
        self.restart_clock()
        return sums, logs | ({"skipped_steps": guard.total} if guard.total else {}), stopped > 0


def load_data(args, accelerator: Accelerator) -> LabelledImages:
    return load_labelled(args, accelerator, resolution=args.resolution, seed=args.seed)


def split_data(args, accelerator: Accelerator, data: LabelledImages) -> tuple[LabelledImages, LabelledImages, dict]:
    """Training and validation images, each of which has been read once, and the split as it is saved."""
    data, keys, copies = read_once(args, accelerator, data)
    result = split(data.labels, keys, copies, data.groups, args.validation_share)
    logger.info(result.summary)
    validation_data = data.select(result.validation)
    validation_data.augment = False
    return data.select(result.train), validation_data, describe_split(args, result, keys)


def make_validation_loader(args, data: LabelledImages) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(
        data,
        args.train_batch_size,
        sampler=[(0, index) for index in range(len(data))],
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
    )


def collate(examples: list[dict]) -> dict:
    images = torch.stack([example["pixel_values"] for example in examples])
    return {
        "pixel_values": images.contiguous(memory_format=torch.channels_last),
        "label": torch.tensor([example["label"] for example in examples]),
        "name": [example["name"] for example in examples],
    }


def build_network(args, classes: list[str]) -> tuple[AttentionVGG16, AttentionVGG16 | None, dict]:
    """The network to train; the one its weights come from, if that one knows these classes; where they come from."""
    set_seed(args.seed)  # new weights depend on the seed alone
    network = AttentionVGG16(
        args.attention,
        args.pool_after_attention,
        len(classes),
        args.spatial_kernel,
        args.reduction,
        args.head,
        classes,
    )
    source, untouched, new = args.init_weights, None, list(network.state_dict())
    if is_vgg16_weights(source):
        new = network.load_vgg16(source)
        if are_imagenets(classes):
            untouched = AttentionVGG16("none", classes=classes)
            untouched = None if untouched.load_vgg16(source) else untouched
    elif source != "none":
        saved = load_backbone(source)
        new = take_over(network, saved, source)
        untouched = saved if saved.classes == classes else None
    if args.freeze is not None:
        for name, parameter in network.features.named_parameters():
            parameter.requires_grad_(args.freeze == "convolutions" and ".attention." in name)
    convolutions = torch.nn.ModuleList(layer for layer in network.features if isinstance(layer, torch.nn.Conv2d))
    origin = {
        "init_weights": "torchvision's vgg16, IMAGENET1K_V1" if source == "imagenet" else Path(source).name,
        "init_convolutions": fingerprint(convolutions),
        "init_all": fingerprint(network),
        "new_weights": ", ".join(sorted({name.split(".weight")[0].split(".bias")[0] for name in new})) or "none",
    }
    return network, untouched, origin


def take_over(network: AttentionVGG16, saved: AttentionVGG16, source: str) -> list[str]:
    """Copy a saved network's weights; the names of what stays new, a classifier of other classes."""
    for name in ("attention", "pool_after_attention", "last_layer"):
        if getattr(saved, name) != getattr(network, name):
            raise InputError(
                f"--init_weights {source} was saved with {name}={getattr(saved, name)}, this run has"
                f" {name}={getattr(network, name)}"
            )
    own, theirs = network.state_dict(), saved.state_dict()
    same_head = saved.classes == network.classes and saved.head == network.head
    taken = {name: weight for name, weight in theirs.items() if same_head or not name.startswith("classifier.")}
    if wrong := [name for name, weight in taken.items() if weight.shape != own[name].shape]:
        raise InputError(f"--init_weights {source}: {wrong[0]} is of another shape; see --spatial_kernel, --reduction")
    network.load_state_dict(own | taken)
    return [name for name in own if name not in taken]


def resumable_settings(args, accelerator: Accelerator, origin: dict, split_record: dict) -> dict:
    """What a resumed run must share with the run that it continues."""
    names = """attention pool_after_attention spatial_kernel reduction head freeze dataset_name train_data_dir
        group_column validation_share resolution seed train_batch_size gradient_accumulation_steps"""
    settings = {name: getattr(args, name) for name in names.split()} | origin
    for name in ("train_images", "validation_images"):
        settings[name] = split_record[name]
    return settings | {"split": split_hash(split_record), "processes": accelerator.num_processes}


def run_summary(args, accelerator: Accelerator, network: AttentionVGG16, train: int, validation: int) -> str:
    """What will be trained and written; InputError if the disk cannot hold it."""
    weights = sum(parameter.numel() for parameter in network.parameters())
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    every = args.checkpointing_steps or math.ceil(args.max_train_steps / args.num_train_epochs)
    saves, beside = math.ceil(args.max_train_steps / every), 3  # best, last, and the one that replaces either
    space = check_space(args, saves, 4 * weights + 8 * trained, beside * 4 * weights)
    return (
        f"{train} images to train on, {validation} to validate; {args.max_train_steps} steps of"
        f" {args.train_batch_size} x {accelerator.num_processes} x {args.gradient_accumulation_steps} images, seed"
        f" {args.seed}\n{trained / 1e6:.1f} of {weights / 1e6:.1f} M weights are trained; {space}"
    )


def cost_forecast(args, network: AttentionVGG16, images_per_second: float, train: int, validation: int) -> str:
    """Time and memory as the first steps foretell them, and what makes them less."""
    epoch = (train + validation / 3) / images_per_second  # validation is the forward pass alone
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
    total = epoch * args.max_train_steps / math.ceil(args.max_train_steps / args.num_train_epochs)
    lines = [
        f"{images_per_second:.1f} images a second: {duration(epoch)} an epoch, {duration(total)} in all;"
        f" {memory / 1e9:.1f} GB of memory"
    ]
    if network.attention == "cbam" and not network.pool_after_attention:
        lines.append("without its first two pools the network costs 12 x VGG-16; --pool_after_attention keeps them")
        if not args.gradient_checkpointing:
            lines.append("--gradient_checkpointing needs less memory, for a third more time")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{seconds / 60:.1f} minutes"


@torch.no_grad()
def evaluate(accelerator: Accelerator, model, loader, classes: list[str]) -> dict:
    """Loss, top-1, top-5 and the ten worst classes over all images of `loader`, whatever the number of processes."""
    was_training = model.training
    model.eval()
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.long, device=accelerator.device)
    loss = hits = 0
    for batch in loader:
        logits = model(batch["pixel_values"]).float()
        losses = F.cross_entropy(logits, batch["label"], reduction="none")
        top = logits.topk(min(5, len(classes))).indices
        losses, top, labels = accelerator.gather_for_metrics((losses, top, batch["label"]))
        confusion.index_put_((labels, top[:, 0]), torch.ones_like(labels), accumulate=True)
        loss, hits = loss + losses.sum(), hits + (top == labels[:, None]).sum()
    model.train(was_training)
    images = int(confusion.sum())
    return {
        "loss": float(loss) / images,
        "top1": int(confusion.trace()) / images,
        "top5": int(hits) / images,
        "worst_classes": worst_classes(confusion.cpu(), class_names(classes)),
    }


def worst_classes(confusion: torch.Tensor, names: list[str], count: int = 10) -> list[dict]:
    """The classes most often mistaken, and for what."""
    totals, right = confusion.sum(1), confusion.diagonal()
    wrong = confusion - torch.diag(right)
    rates = torch.where(totals > 0, right / totals, 2)
    return [
        {
            "class": names[index],
            "images": int(totals[index]),
            "top1": float(rates[index]),
            "taken_for": names[int(wrong[index].argmax())],
            "times": int(wrong[index].max()),
        }
        for index in rates.argsort(stable=True)[:count].tolist()
        if rates[index] < 1
    ]


def accuracies(found: dict) -> str:
    return f"top-1 {found['top1']:.1%}, top-5 {found['top5']:.1%}"


def report(args, network: AttentionVGG16, state: dict, split_record: dict) -> None:
    """Keep the network if it is the best so far, and all that is to be told of it, in `best/`."""
    folder, best = Path(args.output_dir, "best"), best_epoch(state)
    if best is state["history"][-1]:
        save_network(network, folder)
    metrics = {"best": best} | {
        name: state[name] for name in ("history", "before_tuning", "settings") if name in state
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2), encoding="utf-8")
    (folder / "split.json").write_text(json.dumps(split_record, indent=1), encoding="utf-8")
    learning_curve(state["history"]).savefig(folder / "curve.png")
    write_card(args, folder, network, state, split_record)


def best_epoch(state: dict) -> dict:
    """The first of those with the highest validation accuracy (Algorithm 1)."""
    return max(state["history"], key=lambda record: record["top1"])


def save_network(network: AttentionVGG16, folder: Path) -> None:
    """Write the network, calibrated, aside, then move its files into `folder`, so that none is ever half there."""
    network.calibration = {}
    calibrate(network, network.tap_index)
    partial = folder.with_name(f".{folder.name}.partial")
    network.save_pretrained(partial)
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        os.replace(partial / name, folder / name)
    shutil.rmtree(partial)


def finish(args, network: AttentionVGG16, state: dict, guard: NonFiniteGuard) -> None:
    save_network(network, Path(args.output_dir, "last"))
    best = best_epoch(state)
    for worst in best["worst_classes"]:
        logger.info(
            f"{worst['class']}: {worst['top1']:.0%} of {worst['images']} right, {worst['times']} taken for"
            f" {worst['taken_for']}"
        )
    if guard.total:
        logger.warning(f"{guard.total} steps were skipped: their loss or gradient was not finite")
    logger.info(f"best epoch {best['epoch']}: {accuracies(best)}")
    print(Path(args.output_dir, "best"))


def write_card(args, folder: Path, network: AttentionVGG16, state: dict, split_record: dict) -> None:
    best, settings = best_epoch(state), dict(state["settings"])
    where = args.hub_model_id or "path/to/this/folder"
    on_hub = cards.dataset_id(args.dataset_name)
    settings = {k: v for k, v in settings.items() if k not in ("dataset_name", "train_data_dir")}
    kind = "VGG-16" if args.attention == "none" else "VGG-16 with attention in place of its first two max-pools"
    if args.pool_after_attention:
        kind = "VGG-16 with attention before its first two max-pools"
    apart = f" by {args.group_column}" if args.group_column else ""
    before = f" Before tuning: {accuracies(state['before_tuning'])}." if "before_tuning" in state else ""
    snippet = f"""import torch
from sketch_perceptual import AttentionVGG16, PerceptualLoss

network = AttentionVGG16.from_pretrained("{where}").eval()
images, target = torch.rand(2, 1, 3, {args.resolution}, {args.resolution}) * 2 - 1  # RGB in [-1, 1]
print(network.classes[network(images).argmax()])
print(PerceptualLoss(network)(images, target))"""
    cards.write_card(
        folder,
        data=ModelCardData(
            license="apache-2.0",
            library_name="sketch-perceptual",
            pipeline_tag="image-classification",
            datasets=on_hub and [on_hub],
            tags=["sketch", "perceptual-loss", "vgg16", "attention"],
        ),
        title=f"Sketch backbone - {cards.model_name(args.hub_model_id, args.output_dir)}",
        description=f"{kind} (Seo 2025), tuned to tell {len(network.classes)} classes of drawings apart, on"
        f" {on_hub or 'a data set of its own'}. On {split_record['validation_images']} drawings kept apart{apart},"
        f" which share no copy with the {split_record['train_images']} trained on: {accuracies(best)} after epoch"
        f" {best['epoch']} of {args.num_train_epochs}.{before} {split_record['summary']}.",
        snippet=snippet,
        options=settings | {"learning_rate": args.learning_rate, "lr_scheduler": args.lr_scheduler},
        pictures=["curve.png"],
    )


if __name__ == "__main__":
    run(main, parse_args())
