"""Distil one LoRA into students of few steps with and without the term, and judge what they draw.

    python -m research.judge --output judge.safetensors
    python -m research.students --judge judge.safetensors --trunk vgg16_hed.safetensors --work students \\
      --results students.jsonl --seeds 301

For each seed, train_lora_sketch.py trains the teacher, a plain LoRA of 24 drawings of eight things, and
distill_lora_sketch.py a student for each arm, all from the same pairs. They draw eight other things from the same
noise: the teacher in its own steps and in few, students by DDIM in 4, 2 and 1. Each setting is one column of a line of
--results, "@4" for four steps; arms that are there are not run again. Prints the table of research.table.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler, StableDiffusionPipeline
from torch import Tensor

import distill_lora_sketch
from research.table import table
from research.term import Judges, embedded, labels_of, prompt
from sketch_perceptual import to_pil
from sketch_perceptual.diffusion import Latents
from sketch_perceptual.drawings import STYLES
from sketch_perceptual.lora.adapter import WEIGHTS
from sketch_perceptual.seeds import generator
from tools.make_tiny_sd import TINY_SD

ROOT = Path(distill_lora_sketch.__file__).parent
TEACHER_STEPS, TEACHER_GUIDANCE = 12, 4.0
TEACHER = """--noise_offset 0.1 --rank 32 --learning_rate 2e-3 --train_batch_size 4 --max_train_steps 300
    --lr_warmup_steps 0 --perceptual_weight 0""".split()
STUDENT = f"""--num_pairs 320 --teacher_num_inference_steps {TEACHER_STEPS}
    --teacher_guidance_scale {TEACHER_GUIDANCE:g} --generation_batch_size 16""".split()
CLASSES_LEARNED, DRAWINGS_LEARNED = 8, 3
STEPS = (4, 2, 1)
SHALLOW = "--perceptual_layers relu1_2 relu2_2 relu3_3"
ARMS = {  # options of distill_lora_sketch.py
    "no term": "--perceptual_weight 0",
    "one step only": "--perceptual_weight 0 --num_inference_steps 1",
    **{
        f"{name}, {ratio}": f"--perceptual_weight {ratio} --perceptual_loss {losses}"
        for ratio in (1, 4, 16)
        for name, losses in {
            "gram + tone": "gram tone",
            "gram": "gram",
            "tone": "tone",
            "distance": "attention_vgg",
            "shallow distance": f"attention_vgg {SHALLOW}",
            "shallow distance + tone": f"attention_vgg tone {SHALLOW}",
            "lpips": "lpips",
            "vgg": "vgg",
            "pixel": "pixel",
        }.items()
    },
}
LONGER = "more steps of the plain LoRA"  # as many images as a student sees
CONSISTENCY = "consistency distillation"


def call(*arguments) -> None:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")


class Bench:
    """The pipeline, the drawings, the judges, and the noise that all draw from."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.began = args, time.monotonic()
        self.world = embedded(args.pipeline, args.style)
        self.size = self.world.learned.shape[-1]
        names = self.world.names[CLASSES_LEARNED:]
        numbers = range(args.per_class)
        self.prompts = [prompt(name) for name in names for _ in numbers]
        self.labels = torch.arange(CLASSES_LEARNED, len(self.world.names)).repeat_interleave(args.per_class)
        self.judges = Judges(args.judge, self.world, self.labels, torch.device("cpu"))
        side = self.size // 8
        draws = [generator("students", name, number) for name in names for number in numbers]
        self.noise = torch.cat([torch.randn(1, 4, side, side, generator=draw) for draw in draws])
        self.drawings = args.work / f"drawings-{args.style}"
        self.prompts_file = args.work / "prompts.txt"
        args.work.mkdir(parents=True, exist_ok=True)
        self.prompts_file.write_text("".join(f"{prompt(name)}\n" for name in self.world.names))
        for label, image in zip(labels_of(self.world.learned, len(self.world.names)), self.world.learned, strict=True):
            folder = self.drawings / self.world.names[int(label)]
            count = len(list(folder.glob("*.png"))) if folder.exists() else 0
            if label < CLASSES_LEARNED and count < DRAWINGS_LEARNED:
                folder.mkdir(parents=True, exist_ok=True)
                to_pil(image).save(folder / f"{count}.png")

    def common(self, seed: int) -> list:
        options = f"--resolution {self.size} --seed {seed} --report_to none".split()
        return ["--pretrained_model_name_or_path", self.args.pipeline, *options]

    def teacher(self, seed: int, *more: str) -> Path:
        folder = self.args.work / f"{self.args.style}-{seed}" / "-".join(["teacher", *more]).replace("--", "")
        if not (folder / WEIGHTS).exists():
            options = ["--train_data_dir", self.drawings, "--output_dir", folder, *TEACHER, *more]
            call("train_lora_sketch.py", *self.common(seed), *options)
        return folder

    def student(self, seed: int, arm: str) -> Path:
        teacher = self.teacher(seed)
        folder = teacher.parent / arm.replace(" ", "-").replace(",", "")
        if not (folder / WEIGHTS).exists():
            options = ["--teacher_lora", teacher, "--prompts", self.prompts_file, *STUDENT, *ARMS[arm].split()]
            if self.args.trunk and arm.startswith(("lpips", "vgg")):
                options += ["--backbone", self.args.trunk]
            folders = ["--pairs_dir", teacher.parent / "pairs", "--output_dir", folder]
            call("distill_lora_sketch.py", *self.common(seed), *options, *folders, *self.args.options)
        return folder

    @torch.no_grad()
    def draw(self, lora: Path, scheduler, steps: int, guidance: float, **options) -> Tensor:
        """Pictures (N, 3, size, size) in [-1, 1]."""
        pipeline = StableDiffusionPipeline.from_pretrained(self.args.pipeline, safety_checker=None)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
        pipeline.load_lora_weights(lora, weight_name=WEIGHTS)
        options = {"timestep_spacing": "trailing"} | options
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **options)
        images = []
        for start in range(0, len(self.prompts), 16):
            part = slice(start, start + 16)
            settings = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "latent"}
            latents = pipeline(self.prompts[part], latents=self.noise[part], **settings).images
            images.append(Latents(pipeline.vae).decode(latents))
        return torch.cat(images).nan_to_num().clamp(-1, 1)

    def measure(self, images: Tensor, teachers: Tensor) -> dict[str, float]:
        """Scores of the judges and, beside the teacher's pictures of the same noise, error and diversity."""
        values = self.judges(images)()
        grey = images.mean(1)
        values["error"] = float((grey - teachers.mean(1)).abs().mean() / 2)
        per_prompt = grey.flatten(1).unflatten(0, (-1, self.args.per_class))
        values["diversity"] = float(torch.cdist(per_prompt, per_prompt, p=1).mean() / 2 / per_prompt.shape[-1])
        features = self.judges.features(images)["lite"], self.judges.features(teachers)["lite"]
        values["likeness"] = float(F.cosine_similarity(*features).mean())
        return values

    def cell(self, arm: str, seed: int, pictures: dict[str, Tensor], teachers: Tensor) -> dict:
        about = {"arm": arm, "seed": seed, "style": self.args.style, "size": self.size, "pictures": len(self.prompts)}
        for setting, images in pictures.items():
            about |= {f"{name} @{setting}": x for name, x in self.measure(images, teachers).items()}
            if self.args.pictures:
                folder = self.args.pictures / f"{self.args.style}-{seed}" / arm.replace(" ", "-").replace(",", "")
                folder.mkdir(parents=True, exist_ok=True)
                for index, image in enumerate(images[:: self.args.per_class]):
                    to_pil(image).save(folder / f"{setting}-{index}.png")
        print(f"{time.monotonic() - self.began:.0f} s: {arm}, seed {seed}", flush=True)
        return about

    def baseline(self, seed: int, arm: str) -> dict[str, Tensor]:
        """Pictures by setting of what is trained otherwise for as long as a student."""
        teacher = self.teacher(seed)
        if arm == LONGER:
            folder, sampler = self.teacher(seed, "--max_train_steps", "1100"), DPMSolverMultistepScheduler
        else:
            folder, sampler = teacher.parent / "consistency", LCMScheduler
            if not (folder / WEIGHTS).exists():
                where = ["--pairs_dir", teacher.parent / "pairs", "--output_dir", folder, "--seed", seed]
                where += ["--pretrained_model_name_or_path", self.args.pipeline, "--teacher_lora", teacher]
                call("-m", "research.consistency", "--guidance_scale", TEACHER_GUIDANCE, *where)
        return {str(steps): self.draw(folder, sampler, steps, 1.0) for steps in STEPS}

    def references(self, seed: int, teachers: Tensor) -> dict[str, dict[str, Tensor]]:
        """Pictures without a student, by arm and setting."""
        plain, sampler = self.teacher(seed), DPMSolverMultistepScheduler
        in_few = {
            f"the LoRA in few steps, {name}": {
                str(steps): self.draw(plain, sampler, steps, guidance) for steps in STEPS
            }
            for name, guidance in (("guidance 4", TEACHER_GUIDANCE), ("no guidance", 1.0))
        }
        return {f"teacher, {TEACHER_STEPS} steps": dict.fromkeys(map(str, STEPS), teachers)} | in_few

    def run(self, seed: int, arms: list[str], keep) -> None:
        """Call `keep` with the cell of each arm; the references come with "no term"."""
        teachers = self.draw(self.teacher(seed), DPMSolverMultistepScheduler, TEACHER_STEPS, TEACHER_GUIDANCE)
        if "no term" in arms:
            for arm, pictures in self.references(seed, teachers).items():
                keep(self.cell(arm, seed, pictures, teachers))
        for arm in arms:
            folder = self.teacher(seed, "--max_train_steps", "1100") if arm == LONGER else self.student(seed, arm)
            pictures = {str(steps): self.draw(folder, DDIMScheduler, steps, 1.0, clip_sample=False) for steps in STEPS}
            keep(self.cell(arm, seed, pictures, teachers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--judge", required=True, help="of research.judge")
    add("--results", type=Path, required=True, help="a file with a line for each cell")
    add("--work", type=Path, required=True, help="folder of the drawings, LoRAs and pairs, which are reused")
    add("--arms", nargs="+", choices=[*ARMS, LONGER, CONSISTENCY], default=["no term", "lpips, 4", "gram + tone, 4"])
    add("--seeds", nargs="+", type=int, default=[301])
    add("--style", choices=STYLES, default="pen", help="of embedded drawings")
    add("--per_class", type=int, default=8, help="pictures of each thing")
    add("--pipeline", default=str(TINY_SD))
    add("--trunk", help="a .safetensors with VGG-16 weights for lpips and vgg")
    add("--pictures", type=Path, help="keep one picture of each thing in this folder")
    args, options = parser.parse_known_args()
    args.work, args.pipeline = args.work.resolve(), str(Path(args.pipeline).resolve())
    args.trunk = args.trunk and str(Path(args.trunk).resolve())
    args.options = options
    bench = Bench(args)
    lines = args.results.read_text().splitlines() if args.results.exists() else []
    cells = [json.loads(line) for line in lines]

    def keep(cell: dict) -> None:
        cells.append(cell)
        with args.results.open("a") as file:
            file.write(json.dumps(cell) + "\n")

    for seed in args.seeds:
        known = {cell["arm"] for cell in cells if (cell["seed"], cell["style"]) == (seed, args.style)}
        if missing := [arm for arm in args.arms if arm not in known]:
            bench.run(seed, missing, keep)
    print(table(cells, "no term"))


if __name__ == "__main__":
    main()
