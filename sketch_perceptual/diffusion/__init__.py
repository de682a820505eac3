"""The perceptual term of diffusion training, and what it rests on: noise process and latents."""

from .balance import balance
from .latents import Latents
from .process import Diffusion, Flow, Process, process_of
from .term import PerceptualTerm, predict_x0

__all__ = ["Diffusion", "Flow", "Latents", "PerceptualTerm", "Process", "balance", "predict_x0", "process_of"]
