#!/usr/bin/env python
"""Tune (attention-)VGG-16 to classify drawings: the backbone of the perceptual loss (Seo 2025, section 3).

    python train_backbone.py --mixed_precision bf16 \\
      --train_data_dir ImageNet-Sketch/sketch --dataloader_num_workers 8 --seed 42 --output_dir attention-vgg16

Defaults are Algorithm 1 of the paper: ImageNet weights, the first two max-pools replaced by attention, 90/10, random
resized crops of 224 px, Adam without weight decay, batches of 32, 25 epochs. `best/` holds the network of the epoch
with the best validation accuracy, `last/` that of the last; both load with `AttentionVGG16.from_pretrained` and go
into `train_lora_sketch.py --backbone`.
"""

import json
import math
import shutil
import time
from pathlib import Path

from sketch_perceptual.extras import require

require("train")

import psutil
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from huggingface_hub import ModelCardData
from PIL import Image
from tqdm.auto import tqdm

from sketch_perceptual.cli import entry
from sketch_perceptual.cli.arguments import Options, Parser, at_least
from sketch_perceptual.cli.interruption import ignore_in_worker
from sketch_perceptual.data.class_names import are_imagenets, class_names
from sketch_perceptual.data.datasets import LabelledImages
from sketch_perceptual.data.loaders import make_loader
from sketch_perceptual.data.options import add_class_options, check_class_options
from sketch_perceptual.errors import InputError
from sketch_perceptual.figures import learning_curve
from sketch_perceptual.files import replacing
from sketch_perceptual.losses import calibrate
from sketch_perceptual.networks.backbone import AttentionVGG16, is_vgg16_weights, load_backbone
from sketch_perceptual.networks.hub_model import fingerprint
from sketch_perceptual.training import cards, hub
from sketch_perceptual.training.labelled import open_drawings, preview_drawings, read_drawings
from sketch_perceptual.training.optimizer import make_lr_scheduler, make_optimizer, make_steps
from sketch_perceptual.training.options import add_training_options
from sketch_perceptual.training.run import Run
from sketch_perceptual.training.startup import check_space, start
from sketch_perceptual.training.steps import Meter, Steps
from sketch_perceptual.training.trackers import start_trackers, track_images, track_text

logger = get_logger(__name__, log_level="INFO")

FORECAST_STEPS = (2, 6)  # the first steps allocate and compile
KINDS = {  # by attention, and whether the first two max-pools are there
    ("none", True): "VGG-16",
    ("identity", True): "VGG-16",
    ("identity", False): "VGG-16 without its first two max-pools",
    ("cbam", False): "VGG-16 with attention in place of its first two max-pools",
    ("cbam", True): "VGG-16 with attention before its first two max-pools",
}
ARCHITECTURE = ("attention", "pool_after_attention", "open_gates", "spatial_kernel", "reduction")
FILES = ["config.json", "model.safetensors", "README.md", "metrics.json", "split.json", "curve.png"]


def parse_args(argv: list[str] | None = None) -> Options:
    parser = Parser(description=__doc__)
    count = at_least(1)

    add = parser.group("model")
    add(
        "--attention",
        shared=False,
        fixed=True,
        choices=("cbam", "identity", "none"),
        help="in place of the first two max-pools; identity: nothing, the control; none: VGG-16; default: cbam",
    )
    add(
        "--pool_after_attention",
        shared=False,
        fixed=True,
        action="store_true",
        default=None,
        help="keep the two max-pools: a twelfth of the cost, not the paper's network",
    )
    add(
        "--open_gates",
        shared=False,
        action="store_true",
        default=None,
        help="initialise the attention gates to identity instead of randomly (not the paper)",
    )
    add(
        "--spatial_kernel",
        shared=False,
        fixed=True,
        type=count,
        help="kernel size of the spatial attention; default: 7",
    )
    add(
        "--reduction",
        shared=False,
        fixed=True,
        type=count,
        help="reduction ratio of the channel attention; default: 16",
    )
    add(
        "--head",
        fixed=True,
        choices=("vgg", "linear"),
        default="vgg",
        help="classifier: VGG-16's, or one layer for small data",
    )
    add(
        "--init_weights",
        shared=False,
        default="imagenet",
        help='"imagenet", a .safetensors with the names of torchvision\'s vgg16, "none", or a saved network, whose'
        ' attention is kept: a folder, a Hub id, or "bundled", the one that comes with the package',
    )
    add(
        "--freeze",
        fixed=True,
        choices=("convolutions", "features"),
        help="train all but the convolutions, or only the classifier: the accuracy of untuned features",
    )
    add("--torch_compile", action="store_true", help="compile the network: slow first step, faster training")

    add = add_class_options(parser, "used for validation")
    add("--resolution", type=at_least(32), default=224, help="size of the square training crops, in pixels")

    add_training_options(parser, output_dir="attention-vgg16")
    add = parser.group("backbone training")
    add("--logging_steps", shared=False, type=count, default=10, help="log every N optimizer steps")
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


def main(args: Options) -> None:
    if preview_drawings(args, resolution=args.resolution):
        return
    run = start(args)
    accelerator = run.accelerator
    data = open_drawings(args, run.seed, resolution=args.resolution)
    network, untouched, origin = build_network(args, data.classes, run.seed)
    drawings = read_drawings(args, accelerator, data)
    run.settle(**drawings.identity(), **origin)
    train_data, validation_data = (
        drawings.data.select(rows) for rows in (drawings.split.train, drawings.split.validation)
    )
    validation_data.augment = False
    hub.create_repo(args, run)
    start_trackers(accelerator, "sketch-backbone", args)

    network.to(memory_format=torch.channels_last)
    network.gradient_checkpointing = args.gradient_checkpointing
    if args.torch_compile:
        network.compile()
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    workers = {"num_workers": args.dataloader_num_workers, "worker_init_fn": ignore_in_worker}
    loader, sampler = make_loader(train_data, args.train_batch_size, run.seed, collate, **workers)
    optimizer = make_optimizer(args, trainable, fused=True)
    model, prepared_optimizer, loader, validation_loader = accelerator.prepare(
        network, optimizer, loader, make_validation_loader(validation_data, args.train_batch_size, **workers)
    )
    steps = make_steps(args, run, loader, sampler)
    lr_scheduler = make_lr_scheduler(args, run, optimizer, steps)
    meter = Meter(accelerator)
    logger.info(run_summary(args, run, steps, network, len(train_data), len(validation_data)))
    run.state = {"history": []} | run.state
    score_untouched(run, untouched, validation_loader, data.classes)
    del untouched
    results = Results(run, drawings.record, args.init_weights)
    checkpoint = Checkpoint(accelerator, network, results.folder)
    run.begin(steps, meter, optimizer, checkpoint.save, checkpoint.load, lr_scheduler)

    if steps.at_epoch_end and steps.done > last_scored(run.state):  # the run ended before it was scored
        results.end_epoch(model, validation_loader)
    model.train()
    clock = Clock(steps)
    with run.training():
        for batch in steps:
            with accelerator.accumulate(model):
                torch.manual_seed(steps.rng("dropout").initial_seed())
                logits = model(batch["pixel_values"]).float()
                losses = F.cross_entropy(logits, batch["label"], reduction="none")
                accelerator.backward(losses.mean())
                meter.add(batch["name"], {"loss": losses, "hits": logits.argmax(1) == batch["label"]})
                if not accelerator.sync_gradients:
                    continue
                grad_norm = accelerator.clip_grad_norm_(trainable, args.max_grad_norm or math.inf)
                vars(optimizer)["found_inf"] = (
                    ~grad_norm.isfinite()
                ).float()  # a fused optimizer then skips by itself
                meter.close(steps.done, grad_norm)
                prepared_optimizer.step()
                lr_scheduler.step()
                prepared_optimizer.zero_grad()

            steps.advance()
            stopped = run.stopped()
            is_due = steps.due(args.checkpointing_steps) or (steps.at_epoch_end and args.checkpointing_steps is None)
            if steps.due(args.logging_steps) or steps.at_epoch_end or is_due or stopped or clock.is_early():
                run.log(read_meter(run, lr_scheduler, clock))  # at no other step anybody waits for a number
            if clock.is_over():
                images = len(train_data) + len(validation_data) / 3  # validation is only the forward pass
                logger.info(cost_forecast(network, steps, images / clock.images_per_second, clock.images_per_second))
            if steps.at_epoch_end:
                results.end_epoch(model, validation_loader)
            run.end_step(is_due, stopped)
            if is_due or steps.at_epoch_end:
                clock.restart()

    with run.finishing():
        if accelerator.is_main_process:
            results.finish(accelerator.unwrap_model(model))
    run.close()
    hub.push(args, run, results.folder, FILES)


class Clock:
    """Images a second since the last look, and the first steps, which tell what the run will take."""

    def __init__(self, steps: Steps):
        self.steps, self.first, self.images_per_second = steps, steps.done, 0.0
        self.restart()

    def restart(self) -> None:
        self.since = time.perf_counter()

    def read(self, images: float) -> float:
        self.images_per_second = images / (time.perf_counter() - self.since)
        self.restart()
        return self.images_per_second

    def is_early(self) -> bool:
        return self.steps.done - self.first in FORECAST_STEPS

    def is_over(self) -> bool:
        return self.steps.done - self.first == FORECAST_STEPS[1]


class Checkpoint:
    """The network, and the best of the epochs before, without which a run cannot go on."""

    def __init__(self, accelerator: Accelerator, network: AttentionVGG16, best: Path):
        self.accelerator, self.network, self.best = accelerator, network, best

    def save(self, folder: Path) -> None:
        self.network.save_pretrained(folder)
        if self.best.is_dir():
            shutil.copytree(self.best, folder / "best")

    def load(self, folder: Path) -> None:
        self.network.load_state_dict(load_backbone(folder).state_dict())
        if self.accelerator.is_main_process and (folder / "best").is_dir():
            with replacing(self.best) as partial:
                shutil.copytree(folder / "best", partial, dirs_exist_ok=True)


class Results:
    """Scores of each epoch, and the files of the best network and the last one.

    Args:
        split_record: the split as it is saved.
        init_weights: of the option.
    """

    def __init__(self, run: Run, split_record: dict, init_weights: str):
        self.run, self.split_record, self.folder = run, split_record, run.folder / "best"
        is_imagenet = init_weights == "imagenet"
        self.init_weights = "torchvision's vgg16, IMAGENET1K_V1" if is_imagenet else Path(init_weights).name

    def end_epoch(self, model, validation_loader) -> None:
        """Score the network and keep it if it is the best so far."""
        run = self.run
        network = run.accelerator.unwrap_model(model)
        results = evaluate(run.accelerator, model, validation_loader, network.classes)
        sums = run.meter.start_epoch()
        images, epoch = sums["rows"], run.steps.epoch + 1
        record = {
            "epoch": epoch,
            "step": run.steps.done,
            "train_loss": sums["loss"] / images if images else None,  # None: no step of the epoch was finite
            "train_top1": sums["hits"] / images if images else None,
        }
        run.state["history"].append(record | results)
        run.log({"epoch": epoch} | {f"validation_{name}": results[name] for name in ("loss", "top1", "top5")})
        train_loss = f"train loss {record['train_loss']:.3f}, " if images else ""
        logger.info(f"epoch {epoch}: {train_loss}validation {accuracies(results)}")
        run.check_weights()
        if run.accelerator.is_main_process:
            self.write(network)

    def write(self, network: AttentionVGG16) -> None:
        """Write the network if it is the best so far, and its metrics and card."""
        run, folder, best = self.run, self.folder, best_epoch(self.run.state)
        if best is run.state["history"][-1]:
            save_network(network, folder)
        metrics = {"best": best} | {
            name: run.state[name] for name in ("history", "before_tuning") if name in run.state
        }
        metrics |= {"settings": {"init_weights": self.init_weights} | run.identity, "changes": run.changes}
        with replacing(folder) as partial:
            (partial / "metrics.json").write_text(json.dumps(metrics, indent=2), encoding="utf-8")
            (partial / "split.json").write_text(json.dumps(self.split_record, indent=1), encoding="utf-8")
            learning_curve(run.state["history"]).savefig(partial / "curve.png")
            self.write_card(partial, network)
        with Image.open(folder / "curve.png") as curve:
            track_images(
                run.accelerator, "learning curve", {"loss and accuracy": [curve.convert("RGB")]}, run.steps.done
            )
        confusions = worst_table(run.state["history"][-1]["worst_classes"])
        track_text(run.accelerator, "worst classes", confusions, run.steps.done)

    def finish(self, network: AttentionVGG16) -> None:
        """Write the last network, and print the best epoch and its worst classes."""
        run, folder = self.run, self.folder
        save_network(network, run.folder / "last")
        best = best_epoch(run.state)
        for worst in best["worst_classes"]:
            logger.info(
                f"{worst['class']}: {worst['top1']:.0%} of {worst['images']} right, {worst['times']} taken for"
                f" {worst['taken_for']}"
            )
        if run.meter.skipped:
            logger.warning(f"{run.meter.skipped} steps were skipped: their loss or gradient was not finite")
        logger.info(f"best epoch {best['epoch']}: {accuracies(best)}")
        uses = {
            "model.safetensors": f"for PerceptualLoss({str(folder)!r}), or --backbone {folder}",
            "metrics.json": "accuracies of all epochs, worst classes and settings",
            "curve.png": "loss and accuracy by epoch",
        }
        print(cards.listing(folder, uses))

    def write_card(self, folder: Path, network: AttentionVGG16) -> None:
        run, split_record = self.run, self.split_record
        size = network.settings["resolution"]
        best, before = best_epoch(run.state), run.state.get("before_tuning")
        where = run.hub_model_id or "path/to/this/folder"
        (on_hub,) = run.card_data["datasets"] or [None]
        kind = KINDS[network.attention, network.pool_after_attention or network.attention == "none"]
        apart = f" by {split_record['group_column']}" if split_record["group_column"] else ""
        before = f" Before tuning: {accuracies(before)}." if before else ""
        snippet = f"""from sketch_perceptual import AttentionVGG16, PerceptualLoss, to_tensor
from sketch_perceptual.drawings import draw

network = AttentionVGG16.from_pretrained("{where}").eval()
cat, boat = (to_tensor(draw(name, 0, size={size}))[None] for name in ("cat", "boat"))  # in [-1, 1]
print(network.classes[network(cat).argmax()])
print(PerceptualLoss(network)(cat, boat))  # about 1 for unrelated drawings"""
        cards.write_card(
            folder,
            data=ModelCardData(
                **run.card_data,
                library_name="sketch-perceptual",
                pipeline_tag="image-classification",
                tags=["sketch", "perceptual-loss", "vgg16", "attention"],
            ),
            title=f"Sketch backbone - {cards.model_name(run.hub_model_id, run.folder)}",
            description=f"{kind} (Seo 2025), tuned to tell {network.num_classes} classes of drawings apart, on"
            f" {on_hub or 'a data set of its own'}. On {split_record['validation_images']} held-out drawings{apart},"
            f" which share no copy with the {split_record['train_images']} trained on: {accuracies(best)} after epoch"
            f" {best['epoch']} of {run.steps.epochs}.{before} {split_record['summary']}.",
            snippet=snippet,
            options={"init_weights": self.init_weights} | run.record(),
            pictures=["curve.png"],
        )


def make_validation_loader(data: LabelledImages, batch_size: int, **workers) -> torch.utils.data.DataLoader:
    sampler = [(0, index) for index in range(len(data))]
    return torch.utils.data.DataLoader(data, batch_size, sampler=sampler, collate_fn=collate, **workers)


def collate(examples: list[dict]) -> dict:
    images = torch.stack([example["pixel_values"] for example in examples])
    return {
        "pixel_values": images.contiguous(memory_format=torch.channels_last),
        "label": torch.tensor([example["label"] for example in examples]),
        "name": [example["name"] for example in examples],
    }


def build_network(args, classes: list[str], seed: int) -> tuple[AttentionVGG16, AttentionVGG16 | None, dict]:
    """The network to train; the one its weights come from, if that one knows these classes; where they come from."""
    source = args.init_weights
    saved = None if source == "none" or is_vgg16_weights(source) else load_backbone(source)
    settings = network_settings(args, saved)
    set_seed(seed)  # new weights depend only on the seed
    network = AttentionVGG16(
        num_classes=len(classes), head=args.head, classes=classes, resolution=args.resolution, **settings
    )
    untouched, new = None, list(network.state_dict())
    if saved is not None:
        new = take_over(network, saved)
        untouched = saved if saved.classes == classes else None
    elif source != "none":
        new = network.load_vgg16(source)
        if are_imagenets(classes):
            untouched = AttentionVGG16("none", classes=classes)
            untouched = None if untouched.load_vgg16(source) else untouched
    if args.freeze is not None:
        for name, parameter in network.features.named_parameters():
            parameter.requires_grad_(args.freeze == "convolutions" and ".attention." in name)
    convolutions = torch.nn.ModuleList(layer for layer in network.features if isinstance(layer, torch.nn.Conv2d))
    origin = {
        "init_convolutions": fingerprint(convolutions),
        "init_all": fingerprint(network),
        "new_weights": ", ".join(sorted({name.split(".weight")[0].split(".bias")[0] for name in new})) or "none",
    }
    return network, untouched, {name: network.settings[name] for name in ARCHITECTURE} | origin


def network_settings(args, saved: AttentionVGG16 | None) -> dict:
    """Return the architecture that the options name, or that of the `saved` network; InputError if they differ."""
    given = {name: vars(args)[name] for name in ARCHITECTURE if vars(args)[name] is not None}
    if saved is None:
        return given
    kept = {name: saved.settings[name] for name in (*ARCHITECTURE, "last_layer")}
    for name, value in given.items():
        if value != kept[name]:
            raise InputError(
                f"`init_weights` {args.init_weights} was saved with {name}={kept[name]}, this run has {name}={value}"
            )
    return kept


def take_over(network: AttentionVGG16, saved: AttentionVGG16) -> list[str]:
    """Copy a saved network's weights; the names of what stays new, a classifier of other classes."""
    own, same_head = network.state_dict(), saved.classes == network.classes and saved.head == network.head
    taken = {name: w for name, w in saved.state_dict().items() if same_head or not name.startswith("classifier.")}
    network.load_state_dict(own | taken)
    return [name for name in own if name not in taken]


def score_untouched(run: Run, untouched: AttentionVGG16 | None, loader, classes: list[str]) -> None:
    """Keep the scores of the network before tuning, if it already knows these classes."""
    if untouched is None or "before_tuning" in run.state:
        return
    untouched = run.accelerator.prepare_model(untouched, evaluation_mode=True)
    run.state["before_tuning"] = evaluate(run.accelerator, untouched, loader, classes)
    logger.info(f"before tuning: {accuracies(run.state['before_tuning'])}")


def read_meter(run: Run, lr_scheduler, clock: Clock) -> dict[str, float]:
    """Return the logs of the steps since the last reading."""
    totals = run.meter.read()
    logs = {"grad_norm": totals["grad_norm"], "lr": lr_scheduler.get_last_lr()[0]}
    logs["images_per_second"] = clock.read(totals["rows"])
    if totals["rows"]:
        logs["train_loss"] = totals["loss"] / totals["rows"]
    return logs | ({"skipped_steps": run.meter.skipped} if run.meter.skipped else {})


def run_summary(args, run: Run, steps: Steps, network: AttentionVGG16, train: int, validation: int) -> str:
    """Describe the training and the files to be written; InputError if the disk cannot hold them."""
    weights = sum(parameter.numel() for parameter in network.parameters())
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    saves = math.ceil(steps.total / (args.checkpointing_steps or steps.ends[0]))
    checkpoint, beside = 8 * weights + 8 * trained, 3  # best, last, and the one that replaces either
    space = check_space(args.output_dir, saves, args.checkpoints_total_limit, checkpoint, beside * 4 * weights)
    return (
        f"{train} images to train on, {validation} to validate; {steps.total} steps of"
        f" {args.train_batch_size} x {run.accelerator.num_processes} x {args.gradient_accumulation_steps} images, seed"
        f" {run.seed}\n{trained / 1e6:.1f} of {weights / 1e6:.1f} M weights are trained; {space}"
    )


def cost_forecast(network: AttentionVGG16, steps: Steps, epoch: float, images_per_second: float) -> str:
    """Time and memory as estimated from the first steps, and what reduces them; `epoch` in seconds."""
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
    total = epoch * steps.total / steps.ends[0]
    lines = [
        f"{images_per_second:.1f} images a second: {duration(epoch)} an epoch, {duration(total)} in all;"
        f" {memory / 1e9:.1f} GB of memory"
    ]
    if network.attention != "none" and not network.pool_after_attention:
        lines.append("without its first two pools the network costs 12 x VGG-16; --pool_after_attention keeps them")
        if not network.gradient_checkpointing:
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
    for batch in tqdm(loader, "Validation", leave=False, disable=None if accelerator.is_main_process else True):
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


def worst_table(classes: list[dict]) -> str:
    """The worst classes as a table in Markdown."""
    names = ("class", "images", "top1", "taken_for", "times")
    rows = [[f"{row[name]:.0%}" if name == "top1" else str(row[name]) for name in names] for row in classes]
    return cards.markdown_table([list(names), *rows])


def last_scored(state: dict) -> int:
    """Return the step after which the network was last scored, 0 if never."""
    return state["history"][-1]["step"] if state["history"] else 0


def best_epoch(state: dict) -> dict:
    """The first of those with the highest validation accuracy (Algorithm 1)."""
    return max(state["history"], key=lambda record: record["top1"])


def save_network(network: AttentionVGG16, folder: Path) -> None:
    """Write the network, calibrated."""
    network.calibration = {}
    calibrate(network, network.tap_index)
    with replacing(folder) as partial:
        network.save_pretrained(partial)


if __name__ == "__main__":
    entry.run(main, parse_args())
