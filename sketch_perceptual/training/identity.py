"""What makes two runs the same: the options that can change a result, and the contents of data and weights."""

import argparse
import hashlib
import json
from collections.abc import Iterable

from accelerate import Accelerator

# They change where things are written or read from, how fast, or what is shown.
FREE = """output_dir logging_dir logging_steps report_to local_rank dataloader_num_workers checkpointing_steps
    checkpoints_total_limit resume_from_checkpoint resume_with push_to_hub hub_token hub_model_id license cache_dir
    feature_dir extraction_batch_size gradient_checkpointing validation_prompt num_validation_images
    validation_size validation_epochs validation_steps max_train_steps num_train_epochs num_seeds on_bad_image
    dry_run figure_data hub_private_repo"""
# Compared by what they lead to: the contents of the images with their captions or classes, and the weights.
CONTENTS = """train_data_dir dataset_name dataset_config_name image_column caption_column label_column group_column
    max_train_samples style paired_data_dir paired_style pretrained_model_name_or_path revision variant backbone
    init_weights perceptual_decoder attention pool_after_attention open_gates spatial_kernel reduction"""
# Other values change the shape or the number of the weights, so that no resumed run can have them.
SHAPES = set(
    """rank use_dora train_text_encoder use_8bit_adam width norm upsampling embedding_dim head freeze attention
    pool_after_attention spatial_kernel reduction last_layer""".split()
)


def identity_of(args: argparse.Namespace, accelerator: Accelerator) -> dict:
    """The options of a run that a resumed one must share, with their effective values; JSON."""
    others = {*FREE.split(), *CONTENTS.split()}
    options = {name: value for name, value in vars(args).items() if name not in others}
    options |= {"mixed_precision": accelerator.mixed_precision, "processes": accelerator.num_processes}
    return json.loads(json.dumps(options))


def digest(parts: Iterable) -> str:
    """12 hexadecimal digits for the JSON of `parts`, in their order."""
    text = hashlib.sha256()
    for part in parts:
        text.update(json.dumps(part).encode() + b"\n")
    return text.hexdigest()[:12]
