"""What a user may get wrong -> the sentence that each script answers with, and exit code 2.

Each case runs the script in a folder with good and bad things in it, with options that work but for those of the case.
"""

import re
import shlex
import shutil

import pytest
import torch
from bad_images import IMAGES, noise
from conftest import draw_class, reset_accelerate
from PIL import Image
from safetensors.torch import load_file, save_file

import train_backbone
import train_johnson
import train_lora_sketch
import train_retrieval
from sketch_perceptual.cli import entry
from sketch_perceptual.commands import evaluate, search, stylize
from sketch_perceptual.networks.backbone import AttentionVGG16
from sketch_perceptual.networks.style_net import JohnsonNet

SMALL = "--output_dir out --train_batch_size 2 --seed 0 --report_to none --mixed_precision no"
MEASURED = "--feature_dir features --mixed_precision no"
WORKS = {
    "train_lora_sketch": f"""{SMALL} --pretrained_model_name_or_path sd --train_data_dir drawings --resolution 32
        --perceptual_loss pixel --max_train_steps 1 --feature_dir features""",
    "train_backbone": f"""{SMALL} --train_data_dir drawings --init_weights none --resolution 32 --head linear
        --reduction 2 --pool_after_attention --num_train_epochs 1 --validation_share 0.3""",
    "train_johnson": f"""{SMALL} --train_data_dir drawings --style drawings --backbone net --width 4 --resolution 32
        --max_train_steps 1 --num_validation_images 1""",
    "train_retrieval": f"""{SMALL} --train_data_dir drawings --backbone net --head linear --resolution 32
        --images_per_class 2 --num_train_epochs 1 --num_seeds 1 --validation_share 0.3 --feature_dir features""",
    "evaluate distance": f"{MEASURED} --train_data_dir drawings --models net --resolution 32 --output found.json",
    "evaluate retrieval": f"""{MEASURED} --train_data_dir drawings --models net --resolution 32 --output found.json
        --validation_share 0.3""",
    "evaluate transfer": """--paired_data_dir pairs --models style --backbone net --resolution 32 --output found.json
        --mixed_precision no""",
    "evaluate generation": f"""{MEASURED} --train_data_dir drawings --pretrained_model_name_or_path sd --models none
        --backbone net --resolution 32 --num_inference_steps 1 --num_images 2 --output found.json""",
    "search": f"{MEASURED} --query one.png --gallery drawings --model net --resolution 32",
    "stylize": "--model style --input drawings --output drawn",
}
SCRIPTS = {
    "train_lora_sketch": train_lora_sketch,
    "train_backbone": train_backbone,
    "train_johnson": train_johnson,
    "train_retrieval": train_retrieval,
    "evaluate": evaluate,
    "search": search,
    "stylize": stylize,
}
TRAINERS = [name for name in SCRIPTS if name.startswith("train")]
LABELLED = ["train_backbone", "train_retrieval", "evaluate distance", "evaluate retrieval"]
CAPTIONED = ["train_lora_sketch", "evaluate generation"]
READERS = [*LABELLED, *CAPTIONED, "train_johnson", "search"]

# For each script the options of a case ("- " before them: those that work are left out) and what the sentence says.
MISTAKES: dict[str, list[tuple[str, str]]] = {name: [] for name in WORKS}


def add(names, *cases):
    for name in [names] if isinstance(names, str) else names:
        MISTAKES[name].extend(cases)


add(
    TRAINERS,
    ("--output_dir /proc/nothing", "--output_dir /proc/nothing cannot be written to"),
    ("--resume_from_checkpoint checkpoint-9", "checkpoint-9 is not a complete checkpoint; out has none"),
    ("--background nocolour", "'nocolour' is not a colour"),
    ("--report_to nobody", "accelerate refuses .*report_to"),
    ("--report_to wandb --hub_token hf_x", "use `hf auth login`"),
    ("--push_to_hub --hub_model_id someone/x", "cannot create someone/x: .*HF_HUB_OFFLINE is set"),
    ("--seed -1", "--seed: must be a number of at least 0, got -1"),
    ("--learning_rate nan", "--learning_rate: must be a number above 0, got nan"),
    ("--train_batch_size 0", "--train_batch_size: must be a number of at least 1, got 0"),
    ("--checkpoints_total_limit 0", "--checkpoints_total_limit: must be a number of at least 1, got 0"),
    ("--mixed_precision fp8", "invalid choice: 'fp8'"),
    ("--no_such_option 1", "unrecognized arguments: --no_such_option 1"),
    ("--output_dir one.png", "--output_dir one.png cannot be written to: File exists"),
)
add(
    READERS,
    ("--dataset_name nowhere/drawings", "--dataset_name nowhere/drawings cannot be loaded"),
    ("--train_data_dir nowhere", "cannot read the folder nowhere"),
    ("--train_data_dir one.png", "cannot read the folder one.png: Not a directory"),
    ("--train_data_dir hollow", "hollow"),
    ("--train_data_dir cut", r"1 of \d+ images cannot be read\.\n.*cut/house/cut\.png: .*truncated"),
    ("--train_data_dir bomb", r"1 of \d+ images cannot be read\.\n.*bomb\.png: .*pixels"),
    ("--train_data_dir text", r"1 of \d+ images cannot be read\.\n.*text\.png: it is not an image"),
    ("--train_data_dir rubble", "No image is left: 4 of 4 images cannot be read"),
    ("--on_bad_image ignore", "invalid choice: 'ignore'"),
)
add(
    LABELLED,
    ("--train_data_dir drawings/house", "drawings/house must hold .* found none"),
    ("--train_data_dir splits", "not class names: train, val: pass splits/train"),
    ("--train_data_dir drawings --group_column hand", "--group_column needs --dataset_name"),
)
add(
    ["train_backbone", "train_retrieval", "evaluate retrieval"],
    ("--validation_share 1.5", "--validation_share must be between 0 and 1, got 1.5"),
)
add(
    CAPTIONED,
    ("--pretrained_model_name_or_path nowhere/sd", "--pretrained_model_name_or_path nowhere/sd cannot be loaded"),
    ("--pretrained_model_name_or_path xl", r"xl is a StableDiffusionXLPipeline, .*these scripts take SD-1\.x"),
    ("--pretrained_model_name_or_path net", "--pretrained_model_name_or_path net cannot be loaded"),
    (
        "--pretrained_model_name_or_path pickled-sd",
        r"pickled-sd/unet .*\.safetensors.*_model\.bin",
    ),
    ("--resolution 33", "--resolution 33 must be a multiple of 4"),
    ("--caption_template x", r"--caption_template must contain \{class\}, got 'x'"),
    ("--caption_column title --train_data_dir told", "has no column 'title', --caption_column can be one of"),
    ("--train_data_dir splits", "not class names: train, val: pass splits/train"),
    ("--train_data_dir uncaptioned", "2 of 2 images have no caption"),
    ("--train_data_dir outside", r"line 1 .*\.\./one\.png"),
    ("--train_data_dir lost", r"lists gone\.png, but there is no such image"),
    ("--train_data_dir garbled", r"garbled/metadata\.jsonl line 1 is not JSON"),
    ("--train_data_dir latin", r"latin/1\.txt is not UTF-8"),
    ("--fit stretch", "invalid choice: 'stretch'"),
)
add(
    "train_lora_sketch",
    ("- --pretrained_model_name_or_path sd", "pass --train_data_dir with a folder of drawings, or --dataset_name"),
    ("- --train_data_dir drawings", "required: --pretrained_model_name_or_path"),
    (
        "--lr_scheduler polynomial --learning_rate 1e-8 --lr_warmup_steps 0",
        "--lr_scheduler polynomial with this --learning_rate: lr_end",
    ),
    (
        "--lr_scheduler linear --lr_warmup_steps 1",
        "--lr_warmup_steps: the only step of this run would have a rate of 0",
    ),
    ("--output_dir drawings", "--output_dir drawings would replace drawings, which is read"),
    ("--resume_with rank", "--resume_with is for a resumed run"),
    ("--rank 0", "--rank: must be a number of at least 1, got 0"),
    ("--max_grad_norm 0", "--max_grad_norm"),
    ("--lr_scheduler step", "invalid choice: 'step'"),
    ("--prediction_type flow", "invalid choice: 'flow'"),
    ("--perceptual_dtype float16", "invalid choice: 'float16'"),
    ("--image_interpolation_mode cubic", "invalid choice: 'cubic'"),
    ("--perceptual_loss ssim", "no perceptual loss 'ssim'"),
    ("--perceptual_loss nowhere:Loss", "the loss nowhere:Loss cannot be imported"),
    (
        "--perceptual_loss attention_vgg --backbone shallow --perceptual_layers relu5_1",
        "ends at relu4_3 .*relu5_1",
    ),
    ("--perceptual_loss gram --perceptual_layers relu9", "--perceptual_layers must be distinct names .* got relu9"),
    ("--perceptual_loss attention_vgg --backbone nowhere/vgg", "no backbone at nowhere/vgg"),
    ("--perceptual_loss vgg --backbone nowhere.safetensors", r"no weights file nowhere\.safetensors"),
    (
        "--perceptual_loss vgg --backbone stranger.safetensors",
        r"stranger\.safetensors does not hold torchvision's vgg16",
    ),
    ("--perceptual_loss vgg --backbone damaged.safetensors", r"damaged\.safetensors cannot be read as safetensors"),
    ("--perceptual_loss vgg --backbone net", "the loss for it is attention_vgg"),
    ("--perceptual_layers relu1_2", "pixel does not take --perceptual_layers"),
    ("--perceptual_resolution 8", "--perceptual_resolution must be an integer of at least 16 pixels"),
    ("--perceptual_crop 17", "--perceptual_crop must be an integer of 16 pixels or more and a multiple of 4, got 17"),
    ("--cache_latents", "--cache_latents cannot be used: images that are not square are cropped at random"),
    (
        "--cache_latents --center_crop --feature_dir /proc/nothing",
        "--feature_dir: /proc/nothing.* cannot be written to",
    ),
    ("--perceptual_min_snr 1e9", "the gate never opens"),
    ("--perceptual_decoder nowhere/taesd", "--perceptual_decoder nowhere/taesd cannot be loaded"),
    ("--use_8bit_adam", "pip install bitsandbytes"),
)
add(
    "train_backbone",
    ("--init_weights nowhere.safetensors", r"no weights file nowhere\.safetensors"),
    ("--init_weights stranger.safetensors", r"stranger\.safetensors does not hold torchvision's vgg16"),
    ("--init_weights imagenet", "VGG-16 weights could not be downloaded"),
    ("--init_weights pickled", r"no backbone at pickled: .*pickled/model\.safetensors"),
    ("--init_weights nowhere/net", "no backbone at nowhere/net"),
    ("--init_weights net --attention none", "net was saved with attention=cbam, this run has attention=none"),
    ("--spatial_kernel 4", "spatial_kernel must be odd"),
    ("--reduction 64", "reduction must lie between 1 and"),
    ("--attention se", "invalid choice: 'se'"),
    ("--resolution 16", "--resolution: must be a number of at least 32"),
    ("- --output_dir out", "pass --train_data_dir with a folder of class folders, or --dataset_name"),
)
add(
    "train_johnson",
    ("--backbone nowhere/net", "no backbone at nowhere/net"),
    ("--style_layers relu9_1", "`layers` must be distinct names"),
    ("--content_layer relu9_1", "`layers` must be distinct names"),
    ("--style nowhere.png", r"nowhere\.png: there is no such file"),
    ("--style cut/house/cut.png", r"cut\.png: .*truncated"),
    ("--style hollow", "there are no images in hollow"),
    ("--upsampling bilinear", "invalid choice: 'bilinear'"),
    ("--paired_data_dir pairs", "pass either --style"),
    ("- --style one.png", "pass --train_data_dir with a folder of photos, --dataset_name or --paired_data_dir"),
    ("- --train_data_dir drawings", "pass either --style, a drawing or a folder of them, or --paired_data_dir"),
)
add(
    "train_retrieval",
    ("--backbone nowhere/net", "no backbone at nowhere/net"),
    ("--images_per_class 3", "--train_batch_size must be a multiple of --images_per_class"),
    ("--mining semi", "invalid choice: 'semi'"),
    ("--feature_dir /proc/nothing", "--feature_dir: /proc/nothing.* cannot be written to"),
    ("--train_data_dir copies", "all images are copies of one picture"),
)
add(
    ["evaluate distance", "evaluate retrieval"],
    ("--models x=nowhere/net", "no network at nowhere/net"),
    ("--models net --embedding head", "net is a backbone without a head"),
    ("--embedding mean", "invalid choice: 'mean'"),
    ("--output nowhere/found.json", r"--output nowhere/found\.json cannot be written"),
    ("--output found.txt", r"--output found\.txt must end in \.json"),
    ("--figure sheet.gif", r"--figure sheet\.gif must end in \.png"),
)
add(
    "evaluate transfer",
    ("--part train", "no such pairs"),
    ("--paired_style 1", "has no styles"),
    ("--paired_data_dir nowhere", "nowhere"),
    ("--inception_weights nowhere.safetensors", r"nowhere\.safetensors is not FID's Inception"),
    ("--models net", "net"),
    ("--models nowhere/net", "no style network at nowhere/net"),
)
add(
    "evaluate generation",
    ("--models nowhere/lora", "--models nowhere/lora does not load into the pipeline as a LoRA"),
    ("--models stranger.safetensors", r"--models stranger\.safetensors"),
    ("--models a=none a=none", "--models: a=none is given twice"),
    ("--output_dir /proc/nothing", "--output_dir /proc/nothing cannot be written to"),
    ("--output_dir one.png", "--output_dir one.png/none cannot be written to: .*one.png is not a folder"),
    ("--clip_model nowhere/clip", "--clip_model nowhere/clip cannot be loaded"),
    ("--classifier net", r"--classifier net .*train_backbone\.py"),
    (
        "- --train_data_dir drawings --models x --backbone net",
        "--models: a LoRA and none need --pretrained_model_name_or_path",
    ),
    ("- --models none", "pass --train_data_dir with a folder of drawings, or --dataset_name"),
    ("--prompts nowhere.txt", r"--prompts nowhere\.txt cannot be read"),
    ("--prompts blank.txt", r"--prompts blank\.txt "),
    ("--models hollow", "there are no images in hollow"),
    ("--models black", "black: need at least two pictures, got 0"),
    ("--num_images 1", "--num_images: must be a number of at least 2, got 1"),
)
add(
    "search",
    ("--query nowhere.png", r"nowhere\.png: there is no such file"),
    ("--query cut/house/cut.png", "truncated"),
    ("--gallery hollow", "--gallery: there are no images in hollow"),
    ("--gallery lone", "--gallery: lone .*query"),
    ("- --gallery drawings", "required: --query"),
)
add(
    "stylize",
    ("--model nowhere/net", "no style network at nowhere/net"),
    ("--model net", "net"),
    ("--input nowhere", "--input nowhere: there is no such file"),
    ("--input hollow", "no images in hollow"),
    ("--input cut", r"cut\.png: image file is truncated"),
    ("--output one.png/drawn", "one.png/drawn"),
)
MISTAKES["search"] = [
    (options.replace("--train_data_dir", "--gallery"), says)
    for options, says in MISTAKES["search"]
    if not options.startswith("--dataset_name")
]
CASES = [(name, options, says) for name, cases in MISTAKES.items() for options, says in cases]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_sd):
    root = tmp_path_factory.mktemp("workplace")
    for number, name in enumerate(("house", "cat")):
        draw_class(root / "drawings" / name, 7 * number, 7)
    (root / "hollow").mkdir()
    one = (root / "drawings" / "house" / "1.png").read_bytes()
    damaged = {
        "cut": noise()[:5000],
        "bomb": IMAGES["bomb that Pillow refuses"][0],
        "text": b"<html></html>",
    }
    for name, content in damaged.items():
        for number, kind in enumerate(("house", "cat")):
            draw_class(root / name / kind, 7 * number, 7)
        (root / name / "house" / f"{name}.png").write_bytes(content)
    files = {
        "one.png": one,
        "lone/one.png": one,
        "blank.txt": b" \n",
        "damaged.safetensors": b"\xff" * 100,
        "pickled/config.json": b'{"reduction": 2}',
        "pickled/pytorch_model.bin": b"",
        "xl/model_index.json": b'{"_class_name": "StableDiffusionXLPipeline"}',
        "told/1.png": one,
        "told/metadata.jsonl": b'{"file_name": "1.png", "text": "a house"}',
        "uncaptioned/1.png": one,
        "uncaptioned/2.png": one,
        "outside/1.png": one,
        "outside/metadata.jsonl": b'{"file_name": "../one.png", "text": "a house"}',
        "lost/1.png": one,
        "lost/metadata.jsonl": b'{"file_name": "gone.png", "text": "a house"}',
        "garbled/1.png": one,
        "garbled/metadata.jsonl": b"{text: 1}",
        "latin/1.png": one,
        "latin/1.txt": b"caf\xe9",
    }
    files |= {f"rubble/{kind}/{number}.png": b"" for kind in ("house", "cat") for number in (1, 2)}
    files |= {f"splits/{part}/{kind}/1.png": one for part in ("train", "val") for kind in ("house", "cat")}
    files |= {f"copies/{kind}/{number}.png": one for kind in ("house", "cat") for number in (1, 2)}
    files |= {f"pairs/test/{side}/{number}.png": one for side in ("photos", "sketches") for number in (1, 2)}
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "black" / "house").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(root / "black" / "house" / "1.png")
    (root / "sd").symlink_to(tiny_sd)
    shutil.copytree(tiny_sd, root / "pickled-sd")
    weights = root / "pickled-sd" / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    save_file({"weight": torch.zeros(3)}, root / "stranger.safetensors")
    JohnsonNet(width=4).save_pretrained(root / "style")
    return root


def run(name, options, workplace, monkeypatch):
    """Run a script as its users do; the exit code."""
    script = SCRIPTS[name.split()[0]]
    arguments = [*name.split()[1:], *shlex.split(options)]
    reset_accelerate()
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("sys.argv", [f"{name.split()[0]}.py", *arguments])
    with pytest.raises(SystemExit) as exit:
        if name.startswith("train"):
            entry.run(script.main, script.parse_args(arguments))
        else:
            script.main(arguments)
    return exit.value.code


@pytest.mark.parametrize(("name", "options", "says"), CASES, ids=[f"{name} {options}" for name, options, _ in CASES])
def test_a_mistake_is_answered_with_a_sentence(name, options, says, workplace, narrow, monkeypatch, signals, capsys):
    if not (workplace / "net").exists():
        for kept, place in ((None, "net"), ("relu4_3", "shallow")):
            network = AttentionVGG16(pool_after_attention=True, num_classes=0, reduction=2, last_layer=kept)
            network.save_pretrained(workplace / place)
    before = sorted(workplace.rglob("checkpoint-*"))
    works = "" if options.startswith("- ") else WORKS[name]
    code = run(name, f"{works} {options.removeprefix('- ')}", workplace, monkeypatch)
    answer = capsys.readouterr().err
    assert code == 2, answer
    assert re.search(says, answer), answer
    assert "Traceback" not in answer
    assert sorted(workplace.rglob("checkpoint-*")) == before
