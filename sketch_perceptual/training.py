"""What the trainers share: options, start, data order, optimizer, checkpoints, resume, interruption."""

import argparse
import errno
import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    set_seed,
)
from PIL import Image
from safetensors import SafetensorError
from tqdm.auto import tqdm

from .data import (
    CAPTION_TEMPLATE,
    CaptionedImages,
    Images,
    Scan,
    captioned_dataset,
    captioned_folder,
    drop_bad,
    generator,
    load_rows,
    scan,
)
from .diffusion import cast_decoder
from .errors import InputError, first_line
from .features import FeatureCache
from .images import fit_image, to_tensor
from .labelled import LabelledImages, labelled_dataset, labelled_folder
from .retrieval import SketchEmbedder
from .splits import Split, content_key, find_copies, thumbnail

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

logger = get_logger(__name__, log_level="INFO")

SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
PATIENCE = timedelta(hours=2)  # the other processes wait while the main one draws or exports
CACHE = str(Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "sketch-perceptual", "features").expanduser())
CACHE_FILE = 1024  # images: what an interrupted run has to compute again at most
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
STATE_FILE = "training_state.json"  # written last: a checkpoint without it is not complete


def at_least(minimum, kind=int) -> Callable[[str], int | float]:
    """An argparse type: a finite number no smaller than `minimum`."""

    def number(text: str):
        value = kind(text)
        if not (math.isfinite(value) and value >= minimum):
            raise argparse.ArgumentTypeError(f"must be a number of at least {minimum}, got {text}")
        return value

    number.__name__ = kind.__name__
    return number


def add_run_options(parser: argparse.ArgumentParser, output_dir: str) -> Callable:
    """The options that every trainer has beside its own; returns `add_argument` of their group for more of them."""
    add = parser.add_argument_group("training").add_argument
    count, natural = at_least(1), at_least(0)
    add("--output_dir", default=output_dir, help="where the model, the checkpoints and the logs are written")
    add("--seed", type=natural, help="decides every random draw; one is drawn and saved if not given")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: what accelerate was told")
    add("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere GPUs and newer")
    add("--dataloader_num_workers", type=natural, default=0, help="processes that read images; 0 is the main one")
    add("--logging_dir", default="logs", help="inside --output_dir")
    add(
        "--report_to",
        default="tensorboard",
        help="tensorboard, wandb, comet_ml, another tracker of accelerate's, all or none",
    )
    add("--local_rank", type=int, default=-1, help="for launchers that pass it; the environment decides")
    add("--checkpoints_total_limit", type=count, help="keep only the newest so many")
    add("--resume_from_checkpoint", help='a checkpoint\'s folder or its name in --output_dir, or "latest"')
    add("--push_to_hub", action="store_true", help="upload the result to the Hugging Face Hub")
    add("--hub_token", help="better: hf auth login")
    add("--hub_model_id", help="the Hub repository; default: the name of --output_dir")
    return add


def add_training_options(parser: argparse.ArgumentParser, output_dir: str) -> None:
    """The options that diffusers' training scripts share, with their names, defaults and meaning."""
    add = add_run_options(parser, output_dir)
    count, natural, rate = at_least(1), at_least(0), at_least(0.0, float)
    add("--train_batch_size", type=count, default=16, help="images a step and process")
    add("--num_train_epochs", type=count, default=100)
    add("--max_train_steps", type=count, help="optimizer steps in all; overrides --num_train_epochs")
    add("--gradient_accumulation_steps", type=count, default=1, help="batches an optimizer step")
    add("--gradient_checkpointing", action="store_true", help="less memory, a slower backward pass")
    add("--learning_rate", type=rate, default=1e-4)
    add("--scale_lr", action="store_true", help="multiply the rate by processes, accumulation and batch size")
    add("--lr_scheduler", default="constant", choices=SCHEDULES)
    add("--lr_warmup_steps", type=natural, default=500, help="optimizer steps")
    add("--adam_beta1", type=rate, default=0.9)
    add("--adam_beta2", type=rate, default=0.999)
    add("--adam_weight_decay", type=rate, default=1e-2)
    add("--adam_epsilon", type=rate, default=1e-8)
    add("--max_grad_norm", type=at_least(1e-12, float), default=1.0, help="gradients are clipped to this norm")
    add("--checkpointing_steps", type=count, default=500, help="save a checkpoint every so many optimizer steps")


def add_data_options(parser: argparse.ArgumentParser) -> Callable:
    """The options that say where pictures come from; returns `add_argument` of their group for more of them."""
    add = parser.add_argument_group("data").add_argument
    add("--dataset_name", help="a data set of the Hub, or a folder that `datasets` can read")
    add("--dataset_config_name")
    add("--image_column", default="image")
    add("--on_bad_image", choices=("error", "skip"), default="error", help="what to do with unreadable images")
    add("--background", default="white", help="colour behind transparent drawings")
    add("--max_train_samples", type=at_least(1), help="use a random choice of so many images")
    add("--cache_dir", help="where downloads are kept")
    return add


def add_pipeline_options(add: Callable, required: bool) -> None:
    """The options of `load_pipeline`, beside `--cache_dir`."""
    add("--pretrained_model_name_or_path", required=required, help="an SD-1.x pipeline: Hub id or folder")
    add("--revision", help="revision of the pipeline on the Hub")
    add("--variant", help='variant of its files, e.g. "fp16"')


def add_caption_options(parser: argparse.ArgumentParser) -> Callable:
    """`add_data_options` and where captions come from; returns `add_argument` of their group for more of them."""
    add = add_data_options(parser)
    add("--train_data_dir", help="a folder of images with metadata.jsonl or .csv, .txt side-cars, or class folders")
    add("--caption_column", default="text", help="captions, lists of captions, or class labels")
    add("--caption_template", default=CAPTION_TEMPLATE, help="caption of an image of a class; {class} is its name")
    add("--default_caption", help="caption of images that have none")
    add("--on_missing_caption", choices=("error", "skip", "default"), default="error")
    return add


def check_caption_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.dataset_name is None and args.train_data_dir is None:
        parser.error("pass --train_data_dir with a folder of drawings, or --dataset_name")


def add_class_options(parser: argparse.ArgumentParser, role: str) -> Callable:
    """`add_data_options` and what drawings with classes need; `role` of the drawings that are kept apart."""
    add = add_data_options(parser)
    add("--train_data_dir", help="a folder with one folder of images a class; an ImageNet id is a class name too")
    add("--label_column", default="label", help="class labels, or names of classes")
    add("--group_column", help="images alike in it stay on one side of the split, e.g. those of one hand")
    add("--validation_share", type=float, default=0.1, help=f"of the images, kept apart {role}")
    return add


def add_feature_options(add: Callable) -> None:
    """The options of `extract_features`."""
    add("--extraction_batch_size", type=at_least(1), default=64, help="images a forward pass of the frozen network")
    add("--feature_dir", default=CACHE, help="features are kept here, by content, weights, resolution and precision")


def check_class_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.dataset_name is None and args.train_data_dir is None:
        parser.error("pass --train_data_dir with a folder of class folders, or --dataset_name")
    if args.group_column is not None and args.dataset_name is None:
        parser.error("--group_column needs --dataset_name: class folders have no columns")


def run(main: Callable, args: argparse.Namespace) -> None:
    """Call `main(args)`; a user's mistake ends in a sentence and exit code 2, a loss that stays non-finite in 3."""
    try:
        main(args)
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        print(f"{Path(sys.argv[0]).name}: training stopped: {error}", file=sys.stderr)
        sys.exit(3)
    except (OSError, SafetensorError) as error:
        if not any(os.strerror(number) in str(error) for number in NO_ROOM):
            raise
        print(f"{Path(sys.argv[0]).name}: error: {first_line(error)}", file=sys.stderr)
        sys.exit(2)


def start(args: argparse.Namespace) -> Accelerator:
    """The accelerator, after what can be checked first: trackers, precision, strategy, a folder to write to.

    Seeds every process alike; `args.seed` is drawn, and the same on all, where none was given.
    """
    if args.report_to in ("wandb", "all") and args.hub_token is not None:
        raise InputError("--hub_token would be shown to wandb; use `hf auth login` instead")
    if args.hub_token is not None:  # trackers may keep the command line
        sys.argv = [argument.replace(args.hub_token, "***") for argument in sys.argv]
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
            project_config=ProjectConfiguration(
                args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))
            ),
        )
    except (ValueError, ImportError) as error:
        raise InputError(f"accelerate refuses --mixed_precision or --report_to: {error}") from error
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM):
        raise InputError(
            f"{accelerator.distributed_type.value} shards what these scripts keep whole; use plain data parallelism:"
            " accelerate launch --multi_gpu"
        )
    start_logging(accelerator)
    if args.hub_token is not None:
        logger.warning("--hub_token stands in the list of processes while this runs; use `hf auth login` instead")
    check_writable(Path(args.output_dir))
    if args.seed is None:
        checkpoint = _choose_checkpoint(args)
        args.seed = _read_state(checkpoint)["settings"]["seed"] if checkpoint else secrets.randbelow(2**31)
    args.seed = broadcast_object_list([args.seed])[0]
    set_seed(args.seed)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    if args.scale_lr:
        args.learning_rate *= args.gradient_accumulation_steps * args.train_batch_size * accelerator.num_processes
    return accelerator


def start_logging(accelerator: Accelerator) -> None:
    """Times and levels on the screen, from the main process; of the libraries only what is wrong."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger().setLevel(logging.INFO if accelerator.is_main_process else logging.WARNING)
    logging.captureWarnings(True)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    silence(transformers)


def silence(library: ModuleType) -> None:
    """Diffusers or transformers: what matters of their advice is checked by the scripts."""
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()


def start_trackers(accelerator: Accelerator, name: str, args: argparse.Namespace) -> None:
    """Open the trackers with the options as hyper-parameters, the token left out."""
    options = {k: v for k, v in vars(args).items() if k != "hub_token"}
    plain = (bool, int, float, str)  # TensorBoard takes no lists and no None
    accelerator.init_trackers(name, {k: v if isinstance(v, plain) else str(v) for k, v in options.items()})


def track_images(accelerator: Accelerator, phase: str, images: dict[str, list[Image.Image]], step: int) -> None:
    """Send the pictures to the trackers that take pictures."""
    pictures = [picture for row in images.values() for picture in row]
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            array = np.stack([np.asarray(picture) for picture in pictures])
            tracker.writer.add_images(phase, array, step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({phase: pictures}, step)


class EpochSampler(torch.utils.data.Sampler):
    """Yields (epoch, index) in an order drawn from (seed, epoch) alone; set `epoch` before each pass."""

    def __init__(self, length: int, seed: int):
        self.length, self.seed, self.epoch = length, seed, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        order = torch.randperm(self.length, generator=generator(self.seed, "order", self.epoch))
        return iter([(self.epoch, index) for index in order.tolist()])


def make_loader(args: argparse.Namespace, data, collate: Callable) -> tuple[EpochSampler, torch.utils.data.DataLoader]:
    """Batches of `data`, which is indexed by (epoch, index), and the sampler that orders them."""
    sampler = EpochSampler(len(data), args.seed)
    loader = torch.utils.data.DataLoader(
        data,
        args.train_batch_size,
        sampler=sampler,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_num_workers > 0,
    )
    return sampler, loader


def plan_steps(args: argparse.Namespace, batches: int) -> None:
    """Settle `max_train_steps` and `num_train_epochs` for epochs of `batches` batches a process."""
    steps_per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    if args.max_train_steps is None:
        args.max_train_steps = args.num_train_epochs * steps_per_epoch
    args.num_train_epochs = math.ceil(args.max_train_steps / steps_per_epoch)


def choose_samples(args: argparse.Namespace, data: Images) -> Images:
    """The random `--max_train_samples` of `data`, or all."""
    if args.max_train_samples is None or args.max_train_samples >= len(data):
        return data
    chosen = torch.randperm(len(data), generator=generator(args.seed, "samples"))[: args.max_train_samples]
    return data.select(sorted(chosen.tolist()))


def scan_images(accelerator: Accelerator, data: Images, visit: Callable | None = None) -> Scan:
    """`scan` on the main process; its result on all."""
    return broadcast_object_list([scan(data, visit) if accelerator.is_main_process else None])[0]


def load_pipeline(args: argparse.Namespace, accelerator: Accelerator, **options) -> "StableDiffusionPipeline":
    """The pipeline that the options of `add_pipeline_options` name: frozen, on its device, in the run's precision.

    `options` are keywords of its `from_pretrained`. InputError.
    """
    import diffusers  # takes 6 seconds
    from diffusers import StableDiffusionPipeline

    silence(diffusers)
    source = args.pretrained_model_name_or_path
    place = {"revision": args.revision, "cache_dir": args.cache_dir}
    try:
        kind = StableDiffusionPipeline.load_config(source, **place).get("_class_name")
        if kind != "StableDiffusionPipeline":
            raise InputError(f"{source} is a {kind}; these scripts take SD-1.x, a StableDiffusionPipeline")
        pipeline = StableDiffusionPipeline.from_pretrained(source, variant=args.variant, **place, **options)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(
            f"--pretrained_model_name_or_path {source} cannot be loaded; it must be the folder of a Stable Diffusion"
            f" pipeline, or a Hub id that can be reached: {error}"
        ) from error
    if args.resolution % pipeline.vae_scale_factor:
        raise InputError(f"--resolution {args.resolution} must be a multiple of {pipeline.vae_scale_factor}")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    for model in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        model.requires_grad_(False).to(accelerator.device, memory_format=torch.channels_last)
        if model.dtype != dtype:
            model.to(dtype=dtype)
    if dtype == torch.float16:
        cast_decoder(pipeline.vae, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_captioned(args: argparse.Namespace, accelerator: Accelerator, **transform) -> CaptionedImages:
    """The images that the options of `add_caption_options` name; `transform` are keywords of `CaptionedImages`."""
    names = ("caption_column", "caption_template", "default_caption", "on_missing_caption", "background")
    options = {name: getattr(args, name) for name in names} | transform
    if args.dataset_name is None:
        data = captioned_folder(args.train_data_dir, **options)
    else:
        with accelerator.main_process_first():
            rows = load_rows(args.dataset_name, args.dataset_config_name, args.train_data_dir, args.cache_dir)
        data = captioned_dataset(rows, name=args.dataset_name, image_column=args.image_column, **options)
    return choose_samples(args, data)


def load_labelled(args: argparse.Namespace, accelerator: Accelerator, **options) -> LabelledImages:
    """The drawings that the options of `add_class_options` name; `options` are the keywords of `LabelledImages`."""
    options["background"] = args.background
    if args.dataset_name is None:
        data = labelled_folder(args.train_data_dir, **options)
    else:
        with accelerator.main_process_first():
            rows = load_rows(args.dataset_name, args.dataset_config_name, args.train_data_dir, args.cache_dir)
        columns = {name: getattr(args, name) for name in ("image_column", "label_column", "group_column")}
        data = labelled_dataset(rows, name=args.dataset_name, **columns, **options)
    return choose_samples(args, data)


def read_keys(
    args: argparse.Namespace, accelerator: Accelerator, data: Images, visit: Callable | None = None
) -> tuple[Images, list[str]]:
    """Each image is read: those that can be, and the `content_key` of each.

    The main process calls `visit` with the index and the RGB image of each.
    """
    keys = {}

    def note(index: int, image: Image.Image) -> None:
        keys[index] = content_key(image)
        if visit:
            visit(index, image)

    found = scan_images(accelerator, data, note)
    logger.info(found.summary)
    good = drop_bad(data, found, args.on_bad_image)
    (ordered,) = broadcast_object_list([[keys[index] for index in sorted(keys)]])
    return good, ordered


def read_once(
    args: argparse.Namespace, accelerator: Accelerator, data: LabelledImages
) -> tuple[LabelledImages, list[str], list[int]]:
    """`read_keys`, and what `find_copies` says of the images."""
    thumbnails = {}
    data, keys = read_keys(args, accelerator, data, lambda index, image: thumbnails.update({index: thumbnail(image)}))
    copies = None
    if accelerator.is_main_process:
        copies = find_copies(keys, np.stack([thumbnails[index] for index in sorted(thumbnails)])).tolist()
    (copies,) = broadcast_object_list([copies])
    return data, keys, copies


def open_cache(args: argparse.Namespace, accelerator: Accelerator, embedder: SketchEmbedder) -> FeatureCache:
    """Where `--feature_dir` keeps `embedder.features`."""
    return FeatureCache(Path(args.feature_dir, f"{embedder.feature_key}-{accelerator.mixed_precision}"))


@torch.no_grad()
def extract_features(
    args: argparse.Namespace, accelerator: Accelerator, embedder: SketchEmbedder, data: Images, keys: Sequence[str]
) -> FeatureCache:
    """`open_cache` with all of `data` in it; the processes share what it lacks.

    `keys` stand for the contents of the images.
    """
    cache = open_cache(args, accelerator, embedder)
    embedder.to(accelerator.device, memory_format=torch.channels_last)
    read = functools.partial(_fitted, data, embedder.resolution, embedder.fit)

    def compute(images: torch.Tensor) -> torch.Tensor:
        with accelerator.autocast():
            return embedder.features(images)

    fill_cache(args, accelerator, cache, keys, read, compute, data.name, args.extraction_batch_size)
    return cache


@torch.no_grad()
def fill_cache(
    args: argparse.Namespace,
    accelerator: Accelerator,
    cache: FeatureCache,
    keys: Sequence[str],
    read: Callable[[int], torch.Tensor],
    compute: Callable[[torch.Tensor], torch.Tensor],
    name: Callable[[int], str],
    batch_size: int,
    what: str = "features",
) -> None:
    """Add `compute` of the pictures that `cache` lacks; the processes share them.

    `read` and `name` take a position in `keys`; `compute` takes a batch and returns (B, F).
    """
    missing = cache.missing(keys)
    accelerator.wait_for_everyone()  # nobody adds before all have looked
    if not missing:
        return
    logger.info(f"{len(set(keys)) - len(missing)} of {len(set(keys))} images have {what} in {cache.folder}")
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    loader = torch.utils.data.DataLoader(_Pictures(mine, read), batch_size, num_workers=args.dataloader_num_workers)
    found: list[torch.Tensor] = []
    start = 0
    for batch in tqdm(loader, what.capitalize(), unit="batch", disable=None if accelerator.is_main_process else True):
        features = compute(batch.to(accelerator.device, memory_format=torch.channels_last)).float().cpu()
        if bad := (~features.isfinite().all(1)).nonzero().flatten().tolist():
            overflowing = name(mine[start + len(found) + bad[0]])
            raise InputError(f"the {what} of {overflowing} overflow: use --mixed_precision bf16 or no")
        found.extend(features)
        stop = start + len(found)
        if len(found) >= CACHE_FILE or stop == len(mine):
            cache.add([keys[index] for index in mine[start:stop]], torch.stack(found))
            found, start = [], stop
    accelerator.wait_for_everyone()
    cache.refresh()
    if cache.missing(keys):
        raise InputError(f"--feature_dir {cache.folder} must be a folder that all machines share")


def _fitted(data: Images, resolution: int, fit: str, index: int) -> torch.Tensor:
    return to_tensor(fit_image(data.image(index), resolution, fit, data.background))


class _Pictures(torch.utils.data.Dataset):
    """What `read` makes of the pictures at some positions."""

    def __init__(self, positions: Sequence[int], read: Callable[[int], torch.Tensor]):
        self.positions, self.read = positions, read

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.read(self.positions[index])


def describe_split(args: argparse.Namespace, result: Split, keys: Sequence[str]) -> dict:
    """A split as it is saved."""
    return {
        "about": "content_key of sketch_perceptual.splits of the images kept apart; all others were trained on",
        "validation_share": args.validation_share,
        "group_column": args.group_column,
        "summary": result.summary,
        "train_images": len(result.train),
        "validation_images": len(result.validation),
        "validation": sorted(keys[index] for index in result.validation),
        "left_out": sorted(keys[index] for index in result.left_out),
    }


def split_hash(record: dict) -> str:
    """12 hexadecimal digits for what `describe_split` says was kept apart."""
    return hashlib.sha256(" ".join(record["validation"]).encode()).hexdigest()[:12]


def check_space(args: argparse.Namespace, saves: int, checkpoint: float, result: float) -> str:
    """How many bytes a run will write and how many are free, in words; InputError if it is too many.

    Args:
        saves: how many checkpoints the run writes if none goes.
        checkpoint, result: bytes of each, and of what stays beside them.
    """
    if args.checkpoints_total_limit is not None:
        saves = min(saves, args.checkpoints_total_limit + 1)  # the oldest goes only when the newest is complete
    needed, free = saves * checkpoint + result, shutil.disk_usage(args.output_dir).free
    if needed > free:
        raise InputError(
            f"--output_dir {args.output_dir} has {free / 1e9:.1f} GB left and this run will write {needed / 1e9:.1f};"
            " lower --checkpoints_total_limit or choose another folder"
        )
    return f"{needed / 1e9:.1f} GB will be written, {free / 1e9:.0f} are free"


def versions() -> dict[str, str]:
    """Of what a result rests on."""
    own = {"python": platform.python_version(), "sketch-perceptual": sys.modules[__package__].__version__}
    names = ("torch", "torchvision", "Pillow", "accelerate", "datasets", "diffusers", "transformers", "peft")
    return own | {name: importlib.metadata.version(name) for name in names}


def make_optimizer(
    args: argparse.Namespace, parameters: list[torch.nn.Parameter], optimizer_class=torch.optim.AdamW, **options
) -> torch.optim.Optimizer:
    """AdamW as diffusers' scripts set it up; without weight decay it is Adam."""
    return optimizer_class(
        parameters,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
        **options,
    )


def make_lr_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer):
    """The schedule in optimizer steps: step it once for each; accelerate would count processes as well."""
    from diffusers.optimization import get_scheduler

    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )


def keep_whole(accelerator: Accelerator, load: Callable[[str], torch.nn.Module]) -> None:
    """From now on checkpoints hold the model as its `save_pretrained` writes it; `load` reads such a folder."""

    def save_model(models, weights, output_dir):
        weights.clear()
        if accelerator.is_main_process:
            accelerator.unwrap_model(models[0]).save_pretrained(output_dir)

    def load_model(models, input_dir):
        accelerator.unwrap_model(models.pop()).load_state_dict(load(input_dir).state_dict())

    accelerator.register_save_state_pre_hook(save_model)
    accelerator.register_load_state_pre_hook(load_model)


def save_checkpoint(accelerator: Accelerator, args: argparse.Namespace, state: dict) -> Path:
    """Write `checkpoint-N` for `state["global_step"]` aside, rename it when complete, and only then drop old ones.

    Call it on all processes. Returns where it is.
    """
    final = Path(args.output_dir, f"checkpoint-{state['global_step']}")
    partial = final.with_name(f".{final.name}.partial")
    if accelerator.is_main_process:
        for abandoned in final.parent.glob(".checkpoint-*.partial"):
            shutil.rmtree(abandoned)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial))
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save's is a RuntimeError
        raise InputError(
            f"{final} could not be written: {first_line(error)}. Older checkpoints are as they were: make room and"
            " go on with --resume_from_checkpoint latest"
        ) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / STATE_FILE).write_text(json.dumps(state, indent=2), encoding="utf-8")
        for path in filter(Path.is_file, partial.rglob("*")):
            with path.open("r+b") as file:
                os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        if args.checkpoints_total_limit is not None:
            others = [path for path in find_checkpoints(args.output_dir) if path != final]
            for old in others[: max(0, len(others) + 1 - args.checkpoints_total_limit)]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def load_checkpoint(accelerator: Accelerator, args: argparse.Namespace, settings: dict) -> dict | None:
    """Resume as `--resume_from_checkpoint` says; the saved state, or None to start from the beginning.

    `settings` are the options that a resumed run must share with the saved one.
    """
    path = _choose_checkpoint(args)
    if path is None:
        return None
    state = _read_state(path)
    for name, now in settings.items():
        if (saved := state["settings"].get(name)) != now:
            raise InputError(
                f"{path} was trained with {name}={saved}, this run has {name}={now}; they must be the same"
            )
    accelerator.load_state(str(path))
    logger.info(f"resumed from {path}")
    return state


def find_checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    complete = [path for path in found if (path / STATE_FILE).is_file()]
    return sorted(complete, key=lambda path: int(path.name.split("-")[1]))


def catch_signals() -> Callable[[], int]:
    """From now on Ctrl-C and SIGTERM only take note; returns a function that tells which came, 0 for none.

    A second Ctrl-C interrupts at once.
    """
    received = 0

    def note(number, frame):
        nonlocal received
        received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return lambda: received


class NonFiniteGuard:
    """Counts the optimizer steps whose loss or gradient was not finite, and ends the run after a few in a row.

    `scaled` says that a gradient scaler is at work: it overflows while it settles, and skips those steps by itself.
    """

    def __init__(self, total: int = 0, scaled: bool = False):
        self.total, self.scaled, self.in_a_row = total, scaled, 0
        self.limit = 25 if scaled else 5

    def is_finite(self, step: int, values: list[float], seen: list[tuple]) -> bool:
        """Whether all `values` are finite; if not, names the step and, of `seen`, what this process had in it.

        Args:
            seen: for each batch of the step the images' names, their losses (B,) and, for diffusion, timesteps (B,).
        """
        if all(map(math.isfinite, values)):
            self.in_a_row = 0
            return True
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        rows = [
            " at timestep ".join([name, *map(str, timestep)])
            for names, losses, *timesteps in seen
            for name, loss, *timestep in zip(names, losses.tolist(), *(t.tolist() for t in timesteps), strict=True)
            if not math.isfinite(loss)
        ]
        blame = f"loss of {', '.join(rows)}" if rows else "gradient"
        logger.warning(f"step {step} skipped, not finite: {blame}", main_process_only=False)
        if self.in_a_row >= self.limit:
            raise FloatingPointError(
                f"{self.in_a_row} steps in a row were not finite, the last at step {step}: {blame}. No such step was"
                " saved. Lower --learning_rate or a weight of the loss, or use --mixed_precision bf16."
            )
        return False


def _choose_checkpoint(args: argparse.Namespace) -> Path | None:
    if args.resume_from_checkpoint is None:
        return None
    complete = find_checkpoints(args.output_dir)
    if args.resume_from_checkpoint == "latest":
        if not complete:
            logger.warning(f"no complete checkpoint in {args.output_dir}: starting from the beginning")
        return complete[-1] if complete else None
    for path in (Path(args.resume_from_checkpoint), Path(args.output_dir, args.resume_from_checkpoint)):
        if (path / STATE_FILE).is_file():
            return path
    names = ", ".join(path.name for path in complete) or "none"
    name = args.resume_from_checkpoint
    raise InputError(f"--resume_from_checkpoint {name} is no complete checkpoint; {args.output_dir} has {names}")


def _read_state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))


def check_writable(folder: Path) -> None:
    """Make the folder of `--output_dir`; InputError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--output_dir {folder} cannot be written to: {error.strerror}") from error
