#!/usr/bin/env python
"""Train Johnson's network to draw photos in the style of sketches (Johnson et al. 2016; Seo 2025, section 4.1).

    accelerate launch --mixed_precision bf16 train_johnson.py \
      --train_data_dir train2017 --style sketches --seed 42 --output_dir sketch-style

Content is any folder of photos, COCO's train2017 in the paper; style is a drawing, a folder of them, or the training
sketches of a paired set, CUFS or FS2K (`--paired_data_dir`), whose photos are then the content if no other is named.
The network learns to keep the content (relu2_2) and to reach the Gram matrices of the style (relu1_2 to relu4_3), as
the attention-VGG that comes with the package sees them, or another `--backbone`. Defaults are the paper's: 256 px,
batches of 4, Adam at 1e-3, one epoch. `python -m sketch_perceptual.johnson` then converts pictures.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from huggingface_hub import ModelCardData
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from sketch_perceptual.data.batches import make_loader
from sketch_perceptual.data.checks import Scan, drop_bad, scan_images
from sketch_perceptual.data.folders import find_images
from sketch_perceptual.data.image_sets import CaptionedImages, Images
from sketch_perceptual.data.images import fit_image, to_pil, to_tensor
from sketch_perceptual.data.options import add_data_options, choose_samples
from sketch_perceptual.data.paired import find_pairs
from sketch_perceptual.data.rows import image_column_of, load_rows
from sketch_perceptual.errors import InputError
from sketch_perceptual.figures import sheet
from sketch_perceptual.losses import DEFAULT_LAYERS, StyleLoss, gram_matrix, total_variation
from sketch_perceptual.networks.backbone import BUNDLED, load_backbone
from sketch_perceptual.networks.hub_model import fingerprint
from sketch_perceptual.networks.johnson import NORMS, UPSAMPLING, JohnsonNet, load_johnson
from sketch_perceptual.running import cards
from sketch_perceptual.running.checkpoints import keep_whole, load_checkpoint, save_checkpoint
from sketch_perceptual.running.interruption import catch_signals
from sketch_perceptual.running.optimizers import make_lr_scheduler, make_optimizer, plan_steps
from sketch_perceptual.running.options import add_training_options, at_least
from sketch_perceptual.running.startup import check_space, run, start, versions
from sketch_perceptual.running.steps import NonFiniteGuard
from sketch_perceptual.running.trackers import start_trackers, track_images
from sketch_perceptual.seeds import generator

logger = get_logger(__name__, log_level="INFO")

PROBES = 8  # content pictures on which the losses of the untrained network are measured
FILES = ["config.json", "model.safetensors", "README.md", "metrics.json", "validation.png"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count, rate = at_least(1), at_least(0.0, float)

    add = parser.add_argument_group("model").add_argument
    add("--norm", choices=tuple(NORMS), default="instance", help="batch: the paper of 2016")
    add("--upsampling", choices=UPSAMPLING, default="transposed", help="resize: nearest neighbours, then convolution")
    add("--width", type=count, default=32, help="channels of the first layer; fewer for small machines")

    add = parser.add_argument_group("loss").add_argument
    add("--backbone", default=str(BUNDLED), help='a folder or Hub id, a .safetensors with VGG-16 weights, "imagenet"')
    add("--content_layer", default="relu2_2")
    add("--style_layers", nargs="+", metavar="LAYER", default=list(DEFAULT_LAYERS))
    add("--content_weight", type=rate, default=1.0)
    add("--style_weight", type=rate, default=0.3)
    add("--tv_weight", type=rate, default=1e-2, help="of the total variation")
    add(
        "--normalize_losses",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="divide content and style by what they are for the untrained network, so that weights mean the same for"
        " all backbones",
    )
    add("--style_target", choices=("mean", "random"), default="mean", help="of several: mean Gram, or one a step")

    add = add_data_options(parser)
    add("--train_data_dir", help="a folder of photos, read with all its folders")
    add("--style", help="a drawing, or a folder of drawings")
    add("--paired_data_dir", help="CUFS, FS2K or another paired set: see sketch_perceptual.paired")
    add("--paired_style", type=int, choices=(1, 2, 3), help="of FS2K")
    add("--resolution", type=at_least(32), default=256, help="photos and drawings become this wide and high")
    add("--fit", choices=("crop", "pad"), default="crop", help="how what is not square becomes so")
    add("--random_flip", action="store_true", help="mirror half of the photos")

    add_training_options(parser, output_dir="sketch-style")
    add = parser.add_argument_group("validation").add_argument
    add("--num_validation_images", type=at_least(1), default=4, help="photos of the content that are drawn again")
    add("--validation_steps", type=count, default=1000, help="draw them every so many steps")
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


def main(args: argparse.Namespace) -> None:
    accelerator = start(args)
    style_loss = StyleLoss(load_backbone(args.backbone, attention="none"), args.style_layers).to(accelerator.device)
    style_loss.backbone.find_taps([args.content_layer])
    pairs = find_pairs(args.paired_data_dir, "train", args.paired_style) if args.paired_data_dir else None
    content, style = load_content(args, accelerator, pairs), load_style(args, accelerator, pairs)
    repo_id = None
    if args.push_to_hub and accelerator.is_main_process:
        repo_id = cards.create_repo(cards.model_name(args.hub_model_id, args.output_dir), args.hub_token)

    set_seed(args.seed)  # new weights depend on the seed alone
    network = JohnsonNet(args.norm, args.upsampling, args.width).to(accelerator.device)
    draw_style = StyleTarget(args, style_loss, style)
    probes = [content[0, index]["pixel_values"] for index in spaced(len(content), PROBES)]
    scales = measure_losses(args, style_loss, network, probes, draw_style)
    sampler, loader = make_loader(args, content, collate)
    optimizer = make_optimizer(args, list(network.parameters()))
    model, prepared_optimizer, loader = accelerator.prepare(network, optimizer, loader)
    plan_steps(args, len(loader))
    lr_scheduler = make_lr_scheduler(args, optimizer)
    keep_whole(accelerator, load_johnson)
    settings = resumable_settings(args, accelerator, style_loss, len(content), len(style))
    state = {"global_step": 0, "epoch": 0, "batch": 0, "skipped_steps": 0, "scales": scales, "history": []}
    state |= load_checkpoint(accelerator, args, settings) or {"settings": settings}
    if "lr_scheduler" in state:
        lr_scheduler.load_state_dict(state["lr_scheduler"])
    guard = NonFiniteGuard(state["skipped_steps"], scaled=accelerator.scaler is not None)
    start_trackers(accelerator, "sketch-style", args)
    logger.info(run_summary(args, accelerator, network, len(content), len(style), scales))
    photos = [content.image(index) for index in spaced(len(content), args.num_validation_images)]

    stop = catch_signals()
    step, sums, seen = state["global_step"], 0, []
    progress = tqdm(
        total=args.max_train_steps, initial=step, desc="Steps", disable=not accelerator.is_local_main_process
    )
    for epoch in range(state["epoch"], args.num_train_epochs):
        model.train()
        sampler.epoch = epoch
        first = state["batch"]
        state["batch"] = 0
        batches = accelerator.skip_first_batches(loader, first) if first else loader
        for number, batch in enumerate(batches, first):
            if step >= args.max_train_steps:
                break
            with accelerator.accumulate(model):
                images = batch["pixel_values"]
                losses = transfer_losses(args, style_loss, model(images), images, draw_style(step))
                total = weigh(args, losses, state["scales"])
                accelerator.backward(total.mean())
                rows = torch.stack([total, *losses.values(), torch.ones_like(total)]).detach()
                sums = sums + rows.sum(1)
                seen.append((batch["name"], total.detach()))
                if not accelerator.sync_gradients:
                    continue
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                *totals, stopped = accelerator.reduce(torch.cat([sums, sums.new_tensor([stop() > 0])]), "sum").tolist()
                is_finite = guard.is_finite(step, [*totals, float(grad_norm)], seen)
                if is_finite or guard.scaled:
                    prepared_optimizer.step()
                lr_scheduler.step()
                prepared_optimizer.zero_grad()

            step, sums, seen = step + 1, 0, []
            *means, images_seen = totals
            names = ("train_loss", "content_loss", "style_loss", "total_variation")
            logs = {name: value / images_seen for name, value in zip(names, means, strict=True)}
            logs |= {"grad_norm": float(grad_norm), "lr": lr_scheduler.get_last_lr()[0]}
            logs |= {"skipped_steps": guard.total} if guard.total else {}
            progress.set_postfix({name: f"{value:.3g}" for name, value in logs.items()}, refresh=False)
            progress.update()
            accelerator.log(logs, step)
            if step % args.validation_steps == 0 or step == args.max_train_steps:
                state["history"].append({"step": step} | logs)
                if accelerator.is_main_process:
                    validate(args, accelerator, network, photos, step)
            if step % args.checkpointing_steps == 0 or stopped:
                next_epoch, next_batch = divmod(epoch * len(loader) + number + 1, len(loader))
                state |= {"global_step": step, "epoch": next_epoch, "batch": next_batch, "skipped_steps": guard.total}
                state["lr_scheduler"] = lr_scheduler.state_dict()
                saved = save_checkpoint(accelerator, args, state)
                logger.info(f"saved {saved}")
                state["batch"] = 0
            if stopped:
                logger.warning(f"interrupted after step {step}; go on with --resume_from_checkpoint latest")
                accelerator.end_training()
                sys.exit(128 + (stop() or 15))

    progress.close()
    if accelerator.is_main_process:
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # takes accelerate's autocast off the network
        finish(args, network, photos, state, guard)
        if repo_id:
            cards.push(args.output_dir, repo_id, FILES, args.hub_token)
    accelerator.end_training()


def load_content(args, accelerator: Accelerator, pairs) -> CaptionedImages:
    """The photos, each of which has been read once."""
    if args.dataset_name is not None:
        with accelerator.main_process_first():
            rows = load_rows(args.dataset_name, args.dataset_config_name, args.train_data_dir, args.cache_dir)
        sources, names = image_column_of(rows, args.dataset_name, args.image_column)
    elif args.train_data_dir is not None:
        root = Path(args.train_data_dir)
        sources = [root / name for name in find_images(root)[1]]
        names = list(map(str, sources))
    else:
        sources, names = pairs.photos, list(map(str, pairs.photos))
    data = CaptionedImages(
        sources,
        names,
        [""] * len(names),
        resolution=args.resolution,
        fit=args.fit,
        random_flip=args.random_flip,
        background=args.background,
        seed=args.seed,
    )
    data = choose_samples(args, data)
    good, found = check_images(args, accelerator, data)
    blank = {data.rows[index] for index in found.blank}
    kept = [index for index, row in enumerate(good.rows) if row not in blank]
    if not kept:
        raise InputError("all photos are near-constant, there is no content to keep")
    if blank:
        logger.warning(f"{len(blank)} near-constant photos are left out: normalisation explodes on them")
    return good.select(kept)


def load_style(args, accelerator: Accelerator, pairs) -> Images:
    """The drawings, each of which has been read once."""
    if pairs is not None:
        logger.info(pairs.summary)
        sources = pairs.sketches
    else:
        root = Path(args.style)
        sources = [root / name for name in find_images(root, "--style")[1]] if root.is_dir() else [root]
    return check_images(args, accelerator, Images(sources, list(map(str, sources)), args.background))[0]


def check_images(args, accelerator: Accelerator, data: Images) -> tuple[Images, Scan]:
    """The images that can be read, and what reading them found."""
    found = scan_images(accelerator, data)
    logger.info(found.summary)
    return drop_bad(data, found, args.on_bad_image), found


class StyleTarget:
    """The Gram matrices to reach in a step: the mean over the drawings, or those of one that (seed, step) decides."""

    def __init__(self, args, style_loss: StyleLoss, style: Images):
        self.args, self.style_loss, self.style = args, style_loss, style
        self.mean: dict[str, Tensor] | None = None
        if args.style_target == "mean":
            self.mean = {}
            for index in tqdm(range(len(style)), "Style", disable=None):
                for name, gram in self.grams(index).items():
                    self.mean[name] = self.mean.get(name, 0) + gram / len(style)

    def __call__(self, step: int) -> dict[str, Tensor]:
        if self.mean is not None:
            return self.mean
        draw = generator(self.args.seed, "style", step)
        return self.grams(int(torch.randint(len(self.style), (), generator=draw)))

    @torch.no_grad()
    def grams(self, index: int) -> dict[str, Tensor]:
        args = self.args
        image = fit_image(self.style.image(index), args.resolution, args.fit, args.background)
        return self.style_loss.grams(to_tensor(image)[None].to(self.style_loss.backbone.mean.device))


def transfer_losses(
    args, style_loss: StyleLoss, images: Tensor, content: Tensor, wanted: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Content, style and total variation of each of `images`, (B,) in float32."""
    layers = list(dict.fromkeys([args.content_layer, *args.style_layers]))
    with torch.autocast(images.device.type, enabled=False):
        images, content = images.float(), content.float()
        with torch.no_grad():
            kept = style_loss.backbone.taps(content, [args.content_layer])[args.content_layer]
        taps = style_loss.backbone.taps(images, layers)
        grams = {name: gram_matrix(taps[name]) for name in args.style_layers}
        return {
            "content": (taps[args.content_layer] - kept).square().flatten(1).mean(1),
            "style": style_loss.distance(grams, wanted),
            "total_variation": total_variation(images),
        }


@torch.no_grad()
def measure_losses(args, style_loss: StyleLoss, network: JohnsonNet, probes: list[Tensor], draw_style) -> dict:
    """What content and style are for the untrained network; 1 for each without --normalize_losses."""
    if not args.normalize_losses:
        return {"content": 1.0, "style": 1.0}
    images = torch.stack(probes).to(style_loss.backbone.mean.device)
    losses = [
        transfer_losses(args, style_loss, network(image), image, draw_style(step))
        for step, image in enumerate(images.split(1))
    ]
    return {name: float(sum(loss[name] for loss in losses)) / len(losses) or 1.0 for name in ("content", "style")}


def weigh(args, losses: dict[str, Tensor], scales: dict[str, float]) -> Tensor:
    return (
        args.content_weight * losses["content"] / scales["content"]
        + args.style_weight * losses["style"] / scales["style"]
        + args.tv_weight * losses["total_variation"]
    )


def spaced(length: int, count: int) -> list[int]:
    """Up to `count` positions, evenly spread."""
    return sorted({index * length // count for index in range(count)})


def collate(examples: list[dict]) -> dict:
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "name": [example["name"] for example in examples],
    }


def resumable_settings(args, accelerator: Accelerator, style_loss: StyleLoss, photos: int, drawings: int) -> dict:
    """What a resumed run must share with the run that it continues."""
    names = """norm upsampling width content_layer style_layers content_weight style_weight tv_weight normalize_losses
        style_target train_data_dir dataset_name style paired_data_dir paired_style resolution fit random_flip seed
        train_batch_size gradient_accumulation_steps"""
    return {
        "backbone": "the bundled one" if args.backbone == str(BUNDLED) else Path(args.backbone).name,
        "backbone_weights": fingerprint(style_loss.backbone),
        "attention": style_loss.backbone.attention,
        **{name: getattr(args, name) for name in names.split()},
        "photos": photos,
        "drawings": drawings,
        "processes": accelerator.num_processes,
    }


def run_summary(args, accelerator, network: JohnsonNet, photos: int, drawings: int, scales: dict) -> str:
    """What will be trained and written; InputError if the disk cannot hold it."""
    weights = sum(weight.numel() for weight in network.parameters())
    space = check_space(args, 1 + args.max_train_steps // args.checkpointing_steps, 12 * weights, 4 * weights)
    return (
        f"{photos} photos, {drawings} drawings; {args.max_train_steps} steps of {args.train_batch_size} x"
        f" {accelerator.num_processes} x {args.gradient_accumulation_steps} images, seed {args.seed};"
        f" {weights / 1e6:.1f} M weights are trained; {space}\ncontent is divided by {scales['content']:.3g}, style by"
        f" {scales['style']:.3g}"
    )


@torch.no_grad()
def draw(args, network: JohnsonNet, photos: list[Image.Image]) -> dict[str, list[Image.Image]]:
    """A row of photos and a row of what the network makes of them, as it is trained to; its mode stays as it was."""
    was_training = network.training
    network.eval()
    fitted = [fit_image(photo, args.resolution, args.fit, args.background) for photo in photos]
    device = next(network.parameters()).device
    drawn = [to_pil(network(to_tensor(photo)[None].to(device))[0]) for photo in fitted]
    network.train(was_training)
    return {"photo": fitted, "sketch": drawn}


def validate(args, accelerator: Accelerator, network: JohnsonNet, photos: list[Image.Image], step: int) -> None:
    """Draw the validation photos to the trackers and to disk."""
    try:
        rows = draw(args, network, photos)
    except (torch.OutOfMemoryError, InputError) as error:  # must not end a training
        logger.warning(f"no validation images: {error}")
        return
    folder = Path(args.output_dir, "validation")
    folder.mkdir(exist_ok=True)
    sheet(rows).save(folder / f"step-{step:06d}.png")
    track_images(accelerator, "validation", rows, step)


def finish(args, network: JohnsonNet, photos: list[Image.Image], state: dict, guard: NonFiniteGuard) -> None:
    """Export the network, reload it and check what it draws, write the card."""
    folder = Path(args.output_dir)
    network.save_pretrained(folder)
    rows, again = (draw(args, drawer, photos) for drawer in (network.float().cpu(), load_johnson(folder)))
    if any(one.tobytes() != other.tobytes() for one, other in zip(rows["sketch"], again["sketch"], strict=True)):
        raise RuntimeError(f"{folder} does not load as it was trained")
    sheet(rows).save(folder / "validation.png")
    if flat := sum(len(set(picture.convert("L").tobytes())) < 8 for picture in rows["sketch"]):
        logger.warning(f"{flat} of {len(photos)} validation pictures are of nearly one colour; see validation.png")
    if guard.total:
        logger.warning(f"{guard.total} steps were skipped: their loss or gradient was not finite")
    metrics = {name: state[name] for name in ("history", "scales", "settings")} | {"versions": versions()}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2), encoding="utf-8")
    write_card(args, state["settings"])
    print(folder / "validation.png")


def write_card(args, settings: dict) -> None:
    where = args.hub_model_id or "path/to/this/folder"
    on_hub = cards.dataset_id(args.dataset_name)
    attention = "without" if settings["attention"] == "none" else "with"
    private = ("train_data_dir", "dataset_name", "style", "paired_data_dir")
    snippet = f"""from PIL import Image
from sketch_perceptual.johnson import load_johnson, stylize

network = load_johnson("{where}")
photo = Image.new("RGB", (300, 200), "skyblue")  # any picture, any size
stylize(network, [photo])[0].save("sketch.png")"""
    cards.write_card(
        args.output_dir,
        data=ModelCardData(
            license="apache-2.0",
            library_name="sketch-perceptual",
            pipeline_tag="image-to-image",
            datasets=on_hub and [on_hub],
            tags=["sketch", "style-transfer", "image-to-image"],
        ),
        title=f"Sketch style - {cards.model_name(args.hub_model_id, args.output_dir)}",
        description="Johnson's image transformation network (Johnson et al. 2016), which redraws photos in the style"
        f" of {settings['drawings']} drawings, as a VGG-16 {attention} attention sees it (Seo 2025). Trained on"
        f" {settings['photos']} photos for {args.max_train_steps} steps.",
        snippet=snippet,
        options={name: value for name, value in settings.items() if name not in private},
        pictures=["validation.png"],
    )


if __name__ == "__main__":
    run(main, parse_args())
