"""Export of a trained LoRA of Stable Diffusion 1.x, and the check that it loads."""

from functools import partial
from pathlib import Path

import torch
from accelerate.logging import get_logger
from torch import Tensor

from ..cli.arguments import Options
from ..training.run import Run
from . import files
from .adapter import WEIGHTS, Adapter
from .encoding import tokenize
from .report import kohya_file

logger = get_logger(__name__, log_level="INFO")


def export(args: Options, run: Run, adapter: Adapter, usage_hint: str | None = None) -> str:
    """Write the adapter for diffusers and, under the name that is returned, for other programs.

    Args:
        usage_hint: how to draw with it, for the metadata that other programs show.
    """
    for model in adapter.models.values():
        model.to(torch.float32)
    kohya_weights, base_model = kohya_file(run.hub_model_id, args.output_dir), args.pretrained_model_name_or_path
    metadata = files.run_metadata(
        Path(kohya_weights).stem,
        Path(base_model).resolve().name if Path(base_model).exists() else base_model,
        run.record() | {"steps": run.steps.total, "epochs": run.steps.epochs, "license": args.license},
        is_v2=adapter.pipeline.unet.config.cross_attention_dim == 1024,
        is_v=adapter.pipeline.scheduler.config.prediction_type == "v_prediction",
        usage_hint=usage_hint,
    )
    adapter.export(args.output_dir, kohya_weights, metadata)
    return kohya_weights


def check(args: Options, adapter: Adapter) -> None:
    """Reload the file for diffusers as a user would; TrainingError unless it predicts as what was trained."""
    adapter.verify(args.output_dir, partial(_predict, adapter, args.resolution))
    logger.info(f"adapter: {Path(args.output_dir, WEIGHTS)}, reloaded and checked")


def _predict(adapter: Adapter, resolution: int) -> list[Tensor]:
    """Predictions of the models for a fixed noise and prompt."""
    pipeline, rng = adapter.pipeline, torch.Generator().manual_seed(0)
    unet, side = pipeline.unet.eval(), resolution // pipeline.vae_scale_factor
    latents = torch.randn(1, unet.config.in_channels, side, side, generator=rng).to(unet.device)
    embeds = torch.randn(1, 77, unet.config.cross_attention_dim, generator=rng).to(unet.device)
    if "text_encoder" in adapter.targets:
        embeds = pipeline.text_encoder(tokenize(pipeline.tokenizer, ["a sketch"]).to(unet.device))[0]
    return [embeds, unet(latents, torch.tensor(200, device=unet.device), embeds, return_dict=False)[0]]
