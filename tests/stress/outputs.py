"""Try every output option of every command onto every input, by path, link and other spelling.

    python tests/stress/outputs.py [WORD ...]

Only the commands that hold one of the words, if any are given, as in `train_ generation`. Right is exit code 2, a
message that names both, and an input whose bytes are as before. Prints a line for each command and exits with 1 if an
attempt went wrong. `tests/test_outputs.py` runs a part of it.

Right on 2026-11-30: 724 of 724.
"""

import importlib
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from sketch_perceptual.cli import entry
from sketch_perceptual.drawings import write_folder
from sketch_perceptual.lora import files as lora_files
from sketch_perceptual.networks.backbone import BUNDLED
from sketch_perceptual.networks.style_net import JohnsonNet

TINY_SD = Path(__file__).resolve().parents[2] / "sketch_perceptual" / "assets" / "tiny-sd"
SPELLINGS = ("path", "absolute", "dots", "symlink", "hardlink")


class Command(NamedTuple):
    """A command line without outputs; `files` and `folders` are its output options, `inputs` what they are tried onto.

    Args:
        line: what follows the module's name.
        inputs: files and folders that the line names, or that lie in such folders.
    """

    module: str
    line: str
    files: dict[str, str]
    folders: tuple[str, ...]
    inputs: tuple[str, ...]


DRAWINGS = ("drawings", "drawings/cat", "drawings/cat/0000.png", "drawings/metadata.jsonl")
NETWORK = ("net", "net/config.json", "net/model.safetensors")
BACKBONE = ("vgg", "vgg/config.json", "vgg/model.safetensors")
PIPELINE = ("sd", "sd/model_index.json", "sd/unet", "sd/unet/config.json")
DATA = {"figure_data": ".png"}
LABELLED = "--train_data_dir drawings --models a=vgg"
TRAINED = "--train_data_dir drawings --max_train_steps 1"
COMMANDS = (
    Command("compare", "one.png two.png --backbone vgg", {"figure": ".png"}, (), ("one.png", "two.png", *BACKBONE)),
    Command("compare", "drawings photos", {"figure": ".png"}, (), (*DRAWINGS, "photos", "photos/cat/0000.png")),
    Command(
        "search",
        "--query one.png --gallery drawings --model vgg",
        {"figure": ".png"},
        (),
        ("one.png", *DRAWINGS, *BACKBONE),
    ),
    Command("stylize", "--model net --input one.png", {"output": ".png"}, (), ("one.png", *NETWORK)),
    Command("stylize", "--model net --input drawings", {}, ("output",), ("drawings", "drawings/cat/0000.png")),
    Command("convert", "lora.safetensors", {"": ".safetensors"}, (), ("lora.safetensors",)),
    Command("drawings", "--per_class 1 --size 32", {}, ("output_dir",), ("one.png",)),
    *(
        Command(
            "evaluate",
            f"{task} {LABELLED}",
            {"output": ".json", "figure": ".png"},
            (),
            (*DRAWINGS, *BACKBONE),
        )
        for task in ("distance", "retrieval")
    ),
    Command(
        "evaluate",
        "transfer --paired_data_dir pairs --models a=net",
        {"output": ".json", "figure": ".png"},
        (),
        ("pairs/photos/0000.png", "pairs", *NETWORK),
    ),
    Command(
        "evaluate",
        "generation --train_data_dir drawings --pretrained_model_name_or_path sd --prompts prompts.txt --models"
        " cat=none a=lora --classifier vgg",
        {"output": ".json", "figure": ".png"},
        ("output_dir",),
        ("prompts.txt", "lora/pytorch_lora_weights.safetensors", *DRAWINGS, *PIPELINE, *BACKBONE),
    ),
    Command("train_backbone", f"{TRAINED} --init_weights vgg.safetensors", DATA, ("output_dir",), DRAWINGS),
    Command("train_retrieval", f"{TRAINED} --backbone vgg", DATA, ("output_dir",), (*DRAWINGS, *BACKBONE)),
    Command("train_johnson", f"{TRAINED} --style photos", DATA, ("output_dir",), (*DRAWINGS, "photos")),
    Command(
        "train_lora_sketch",
        f"{TRAINED} --pretrained_model_name_or_path sd --backbone vgg",
        DATA,
        ("output_dir",),
        (*DRAWINGS, *PIPELINE, *BACKBONE),
    ),
)


class Attempt(NamedTuple):
    command: Command
    option: str
    target: str
    source: str

    def argv(self) -> list[str]:
        line = self.command.line.split()
        if self.command.module == "train_retrieval":
            line = [word for word in line if word not in ("--max_train_steps", "1")]
        return [*line, *([f"--{self.option}"] if self.option else []), self.target]


def prepare(folder: Path) -> None:
    """Write the inputs of all commands into `folder`."""
    write_folder(folder / "drawings", 2, size=64, classes=("cat", "house"))
    write_folder(folder / "photos", 2, size=64, styles=("photo",), classes=("cat", "house"))
    for name in ("one", "two"):
        shutil.copy(folder / "drawings" / "cat" / f"000{int(name == 'two')}.png", folder / f"{name}.png")
    for side in ("photos", "sketches"):
        (folder / "pairs" / side).mkdir(parents=True)
        shutil.copy(folder / "drawings" / "cat" / "0000.png", folder / "pairs" / side / "0000.png")
    shutil.copytree(BUNDLED, folder / "vgg")
    shutil.copy(BUNDLED / "model.safetensors", folder / "vgg.safetensors")
    shutil.copytree(TINY_SD, folder / "sd")
    JohnsonNet(width=4).save_pretrained(folder / "net")
    layer = lora_files.Layer(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    (folder / "lora").mkdir()
    for name in ("lora.safetensors", "lora/pytorch_lora_weights.safetensors"):
        lora_files.write_diffusers(folder / name, {"unet.mid_block.attentions.0.proj_in": layer})
    (folder / "prompts.txt").write_text("a cat\n")


def attempts(command: Command, spellings: tuple[str, ...] = SPELLINGS) -> Iterator[Attempt]:
    """Each output onto each input; links are made in the current folder, which `prepare` has filled."""
    options = {**command.files, **dict.fromkeys(command.folders, "")}
    for option, ending in options.items():
        for source in command.inputs:
            for spelling in spellings:
                if spelling == "hardlink" and Path(source).is_dir():
                    continue
                if target := spell(source, spelling, ending):
                    yield Attempt(command, option, target, source)


def spell(source: str, spelling: str, ending: str) -> str | None:
    if spelling in ("path", "absolute"):
        return source if spelling == "path" else str(Path(source).resolve())
    if spelling == "dots":
        return f"drawings/../{source}"
    link = Path(f"{spelling}-{source.replace('/', '-')}{ending}")
    if not os.path.lexists(link):
        if spelling == "hardlink":
            os.link(source, link)
        else:
            link.symlink_to(Path(source).resolve())
    return str(link)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def states(paths: Iterable[str]) -> list[tuple[int, ...] | None]:
    """A file's attributes that change when it does, without reading it; None for one that is gone."""
    known = (os.stat(path) if os.path.exists(path) else None for path in paths)
    return [status and (status.st_ino, status.st_size, status.st_mtime_ns) for status in known]


def load(command: Command) -> ModuleType:
    name = command.module
    if not name.startswith("train_"):
        name = "sketch_perceptual.drawings.__main__" if name == "drawings" else f"sketch_perceptual.commands.{name}"
    return importlib.import_module(name)


def run(attempt: Attempt) -> None:
    """The command in this process; ends it by SystemExit."""
    module = load(attempt.command)
    if attempt.command.module.startswith("train_"):
        entry.run(module.main, module.parse_args(attempt.argv()))
    else:
        module.main(attempt.argv())


def names_both(message: str, attempt: Attempt) -> bool:
    """The output as it was written and the input, or a folder or file of it."""
    return attempt.target in message and (attempt.source in message or str(Path(attempt.source).resolve()) in message)


def outcome(attempt: Attempt) -> str:
    """Run an attempt in its own process; return "" if it was right."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.close(read)
        sys.stdout = sys.stderr = open(write, "w")  # noqa: SIM115
        code = 0
        try:
            run(attempt)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        message = pipe.read().decode(errors="replace")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code != 2 or "Traceback" in message:
        return f"exit code {code}: {message[-160:]}"
    return "" if names_both(message, attempt) else f"does not name both: {message[-160:]}"


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        os.environ["XDG_CACHE_HOME"] = str(Path(name, "cache"))
        prepare(Path(name))
        before = contents(Path())
        for command in COMMANDS:
            if sys.argv[1:] and not any(word in f"{command.module} {command.line}" for word in sys.argv[1:]):
                continue
            load(command)
            tried, failures = list(attempts(command)), []
            state = states(before)
            for attempt in tried:
                problem = outcome(attempt)
                if states(before) != state and contents(Path()) | before != contents(Path()):
                    sys.exit(f"--{attempt.option} {attempt.target} changed an input")
                if problem:
                    failures.append(f"    --{attempt.option} {attempt.target} onto {attempt.source}: {problem}")
            wrong += len(failures)
            print(f"{command.module} {command.line[:40]}: {len(tried) - len(failures)} of {len(tried)} right")
            print(*failures, sep="\n", end="\n" if failures else "", flush=True)
        os.chdir("/")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
