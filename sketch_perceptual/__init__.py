"""Perceptual losses that understand drawings (Seo 2025), and what it takes to train with them."""

from .data.images import load_image, to_pil, to_tensor
from .diffusion.term import PerceptualTerm, predict_x0
from .errors import InputError
from .losses import LOSSES, ImageLoss, PerceptualLoss, StyleLoss, build_loss, calibrate, check_loss
from .measures.class_distances import class_distances
from .measures.strokes import Strokes, equal_ink_level, measure_strokes, stroke_differences, stroke_distance
from .networks.backbone import AttentionVGG16, load_backbone
from .networks.embedder import SketchEmbedder, load_embedder

__version__ = "0.1.0"

__all__ = [
    "LOSSES",
    "AttentionVGG16",
    "ImageLoss",
    "InputError",
    "PerceptualLoss",
    "PerceptualTerm",
    "SketchEmbedder",
    "Strokes",
    "StyleLoss",
    "build_loss",
    "calibrate",
    "check_loss",
    "class_distances",
    "equal_ink_level",
    "load_backbone",
    "load_embedder",
    "load_image",
    "measure_strokes",
    "predict_x0",
    "stroke_differences",
    "stroke_distance",
    "to_pil",
    "to_tensor",
]
