"""Run out of memory at each stage of each trainer and command, and count what ends as it should.

    python tests/stress/out_of_memory.py

Right is exit code 2, one sentence that says "out of memory", no traceback; and where a training had taken steps, a
checkpoint of the last whole one. Stages whose failure costs no training, such as validation pictures, must end with 0.

Right on 2026-11-30: 72 of 72, each of ERRORS at 24 stages. Before, 23 of 25 ends of memory were tracebacks.
"""

import contextlib
import io
import pkgutil
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

import train_backbone
import train_johnson
import train_lora_sketch
import train_retrieval
from sketch_perceptual.cli import entry, interruption
from sketch_perceptual.commands import compare, evaluate, search, stylize
from sketch_perceptual.drawings import __main__ as drawings
from sketch_perceptual.networks.style_net import JohnsonNet
from sketch_perceptual.training.checkpoints import find_checkpoints
from sketch_perceptual.training.lock import unlock_folder

ASSETS = Path(train_lora_sketch.__file__).parent / "sketch_perceptual/assets"
ERRORS = {
    "CUDA": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    "CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"),
    "Python": MemoryError(),
}
SMALL = "--train_batch_size 2 --seed 0 --report_to none --mixed_precision no --output_dir {folder}/out"
SMALL += " --train_data_dir {drawings}"
LORA = f"""{SMALL} --pretrained_model_name_or_path {ASSETS}/tiny-sd --resolution 64 --max_train_steps 4
    --feature_dir {{folder}}/features --perceptual_crop 32 --validation_prompt fox --num_validation_images 1"""
BACKBONE = f"""{SMALL} --init_weights none --resolution 32 --head linear --pool_after_attention --max_train_steps 4
    --dataloader_num_workers 0 --validation_share 0.3"""
STYLE = (
    f"{SMALL} --style {{drawings}} --backbone {ASSETS}/attention-vgg16 --width 4 --resolution 32 --max_train_steps 4"
)
RETRIEVAL = f"""{SMALL} --backbone {ASSETS}/attention-vgg16 --head linear --resolution 32 --images_per_class 2
    --num_train_epochs 2 --num_seeds 1 --validation_share 0.3 --feature_dir {{folder}}/features"""
DISTANCE = f"""distance --train_data_dir {{drawings}} --models {ASSETS}/attention-vgg16 --resolution 32
    --mixed_precision no --feature_dir {{folder}}/features"""
STYLIZE = "--model {style} --input {drawings} --output {folder}/drawn"
SEARCH = """--query {drawings}/boat/0000.png --gallery {drawings} --feature_dir {folder}/features --resolution 32
    --mixed_precision no"""

# Program, its options, what fails and in which of its calls, and how many steps are then done (None: it must succeed).
STAGES = [
    ("train_lora_sketch", LORA, "diffusers.UNet2DConditionModel.forward", 1, 0),  # where the pipeline is tried
    ("train_lora_sketch", LORA, "diffusers.UNet2DConditionModel.forward", 4, 2),
    ("train_lora_sketch", LORA, "accelerate.Accelerator.backward", 3, 2),
    ("train_lora_sketch", LORA, "train_lora_sketch.balance", 2, 1),
    ("train_lora_sketch", LORA, "sketch_perceptual.diffusion.latents.Latents.decode", 5, 3),
    ("train_lora_sketch", LORA, "sketch_perceptual.diffusion.latents.Latents.encode", 2, 0),
    ("train_lora_sketch", LORA, "diffusers.StableDiffusionPipeline.__call__", 1, None),
    ("train_lora_sketch", LORA, "train_lora_sketch.Adapter.export", 1, 4),
    ("train_lora_sketch", LORA, "train_lora_sketch.load_pipeline", 1, 0),
    ("train_backbone", BACKBONE, "sketch_perceptual.AttentionVGG16.forward", 1, 0),
    ("train_backbone", BACKBONE, "accelerate.Accelerator.backward", 3, 2),
    ("train_backbone", BACKBONE, "train_backbone.evaluate", 1, 4),
    ("train_backbone", BACKBONE, "train_backbone.save_network", 1, 4),
    ("train_johnson", STYLE, "train_johnson.TransferLoss.__call__", 10, 1),
    ("train_johnson", STYLE, "accelerate.Accelerator.backward", 3, 2),
    ("train_johnson", STYLE, "train_johnson.stylize", 1, None),
    ("train_retrieval", RETRIEVAL, "sketch_perceptual.SketchEmbedder.features", 1, 0),
    ("train_retrieval", RETRIEVAL, "train_retrieval.Head.forward", 3, 2),
    ("train_retrieval", RETRIEVAL, "train_retrieval.evaluate", 1, 8),
    ("compare", "{drawings}/boat/0000.png {drawings}/cat/0000.png", "sketch_perceptual.PerceptualLoss.forward", 1, 0),
    (
        "stylize",
        "--model {style} --input {drawings} --output {folder}/drawn",
        "sketch_perceptual.commands.stylize.stylize",
        2,
        0,
    ),
    ("search", SEARCH, "sketch_perceptual.SketchEmbedder.features", 1, 0),
    ("drawings", "--output_dir {folder}/more --per_class 1 --size 32", "sketch_perceptual.drawings.folder.draw", 3, 0),
    ("evaluate", DISTANCE, "sketch_perceptual.SketchEmbedder.features", 1, 0),
]
PROGRAMS = {
    "train_lora_sketch": train_lora_sketch,
    "train_backbone": train_backbone,
    "train_johnson": train_johnson,
    "train_retrieval": train_retrieval,
}
COMMANDS = {"compare": compare, "stylize": stylize, "search": search, "evaluate": evaluate, "drawings": drawings}


def failing(path: str, number: int, error: BaseException):
    """A patch of what `path` names that raises `error` in call `number`."""
    function, calls = pkgutil.resolve_name(path), []

    def fails(*args, **options):
        calls.append(path)
        if len(calls) == number:
            raise error
        return function(*args, **options)

    return mock.patch(path, fails)


def attempt(program: str, options: str, path: str, number: int, error: BaseException, names: dict) -> tuple[int, str]:
    """Exit code and all output of one run."""
    PartialState._reset_state()
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    output, argv = io.StringIO(), options.format(**names).split()
    code: int | str | None = 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), failing(path, number, error):
        try:
            if script := PROGRAMS.get(program):
                entry.run(script.main, script.parse_args(argv))
            else:
                COMMANDS[program].main(argv)
        except SystemExit as end:
            code = end.code
        except BaseException as escaped:
            code = f"Traceback: {escaped!r}"
    interruption.defer(False)
    unlock_folder(names["folder"] / "out")
    return code, output.getvalue()


def judge(code, output: str, steps: int | None, folder: Path) -> str:
    """ "right", or what is wrong."""
    if steps is None:
        return "right" if code == 0 else f"ended with {code}"
    if code != 2 or "out of memory" not in output or "Traceback" in output:
        return f"ended with {code}: {output[-200:]}"
    saved = [int(path.name.split("-")[1]) for path in find_checkpoints(folder / "out")]
    return "right" if not steps or saved[-1:] == [steps] else f"saved {saved}, not step {steps}"


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    names = {"drawings": folder / "drawings", "style": folder / "style"}
    drawings.write_folder(names["drawings"], per_class=6, size=64, classes=("boat", "cat"))
    (names["drawings"] / "metadata.jsonl").unlink()
    JohnsonNet(width=4).save_pretrained(names["style"])
    counts: Counter = Counter()
    for program, options, path, number, steps in STAGES:
        for kind, error in ERRORS.items():
            names["folder"] = folder / "run"
            verdict = judge(*attempt(program, options, path, number, error, names), steps, names["folder"])
            counts[program, verdict == "right"] += 1
            if verdict != "right":
                print(f"{program}, {kind} memory in call {number} of {path}: {verdict}", flush=True)
            shutil.rmtree(names["folder"], ignore_errors=True)
    shutil.rmtree(folder)
    for program in dict.fromkeys(program for program, _ in counts):
        print(f"{program}: {counts[program, True]} of {counts[program, True] + counts[program, False]} right")
    sys.exit(any(not right for _, right in counts))


if __name__ == "__main__":
    main()
