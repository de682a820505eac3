"""The options that a resumed run may change without saying so: review a name before it is added here."""

import pytest
from accelerate import Accelerator
from conftest import reset_accelerate

import distill_lora_sketch
import train_backbone
import train_johnson
import train_lora_sketch
import train_retrieval
from sketch_perceptual.training.identity import identity_of

# They change only where things are read or written, how fast, or what is shown.
FREE = """output_dir logging_dir report_to local_rank dataloader_num_workers checkpoints_total_limit
    resume_from_checkpoint resume_with push_to_hub hub_token hub_model_id hub_private_repo license cache_dir
    dry_run figure_data num_train_epochs""".split()
# The run compares the contents that they lead to.
CONTENTS = "train_data_dir dataset_name dataset_config_name image_column max_train_samples on_bad_image".split()
TRAINERS = {
    train_lora_sketch: (
        ["--pretrained_model_name_or_path", "x", "--train_data_dir", "y"],
        """checkpointing_steps max_train_steps gradient_checkpointing feature_dir validation_prompt
        num_validation_images validation_size validation_epochs caption_column pretrained_model_name_or_path revision
        variant backbone perceptual_decoder""",
        "rank use_dora train_text_encoder use_8bit_adam",
    ),
    distill_lora_sketch: (
        ["--pretrained_model_name_or_path", "x", "--teacher_lora", "y", "--prompts", "z"],
        """checkpointing_steps max_train_steps gradient_checkpointing validation_prompt num_validation_images
        validation_size validation_epochs pretrained_model_name_or_path revision variant backbone perceptual_decoder
        teacher_lora prompts pairs_dir generation_batch_size""",
        "",
    ),
    train_backbone: (
        ["--train_data_dir", "y"],
        """checkpointing_steps max_train_steps gradient_checkpointing logging_steps label_column group_column
        init_weights attention pool_after_attention open_gates spatial_kernel reduction""",
        "attention pool_after_attention spatial_kernel reduction head freeze",
    ),
    train_johnson: (
        ["--train_data_dir", "y", "--style", "z"],
        """checkpointing_steps max_train_steps gradient_checkpointing num_validation_images validation_steps backbone
        style paired_data_dir paired_style""",
        "width norm upsampling",
    ),
    train_retrieval: (
        ["--train_data_dir", "y"],
        "num_seeds feature_dir extraction_batch_size label_column group_column backbone resolution",
        "embedding_dim head",
    ),
}


@pytest.mark.parametrize("script", TRAINERS, ids=lambda script: script.__name__)
def test_all_other_options_must_be_as_they_were(script):
    options, free, fixed = TRAINERS[script]
    args = script.parse_args(options)
    reset_accelerate()
    compared = identity_of(args, Accelerator(cpu=True)).keys()
    not_compared = vars(args).keys() - compared - {"gradient_accumulation_steps"}  # not an option of retrieval
    contents = CONTENTS if "train_data_dir" in args else []
    assert not_compared == {*FREE, *contents, *free.split()}
    assert args.fixed == set(fixed.split())
