"""Options and start-up shared by evaluation and search."""

import argparse
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from ..cli.arguments import at_least
from ..errors import InputError
from ..files import LOCK, Output, check_folder, check_outputs
from ..networks.embedder import EMBEDDINGS
from ..training.feature_cache import FeatureCache, extract_features
from ..training.options import add_feature_options
from ..training.startup import PATIENCE, start_logging
from .tables import split_name

# Options that name a file or folder to read.
READ = """query gallery model train_data_dir dataset_name paired_data_dir prompts pretrained_model_name_or_path
    backbone inception_weights clip_model classifier""".split()
ENDINGS = {"figure": (".png",), "output": (".json",)}


def add_embedder_options(add: Callable) -> None:
    add("--embedding", choices=EMBEDDINGS, help="default: the embedder's own; for a backbone the pooled last map")
    add("--resolution", type=at_least(32), help="in pixels; default: that of the embedder's or backbone's training")
    add("--fit", choices=("pad", "crop"), help="default: the embedder's own; for a backbone pad")
    add_workers(add)
    add_precision(add)
    add_feature_options(add)


def add_workers(add: Callable) -> None:
    add(
        "--dataloader_num_workers",
        type=at_least(0),
        default=0,
        help="number of data loading processes; 0: load in the main process",
    )


def add_precision(add: Callable) -> None:
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: accelerate's own setting")


def begin(args: argparse.Namespace, folders: Sequence[Path] = ()) -> Accelerator:
    """Create the accelerator, start logging, and check the outputs before anything slow. InputError.

    Args:
        folders: folders in `output_dir` that pictures are written to.
    """
    try:
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)]
        )
    except ValueError as error:
        raise InputError(f"accelerate refuses `mixed_precision`: {error}") from error
    start_logging(accelerator, args)
    values = vars(args)
    files = [Output(name, values[name], endings) for name, endings in ENDINGS.items() if values.get(name)]
    models = [Path(split_name(model)[1]) for model in values.get("models", ())]
    models += [folder for model in models for folder in model.glob("seed-*")]
    inputs = [*map(values.get, READ), *models]
    kept = [Path(values["output_dir"]), *folders] if folders else []
    new = [Output("output_dir", folder) for folder in kept if not os.path.exists(folder / LOCK)]  # not ours yet
    check_outputs([*files, *new], inputs)
    check_outputs(files, folders)
    for folder in folders:
        check_folder("output_dir", folder)
    return accelerator


def embedder(args: argparse.Namespace) -> dict:
    """Return the keyword arguments of `load_embedder`."""
    return {name: getattr(args, name) for name in ("embedding", "resolution", "fit", "background")}


def extractor(args: argparse.Namespace, accelerator: Accelerator) -> Callable[..., FeatureCache]:
    return functools.partial(
        extract_features,
        accelerator,
        args.feature_dir,
        batch_size=args.extraction_batch_size,
        num_workers=args.dataloader_num_workers,
    )
