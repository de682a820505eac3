#!/usr/bin/env python
"""Train Johnson's network to draw photos in the style of sketches (Johnson et al. 2016; Seo 2025, section 4.1).

    python train_johnson.py --mixed_precision bf16 \\
      --train_data_dir train2017 --style sketches --seed 42 --output_dir sketch-style

Content is any folder of photos, COCO's train2017 in the paper; style is a drawing, a folder of them, or the training
sketches of a paired set, CUFS or FS2K (`--paired_data_dir`), whose photos are then the content if no other is named.
The network learns to keep the content (relu2_2) and to reach the Gram matrices of the style (relu1_2 to relu4_3), as
the attention-VGG that comes with the package sees them, or another `--backbone`. Defaults are the paper's: 256 px,
batches of 4, Adam at 1e-3, one epoch. `sketch-perceptual stylize` then converts pictures.
"""

import argparse
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from sketch_perceptual.extras import require

require("train")

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from huggingface_hub import ModelCardData
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from sketch_perceptual.cli import entry
from sketch_perceptual.cli.arguments import Options, Parser, at_least
from sketch_perceptual.cli.interruption import ignore_in_worker, interruptible
from sketch_perceptual.data.datasets import CaptionedImages, Images
from sketch_perceptual.data.folders import find_images
from sketch_perceptual.data.hf_dataset import image_column_of, load_rows
from sketch_perceptual.data.images import fit_image, to_pil, to_tensor
from sketch_perceptual.data.loaders import make_loader
from sketch_perceptual.data.options import add_data_options, choose_samples
from sketch_perceptual.data.paired import find_pairs
from sketch_perceptual.data.preview import fitted, sheet_rows, write_sheet
from sketch_perceptual.data.scan import Contents, read_once, readable, report_scan, scan
from sketch_perceptual.data.scan_cache import BLANK
from sketch_perceptual.errors import InputError, TrainingError, first_line, has_complained
from sketch_perceptual.figures import image_grid
from sketch_perceptual.files import replacing
from sketch_perceptual.losses import DEFAULT_LAYERS, StyleLoss, gram_matrix, total_variation
from sketch_perceptual.networks.backbone import BUNDLED, AttentionVGG16, load_backbone
from sketch_perceptual.networks.hub_model import fingerprint
from sketch_perceptual.networks.style_net import NORMS, UPSAMPLING, JohnsonNet, load_johnson
from sketch_perceptual.seeds import generator
from sketch_perceptual.training import cards, hub
from sketch_perceptual.training.distributed import on_main
from sketch_perceptual.training.feature_cache import scan_folder
from sketch_perceptual.training.identity import digest
from sketch_perceptual.training.optimizer import make_lr_scheduler, make_optimizer, make_steps
from sketch_perceptual.training.options import add_training_options
from sketch_perceptual.training.run import Run
from sketch_perceptual.training.startup import check_space, dry_run, start, versions
from sketch_perceptual.training.steps import Meter, Steps
from sketch_perceptual.training.trackers import start_trackers, track_images

logger = get_logger(__name__, log_level="INFO")

PROBES = 8  # content pictures on which the losses of the untrained network are measured
FILES = ["config.json", "model.safetensors", "README.md", "metrics.json", "validation.png"]


def parse_args(argv: list[str] | None = None) -> Options:
    parser = Parser(description=__doc__)
    count, rate = at_least(1), at_least(0.0, float)

    add = parser.group("model")
    add(
        "--norm",
        fixed=True,
        choices=tuple(NORMS),
        default="instance",
        help="normalization layers; the 2016 paper used batch",
    )
    add(
        "--upsampling",
        fixed=True,
        choices=UPSAMPLING,
        default="transposed",
        help="resize: nearest neighbours, then convolution",
    )
    add("--width", fixed=True, type=count, default=32, help="channels of the first layer")

    add = parser.group("loss")
    add(
        "--backbone",
        shared=False,
        default=str(BUNDLED),
        help='a folder or Hub id, a .safetensors with VGG-16 weights, "imagenet" or "bundled"',
    )
    add("--content_layer", default="relu2_2")
    add("--style_layers", nargs="+", metavar="LAYER", default=list(DEFAULT_LAYERS))
    add("--content_weight", type=rate, default=1.0)
    add("--style_weight", type=rate, default=0.3)
    add("--tv_weight", type=rate, default=1e-2, help="weight of the total variation loss")
    add(
        "--normalize_losses",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="divide the content and style losses by their values for the untrained network, so that weights mean"
        " the same for all backbones",
    )
    add(
        "--style_target",
        choices=("mean", "random"),
        default="mean",
        help="with several drawings: their mean Gram matrix, or one at random each step",
    )

    add = add_data_options(parser, "a folder of photos, searched recursively")
    add("--style", shared=False, help="a drawing, or a folder of drawings")
    add("--paired_data_dir", shared=False, help="CUFS, FS2K or another paired set: see sketch_perceptual.data.paired")
    add("--paired_style", shared=False, type=int, choices=(1, 2, 3), help="style of FS2K")
    add("--resolution", type=at_least(32), default=256, help="size of the square photos and drawings, in pixels")
    add("--fit", choices=("crop", "pad"), default="crop", help="how images that are not square are made square")
    add("--random_flip", action="store_true", help="mirror half of the photos")

    add_training_options(parser, output_dir="sketch-style")
    add = parser.group("validation")
    add(
        "--num_validation_images",
        shared=False,
        type=at_least(1),
        default=4,
        help="number of training photos to stylize for validation",
    )
    add("--validation_steps", shared=False, type=count, default=1000, help="stylize them every N optimizer steps")
    parser.set_defaults(
        train_batch_size=4,
        num_train_epochs=1,
        learning_rate=1e-3,
        lr_warmup_steps=0,
        adam_weight_decay=0.0,
        checkpointing_steps=2000,
        checkpoints_total_limit=2,
    )

    args = parser.parse_args(argv)
    if not (args.train_data_dir or args.dataset_name or args.paired_data_dir):
        parser.error("pass --train_data_dir with a folder of photos, --dataset_name or --paired_data_dir")
    if (args.style is None) == (args.paired_data_dir is None):
        parser.error("pass either --style, a drawing or a folder of them, or --paired_data_dir")
    if args.paired_style is not None and args.paired_data_dir is None:
        parser.error("--paired_style needs --paired_data_dir")
    return args


def main(args: Options) -> None:
    if dry_run(args, lambda seed: read_data(args, *open_data(args, seed))):
        return
    run = start(args)
    accelerator, seed = run.accelerator, run.seed
    backbone = load_backbone(
        args.backbone, attention="none", layers=dict.fromkeys([args.content_layer, *args.style_layers])
    )
    style_loss = StyleLoss(backbone, args.style_layers).to(accelerator.device)
    content, style, data = load_data(args, accelerator, seed)
    run.settle(data=data, backbone=digest([fingerprint(backbone), backbone.attention, backbone.calibration]))
    hub.create_repo(args, run)
    start_trackers(accelerator, "sketch-style", args)

    set_seed(seed)  # new weights depend only on the seed
    network = JohnsonNet(args.norm, args.upsampling, args.width).to(accelerator.device)
    fit = partial(fit_image, resolution=args.resolution, fit=args.fit, background=args.background)
    style_target = StyleTarget(style_loss, style, fit, seed, args.style_target == "mean")
    transfer = TransferLoss(style_loss, args.content_layer, args.style_layers)
    if "scales" not in run.state:
        scales = {"content": 1.0, "style": 1.0}
        if args.normalize_losses:
            scales = transfer.untrained(network, content, style_target)
        run.state |= {"scales": scales, "history": []}
    loader, sampler = make_loader(
        content, args.train_batch_size, seed, collate, args.dataloader_num_workers, worker_init_fn=ignore_in_worker
    )
    optimizer = make_optimizer(args, list(network.parameters()))
    model, prepared_optimizer, loader = accelerator.prepare(network, optimizer, loader)
    steps = make_steps(args, run, loader, sampler)
    lr_scheduler = make_lr_scheduler(args, run, optimizer, steps)
    meter = Meter(accelerator)
    logger.info(run_summary(args, run, steps, network, len(content), len(style)))
    save, load = partial(save_weights, network), partial(load_weights, network)
    run.begin(steps, meter, prepared_optimizer, save, load, lr_scheduler)
    photos = [content.image(index) for index in spaced(len(content), args.num_validation_images)]

    weights = {"content": args.content_weight, "style": args.style_weight, "total_variation": args.tv_weight}
    scales = run.state["scales"] | {"total_variation": 1.0}
    model.train()
    with run.training():
        for batch in steps:
            with accelerator.accumulate(model):
                images = batch["pixel_values"]
                losses = transfer(model(images), images, style_target(steps.done))
                total = sum(weight * losses[name] / scales[name] for name, weight in weights.items())
                accelerator.backward(total.mean())
                meter.add(batch["name"], {"train_loss": total} | losses)
                if not accelerator.sync_gradients:
                    continue
                rate = float(lr_scheduler.get_last_lr()[0])
                logs = step_logs(run.optimize(model.parameters(), args.max_grad_norm), rate, meter)

            steps.advance()
            run.log(logs)
            if steps.due(args.validation_steps) or steps.at_end:
                run.state["history"].append({"step": steps.done} | logs)
                with interruptible():  # Ctrl-C does not wait for pictures
                    if accelerator.is_main_process:
                        validate(run, network, photos, fit)
            run.end_step(save=steps.due(args.checkpointing_steps))

    with run.finishing():
        if accelerator.is_main_process:
            accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # takes accelerate's autocast off the network
            finish(run, network, photos, fit, describe(backbone, len(content), len(style), steps.total))
    run.close()
    hub.push(args, run, args.output_dir, FILES)


def load_data(args, accelerator: Accelerator, seed: int) -> tuple[CaptionedImages, Images, str]:
    """The photos, the drawings, each of which has been read once, and their contents for the run's identity."""
    content, style = open_data(args, seed)
    positions, keys, drawings = on_main(accelerator, read_data, args, content, style)
    contents = f"{len(positions)} photos, {len(drawings.keys)} drawings {digest([keys, drawings.keys])}"
    return content.select(positions), style.select(drawings.positions), contents


def open_data(args, seed: int) -> tuple[CaptionedImages, Images]:
    pairs = find_pairs(args.paired_data_dir, "train", args.paired_style) if args.paired_data_dir else None
    content = choose_samples(open_content(args, pairs, seed), args.max_train_samples, seed)
    style = open_style(args, pairs)
    content.scan_folder = style.scan_folder = scan_folder()
    return content, style


def read_data(args, content: CaptionedImages, style: Images) -> tuple[list[int], list[str], Contents]:
    """Positions and keys of the photos to use, and what can be read of the drawings."""
    positions, keys = read_content(content, args.on_bad_image)
    drawings = read_once(style, args.on_bad_image)
    if args.figure_data and not has_complained():
        photos = sheet_rows(content.select(positions), what="photo ")
        strokes = sheet_rows(
            style.select(drawings.positions), partial(fitted, args.resolution, args.fit, args.background), "drawing "
        )
        write_sheet(args.figure_data, photos | strokes)
    return positions, keys, drawings


def open_content(args: Options, pairs, seed: int) -> CaptionedImages:
    if args.dataset_name is not None:
        rows = load_rows(args.dataset_name, args.dataset_config_name, args.train_data_dir, args.cache_dir)
        sources, names = image_column_of(rows, args.dataset_name, args.image_column)
    elif args.train_data_dir is not None:
        root = Path(args.train_data_dir)
        sources = [root / name for name in find_images(root)[1]]
        names = list(map(str, sources))
    else:
        sources, names = pairs.photos, list(map(str, pairs.photos))
    return CaptionedImages(
        sources,
        names,
        [""] * len(names),
        resolution=args.resolution,
        fit=args.fit,
        random_flip=args.random_flip,
        background=args.background,
        seed=seed,
    )


def open_style(args, pairs) -> Images:
    if pairs is not None:
        logger.info(pairs.summary)
        sources = pairs.sketches
    else:
        root = Path(args.style)
        sources = [root / name for name in find_images(root)[1]] if os.path.isdir(root) else [root]
    return Images(sources, list(map(str, sources)), args.background, args.invert)


def read_content(data: CaptionedImages, on_bad_image: str) -> tuple[list[int], list[str]]:
    """Positions and keys of the photos that can be read and are not near-constant."""
    scanned = scan(data)
    report_scan(data, scanned, "photos")
    constant = set(scanned.noted(BLANK))
    positions = [index for index in readable(data, scanned.bad, on_bad_image) if index not in constant]
    if not positions:
        raise InputError("all photos are near-constant, there is no content to keep")
    if constant:
        logger.warning(f"{len(constant)} near-constant photos are left out: normalization explodes on them")
    return positions, [scanned.infos[index].key for index in positions]


class StyleTarget:
    """The Gram matrices to reach in a step: the mean over the drawings, or those of one that (seed, step) decides."""

    def __init__(self, style_loss: StyleLoss, style: Images, fit: Callable, seed: int, is_mean: bool):
        self.style_loss, self.style, self.fit, self.seed = style_loss, style, fit, seed
        self.mean: dict[str, Tensor] | None = None
        if is_mean:
            self.mean = {}
            for index in tqdm(range(len(style)), "Style", disable=None):
                for name, gram in self.grams(index).items():
                    self.mean[name] = self.mean.get(name, 0) + gram / len(style)

    def __call__(self, step: int) -> dict[str, Tensor]:
        if self.mean is not None:
            return self.mean
        rng = generator(self.seed, "style", step)
        return self.grams(int(torch.randint(len(self.style), (), generator=rng)))

    @torch.no_grad()
    def grams(self, index: int) -> dict[str, Tensor]:
        image = self.fit(self.style.image(index))
        return self.style_loss.grams(to_tensor(image)[None].to(self.style_loss.backbone.mean.device))


class TransferLoss:
    """Content, style and total variation of stylized images (Johnson et al. 2016, section 3.2).

    Args:
        content_layer: layer of the backbone of `style_loss` whose features are kept.
        style_layers: layers whose Gram matrices are compared.
    """

    def __init__(self, style_loss: StyleLoss, content_layer: str, style_layers: list[str]):
        self.style_loss, self.content_layer, self.style_layers = style_loss, content_layer, style_layers

    def __call__(self, images: Tensor, content: Tensor, style: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses of each image, (B,) in float32, against content images and Gram matrices."""
        name, taps = self.content_layer, self.style_loss.backbone.taps
        with torch.autocast(images.device.type, enabled=False):
            images, content = images.float(), content.float()
            with torch.no_grad():
                kept = taps(content, [name])[name]
            features = taps(images, list(dict.fromkeys([name, *self.style_layers])))
            grams = {layer: gram_matrix(features[layer]) for layer in self.style_layers}
            return {
                "content": (features[name] - kept).square().flatten(1).mean(1),
                "style": self.style_loss.distance(grams, style),
                "total_variation": total_variation(images),
            }

    @torch.no_grad()
    def untrained(self, network: JohnsonNet, content: CaptionedImages, style_target) -> dict[str, float]:
        """Content and style losses of the untrained network, means over a few content images."""
        probes = [content[0, index]["pixel_values"] for index in spaced(len(content), PROBES)]
        images = torch.stack(probes).to(self.style_loss.backbone.mean.device)
        with network.kept_statistics():  # which batch normalization counts
            losses = [self(network(image), image, style_target(step)) for step, image in enumerate(images.split(1))]
        return {name: float(sum(loss[name] for loss in losses)) / len(losses) or 1.0 for name in ("content", "style")}


def spaced(length: int, count: int) -> list[int]:
    """Up to `count` positions, evenly spread."""
    return sorted({index * length // count for index in range(count)})


def collate(examples: list[dict]) -> dict:
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "name": [example["name"] for example in examples],
    }


def save_weights(network: JohnsonNet, folder: Path) -> None:
    network.save_pretrained(folder)


def load_weights(network: JohnsonNet, folder: Path) -> None:
    network.load_state_dict(load_johnson(folder).state_dict())


def step_logs(totals: dict[str, float], rate: float, meter: Meter) -> dict[str, float]:
    """Means of one optimizer step."""
    logs = {"grad_norm": totals["grad_norm"], "lr": rate}
    if rows := totals["rows"]:
        names = {"train_loss": "train_loss", "content_loss": "content", "style_loss": "style"}
        names["total_variation"] = "total_variation"
        logs |= {name: totals[quantity] / rows for name, quantity in names.items()}
    return logs | ({"skipped_steps": meter.skipped} if meter.skipped else {})


def run_summary(args, run: Run, steps: Steps, network: JohnsonNet, photos: int, drawings: int) -> str:
    """Describe the training and the files to be written; InputError if the disk cannot hold them."""
    weights, scales = sum(weight.numel() for weight in network.parameters()), run.state["scales"]
    saves = 1 + steps.total // args.checkpointing_steps
    space = check_space(args.output_dir, saves, args.checkpoints_total_limit, 12 * weights, 4 * weights)
    return (
        f"{photos} photos, {drawings} drawings; {steps.total} steps of {args.train_batch_size} x"
        f" {run.accelerator.num_processes} x {args.gradient_accumulation_steps} images, seed {run.seed};"
        f" {weights / 1e6:.1f} M weights are trained; {space}\ncontent is divided by {scales['content']:.3g}, style by"
        f" {scales['style']:.3g}"
    )


@torch.no_grad()
def stylize(network: JohnsonNet, photos: list[Image.Image], fit: Callable) -> dict[str, list[Image.Image]]:
    """A row of photos and a row of what the network makes of them, as it is trained to; its mode stays as it was."""
    was_training = network.training
    network.eval()
    fitted = [fit(photo) for photo in photos]
    device = next(network.parameters()).device
    sketches = [to_pil(network(to_tensor(photo)[None].to(device))[0]) for photo in fitted]
    network.train(was_training)
    return {"photo": fitted, "sketch": sketches}


def validate(run: Run, network: JohnsonNet, photos: list[Image.Image], fit: Callable) -> None:
    """Stylize the validation photos, to the trackers and to disk; an error does not end the training."""
    try:
        rows = stylize(network, photos, fit)
        with replacing(run.folder / "validation") as folder:
            image_grid(rows).save(folder / f"step-{run.steps.done:06d}.png")
        track_images(run.accelerator, "validation", rows, run.steps.done)
    except (RuntimeError, MemoryError, OSError, InputError) as error:
        logger.warning(f"no validation images: {first_line(error)}")


def finish(run: Run, network: JohnsonNet, photos: list[Image.Image], fit: Callable, description: str) -> None:
    """Export the network, reload it and check what it makes of photos, write the card."""
    folder = run.folder
    with replacing(folder) as partial_folder:
        network.save_pretrained(partial_folder)
    rows, again = (stylize(drawer, photos, fit) for drawer in (network.float().cpu(), load_johnson(folder)))
    if any(one.tobytes() != other.tobytes() for one, other in zip(rows["sketch"], again["sketch"], strict=True)):
        raise TrainingError(f"{folder} does not load as it was trained")
    if flat := sum(len(set(picture.convert("L").tobytes())) < 8 for picture in rows["sketch"]):
        logger.warning(f"{flat} of {len(photos)} validation pictures are of nearly one colour; see validation.png")
    if run.meter.skipped:
        logger.warning(f"{run.meter.skipped} steps were skipped: their loss or gradient was not finite")
    metrics = {name: run.state[name] for name in ("history", "scales")}
    metrics |= {"settings": run.identity, "changes": run.changes, "versions": versions()}
    with replacing(folder) as partial_folder:
        image_grid(rows).save(partial_folder / "validation.png")
        (partial_folder / "metrics.json").write_text(json.dumps(metrics, indent=2), encoding="utf-8")
    write_card(run, description)
    uses = {
        "validation.png": "validation photos, and what the network makes of them",
        "model.safetensors": f"for sketch-perceptual stylize --model {folder} --input PHOTOS --output SKETCHES",
    }
    print(cards.listing(folder, uses))


def describe(backbone: AttentionVGG16, photos: int, drawings: int, steps: int) -> str:
    eyes = "without" if backbone.attention == "none" else "with"
    return (
        "Johnson's image transformation network (Johnson et al. 2016), which redraws photos in the style of"
        f" {drawings} drawings, as a VGG-16 {eyes} attention sees it (Seo 2025). Trained on {photos} photos for"
        f" {steps} steps."
    )


def write_card(run: Run, description: str) -> None:
    where = run.hub_model_id or "path/to/this/folder"
    snippet = f"""from PIL import Image
from sketch_perceptual.commands.stylize import load_johnson, stylize

network = load_johnson("{where}")
photo = Image.new("RGB", (300, 200), "skyblue")  # any picture, any size
stylize(network, [photo])[0].save("sketch.png")"""
    cards.write_card(
        run.folder,
        data=ModelCardData(
            **run.card_data,
            library_name="sketch-perceptual",
            pipeline_tag="image-to-image",
            tags=["sketch", "style-transfer", "image-to-image"],
        ),
        title=f"Sketch style - {cards.model_name(run.hub_model_id, run.folder)}",
        description=description,
        snippet=snippet,
        options=run.record(),
        pictures=["validation.png"],
    )


if __name__ == "__main__":
    entry.run(main, parse_args())
