"""Options shared by the trainers."""

from collections.abc import Callable

from ..cli.arguments import Parser, above, at_least, fraction

SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")


def add_training_options(parser: Parser, output_dir: str) -> None:
    """Add the options common to diffusers' training scripts, with the same names, defaults and meaning."""
    add, count, natural, rate = parser.group("training"), at_least(1), at_least(0), at_least(0.0, float)
    add("--learning_rate", type=above(0), default=1e-4)
    add("--train_batch_size", type=count, default=16, help="batch size per process")
    add("--num_train_epochs", shared=False, type=count, default=100)
    add(
        "--max_train_steps",
        shared=False,
        type=count,
        help="total number of optimizer steps; overrides --num_train_epochs",
    )
    add("--gradient_checkpointing", shared=False, action="store_true", help="save memory with a slower backward pass")
    add("--gradient_accumulation_steps", type=count, default=1, help="number of batches per optimizer step")
    add("--lr_scheduler", default="constant", choices=SCHEDULES)
    add("--lr_warmup_steps", type=natural, default=500, help="warm-up of the learning rate, in optimizer steps")
    add(
        "--scale_lr",
        action="store_true",
        help="scale the learning rate by processes, accumulation steps and batch size",
    )
    add("--max_grad_norm", type=at_least(1e-12, float), default=1.0, help="maximum gradient norm, for clipping")
    add("--adam_beta1", type=fraction, default=0.9)
    add("--adam_beta2", type=fraction, default=0.999)
    add("--adam_weight_decay", type=rate, default=1e-2)
    add("--adam_epsilon", type=rate, default=1e-8)
    add_run_options(parser, output_dir)(
        "--checkpointing_steps",
        shared=False,
        type=count,
        default=500,
        help="save a checkpoint every N optimizer steps",
    )


def add_run_options(parser: Parser, output_dir: str) -> Callable:
    """Add the options of a `Run`; return `add_argument` of their group."""
    add, count, natural = parser.group("run"), at_least(1), at_least(0)
    add(
        "--output_dir",
        shared=False,
        default=output_dir,
        help="where the model, the checkpoints and the logs are written",
    )
    add("--seed", type=natural, help="random seed; default: a new one, which is saved")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: accelerate's own setting")
    add(
        "--resume_from_checkpoint",
        shared=False,
        help='a checkpoint\'s folder or its name in --output_dir, or "latest"',
    )
    add(
        "--resume_with",
        shared=False,
        nargs="+",
        metavar="NAME",
        help="options (or `data`) that may differ from the checkpoint, e.g. learning_rate",
    )
    add("--checkpoints_total_limit", shared=False, type=count, help="keep only the newest N checkpoints")
    add("--dry_run", shared=False, action="store_true", help="read the data, print a report and exit")
    add(
        "--figure_data",
        shared=False,
        help="write a .png of the data as the model will see them, cropped or padded",
    )
    add(
        "--report_to",
        shared=False,
        default="tensorboard",
        help="tensorboard, wandb, comet_ml, another tracker of accelerate's, all or none",
    )
    add("--logging_dir", shared=False, default="logs", help="where logs are written, inside --output_dir")
    add(
        "--dataloader_num_workers",
        shared=False,
        type=natural,
        default=0,
        help="number of data loading processes; 0: load in the main process",
    )
    add("--allow_tf32", action="store_true", help="allow TF32 on Ampere GPUs and newer")
    add("--push_to_hub", shared=False, action="store_true", help="upload the result to the Hugging Face Hub")
    add("--hub_model_id", shared=False, help="the Hub repository; default: the name of --output_dir")
    add(
        "--hub_private_repo",
        shared=False,
        action="store_true",
        help="create a private repository; an existing public one is refused",
    )
    add(
        "--hub_token", shared=False, type=lambda token: token or None, help="token of the Hub; better: `hf auth login`"
    )
    add(
        "--license",
        shared=False,
        help="licence in the model card, e.g. cc-by-4.0; default: SD-1.5's for a LoRA, else none",
    )
    add("--local_rank", shared=False, type=int, default=-1, help="accepted for launchers that pass it; not used")
    return add


def add_feature_options(add: Callable) -> None:
    """Add the options of `extract_features`."""
    add("--extraction_batch_size", shared=False, type=at_least(1), default=64, help="batch size of the frozen network")
    add_feature_dir(add, "cache of features, keyed by image, weights, resolution and precision")


def add_feature_dir(add: Callable, description: str) -> None:
    add("--feature_dir", shared=False, help=f"{description}; default: ~/.cache/sketch-perceptual/features")
