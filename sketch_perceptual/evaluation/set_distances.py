"""Distances between sets of pictures, and the features they are computed from."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate.logging import get_logger
from torch import Tensor

from ..errors import InputError
from ..measures.image_quality import InceptionFeatures, frechet_distance, kernel_distance
from ..networks.backbone import load_backbone
from ..networks.embedder import make_embedder
from ..networks.hub_model import fingerprint

logger = get_logger(__name__, log_level="INFO")

KERNELS = {"fid": "kid", "frechet": "kernel"}  # distance of sets, and one that is less biased for small sets
FEW = 2048  # dimension of Inception's features: the covariance of fewer pictures is singular


@dataclass(frozen=True)
class Features:
    """Features to compare sets of pictures: "fid" by Inception, "frechet" by a backbone."""

    kind: str
    extract: Callable[[Tensor], Tensor]
    description: str


def load_features(inception_weights: str | None, backbone: str, resolution: int, device: torch.device) -> Features:
    if inception_weights:
        network = InceptionFeatures(inception_weights).to(device)
        return Features("fid", network.features, f"Inception {fingerprint(network)} at 299 px")
    embedder = make_embedder(load_backbone(backbone, "none")).to(device)
    weights = embedder.feature_key.split("-")[0]
    return Features("frechet", embedder.features, f"the pooled last map of VGG-16 {weights} at {resolution} px")


def set_distances(kind: str, features: Tensor, reference: Tensor) -> dict[str, float]:
    """Return Frechet and kernel distances; Frechet is NaN, with a warning, if all drawings are the same."""
    mean, deviation = kernel_distance(features, reference)
    try:
        frechet = frechet_distance(features, reference)
    except InputError as error:
        logger.warning(f"no {kind}: {error}")
        frechet = math.nan
    return {kind: frechet, KERNELS[kind]: mean, f"{KERNELS[kind]}_deviation": deviation}


def warn_of_small_sets(kind: str, drawn: int, true: int, description: str) -> None:
    logger.info(f"{kind} of {drawn} drawings and {true} true drawings, from {description}")
    if drawn < FEW:
        logger.warning(f"{kind} is too large for fewer than {FEW} pictures: compare it only at this number")
