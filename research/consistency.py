"""Consistency distillation of a LoRA, the baseline of research.students.

    python -m research.consistency --pretrained_model_name_or_path sketch_perceptual/assets/tiny-sd \\
      --teacher_lora lora --pairs_dir pairs --guidance_scale 4 --output_dir consistency

Latent consistency distillation (Luo et al. 2023, sections 4.1 to 4.4) in the form of diffusers'
train_lcm_distill_lora_sd_wds.py: 50 steps of a DDIM solver, boundary scalings, the student without a gradient as its
own target, a pseudo-Huber loss with c = 0.001; but with one guidance, that of the teacher. The pictures are the pairs
of distill_lora_sketch.py, whose batch size, steps and rate are the defaults; the student starts as the teacher.
`LCMScheduler` draws with it, without guidance.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.optimization import get_cosine_schedule_with_warmup
from safetensors.torch import load_file
from torch import Tensor

from sketch_perceptual.diffusion import process_of
from sketch_perceptual.lora import files
from sketch_perceptual.lora.adapter import Adapter
from sketch_perceptual.lora.encoding import encode_prompts
from sketch_perceptual.lora.prompts import METADATA, latents_path
from sketch_perceptual.seeds import generator

SOLVER_STEPS, SIGMA_DATA, TIMESTEP_SCALING, HUBER = 50, 0.5, 10.0, 0.001


def boundary(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the input and of the predicted x0 in the consistency function, (B, 1, 1, 1)."""
    scaled = (TIMESTEP_SCALING * timesteps.float()).square().view(-1, 1, 1, 1)
    return SIGMA_DATA**2 / (scaled + SIGMA_DATA**2), (scaled / (scaled + SIGMA_DATA**2)).sqrt()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True)
    add("--teacher_lora", required=True)
    add("--pairs_dir", type=Path, required=True, help="of distill_lora_sketch.py")
    add("--guidance_scale", type=float, default=4.0, help="of the teacher")
    add("--learning_rate", type=float, default=1e-3)
    add("--train_batch_size", type=int, default=8)
    add("--max_train_steps", type=int, default=400)
    add("--seed", type=int, default=0)
    add("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    layers = files.folded(files.read(args.teacher_lora).layers)
    student, teacher = (
        StableDiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path, safety_checker=None)
        for _ in range(2)
    )
    adapters = [Adapter.of_layers(pipeline, layers) for pipeline in (student, teacher)]
    for pipeline in (student, teacher):
        pipeline.unet.to(memory_format=torch.channels_last)
    process = process_of(DDPMScheduler.from_pretrained(args.pretrained_model_name_or_path, subfolder="scheduler"))
    texts = [json.loads(line)["text"] for line in (args.pairs_dir / METADATA).read_text().splitlines()]
    paths = sorted(args.pairs_dir.glob("*.png"))
    clean = torch.stack([load_file(latents_path(path))["latents"] for path in paths])
    encode = {text: encode_prompts(student.tokenizer, student.text_encoder, [text]) for text in {"", *texts}}
    optimizer = torch.optim.AdamW(adapters[0].parameters("unet"), args.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, args.max_train_steps)
    grid = (torch.arange(1, SOLVER_STEPS + 1) * (process.num_train_timesteps // SOLVER_STEPS)) - 1

    def consistent(unet, noisy: Tensor, timesteps: Tensor, embeds: Tensor) -> Tensor:
        skip, out = boundary(timesteps)
        predicted = unet(noisy, timesteps, embeds, return_dict=False)[0]
        return skip * noisy + out * process.predict_x0(predicted, noisy, timesteps)

    for step in range(args.max_train_steps):
        rng = generator(args.seed, "consistency", step)
        rows = torch.randint(len(paths), (args.train_batch_size,), generator=rng)
        start = grid[torch.randint(SOLVER_STEPS, (len(rows),), generator=rng)]
        end = (start - process.num_train_timesteps // SOLVER_STEPS).clamp(min=0)
        noise = torch.randn(clean[rows].shape, generator=rng)
        embeds = torch.cat([encode[texts[row]] for row in rows.tolist()])
        noisy = process.add_noise(clean[rows], noise, start)
        predicted = consistent(student.unet, noisy, start, embeds)
        with torch.no_grad():
            empty = encode[""].expand_as(embeds)
            guided, plain = (teacher.unet(noisy, start, context, return_dict=False)[0] for context in (embeds, empty))
            guided = plain + args.guidance_scale * (guided - plain)
            alpha, sigma = (factor.view(-1, 1, 1, 1) for factor in process.factors(start))
            x0 = process.predict_x0(guided, noisy, start)
            target = consistent(student.unet, process.add_noise(x0, (noisy - alpha * x0) / sigma, end), end, embeds)
        loss = ((predicted - target).square() + HUBER**2).sqrt().mean() - HUBER
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapters[0].parameters("unet"), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    adapters[0].save(args.output_dir)


if __name__ == "__main__":
    main()
