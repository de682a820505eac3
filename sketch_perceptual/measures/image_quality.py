"""Image quality: SSIM, Fréchet and kernel distances of sets, CLIP features."""

import functools
import io
import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import ImageColor
from torch import Tensor, nn

from ..data.images import Source, fit_image, fit_key, load_image, to_tensor
from ..errors import InputError
from ..extras import optional
from ..networks.hub_model import fingerprint, read_safetensors
from ..networks.pretrained import find_folder, load_model, naming
from ..seeds import generator

WINDOW = 11  # pixels of SSIM's window
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
CONVERT = (
    "Download https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/" + INCEPTION + " and convert it once:"
    ' python -c "import torch; from safetensors.torch import save_file; save_file({k: v.contiguous() for k, v in'
    f" torch.load('{INCEPTION}', weights_only=True).items()}}, 'inception.safetensors')\""
)


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def ssim(images: Tensor, target: Tensor) -> Tensor:
    """Structural similarity of each pair (Wang et al. 2004): the mean over all 11x11 windows and the three channels.

    Blank paper scores 1 against blank paper, so sparse drawings score high whatever they show: compare with a blank
    page.

    Args:
        images, target: floats (B, 3, H, W) in [-1, 1], sides from 11 pixels; values outside are clamped.

    Returns (B,) from -1 to 1 (equal images), float32 on the CPU. InputError for any other input, and for NaN.
    """
    measure = optional("torchmetrics.functional.image", "eval").structural_similarity_index_measure
    _check_images(images)
    _check_images(target)
    if images.shape != target.shape:
        raise InputError(f"SSIM compares equal shapes, got {tuple(images.shape)} and {tuple(target.shape)}")
    if min(images.shape[2:]) < WINDOW:
        raise InputError(f"SSIM needs sides of at least {WINDOW} pixels, got {tuple(images.shape[2:])}")
    scores, edge = [], WINDOW // 2
    # Pair by pair on the CPU (0.3 s for 512 pixels), so that the batch changes nothing. CUDA's convolutions round to
    # TF32, whose error in the variance of nearly white paper is two thirds of the constant that SSIM adds to it.
    for pair in zip(images, target, strict=True):
        x, y = ((picture[None].cpu().float().clamp(-1, 1) + 1) / 2 for picture in pair)
        # torchmetrics mirrors the picture at its edges and, since #2721, counts them in its mean; Wang et al. do not.
        _, scored = measure(x, y, data_range=1.0, return_full_image=True)
        scores.append(scored[..., edge:-edge, edge:-edge].mean())
    return torch.stack(scores)


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Fréchet distance of two sets as Gaussians, at least 0; FID on `InceptionFeatures` (Heusel et al. 2017).

    |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)) in float64. Small sets lie far apart even if they are samples
    of one distribution: only distances with equal N are comparable.

    Args:
        features, reference: (N, D) and (M, D), finite, at least two rows, not all the same; else InputError.
    """
    features, reference = _check_features(features, reference)
    for name, rows in (("features", features), ("reference", reference)):
        if (rows == rows[0]).all():
            raise InputError(f"the rows of {name} are all the same, so they have no covariance")
    root, other = _root(features), _root(reference)
    # The eigenvalues of S1^(1/2) S2 S1^(1/2), but only as many as rows: the roots of rounded zeros would add up.
    product = root @ other.T
    overlap = torch.linalg.eigvalsh(product @ product.T).clamp(min=0).sqrt().sum()
    means = (features.mean(0) - reference.mean(0)).square().sum()
    return max(0.0, float(means + root.square().sum() + other.square().sum() - 2 * overlap))


def check_installed() -> None:
    """InputError if a package is missing that `kernel_distance` and `ssim` need."""
    optional("torchmetrics.image.kid", "eval")


def kernel_distance(
    features: Tensor, reference: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Unbiased squared MMD under (x.y / D + 1)^3; KID on `InceptionFeatures` (Binkowski et al. 2018), in float64.

    Args:
        features, reference: (N, D) and (M, D), finite, at least two rows; else InputError.
        subset_size: rows drawn from each set at a time, at most the size of the smaller set.
        seed: of the random subsets.

    Returns mean and deviation over the subsets. The mean can be below 0 if both sets are alike; the deviation is 0 if
    each subset is all of both sets.
    """
    poly_mmd = optional("torchmetrics.image.kid", "eval").poly_mmd
    features, reference = _check_features(features, reference)
    size = min(subset_size, len(features), len(reference))
    if subsets < 1 or size < 2:
        raise InputError(f"`subsets` must be at least 1 and `subset_size` at least 2, got {subsets} and {subset_size}")
    rng = generator(seed, "kid")
    pairs = (
        [rows[torch.randperm(len(rows), generator=rng)[:size]] for rows in (reference, features)]
        for _ in range(subsets)
    )
    distances = torch.stack([poly_mmd(*pair) for pair in pairs])
    return float(distances.mean()), float(distances.std(correction=0))


class InceptionFeatures(nn.Module):
    """The 2048 pooled features of FID's Inception (TensorFlow, 2015), from torch-fidelity. Frozen, in eval mode.

    Args:
        weights: a `.safetensors` file with the names of torch-fidelity's network; the InputError says how to make it.
        resolution, fit, background: preprocessing of `prepare`; see `fit_image`.
    """

    prepare: functools.partial[Tensor]

    def __init__(self, weights: str | Path, resolution: int = 299, fit: str = "crop", background: str = "white"):
        super().__init__()
        self.prepare = functools.partial(_prepare, resolution=resolution, fit=fit, background=background)
        library = optional("torch_fidelity.feature_extractor_inceptionv3", "eval")
        file = io.BytesIO()  # the constructor downloads its weights unless it is given a pickle
        try:
            torch.save(read_safetensors(weights), file)
            file.seek(0)
            self.network = library.FeatureExtractorInceptionV3("", ["2048"], feature_extractor_weights_path=file)
        except (InputError, OSError, RuntimeError) as error:
            reason = textwrap.shorten(str(error), 200)  # the message lists hundreds of names
            raise InputError(f"{weights} is not FID's Inception as safetensors: {reason}. {CONVERT}") from error
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 2048) float32; rounds to 8 bits and resizes to 299 px as in TensorFlow."""
        _check_images(images)
        levels = images.float().clamp(-1, 1).add(1).mul(127.5).round().byte()
        with torch.autocast(images.device.type, enabled=False):
            return self.network(levels)[0]

    features = forward

    @property
    def feature_key(self) -> str:
        """Cache key of everything that changes the `features` of a picture."""
        return _feature_key(self, "inception")


class ClipFeatures(nn.Module):
    """CLIP features of pictures and texts (Radford et al. 2021), in float32. Frozen, in eval mode.

    Args:
        source: a CLIP for transformers with its tokenizer and image processor: a folder or Hub id, safetensors only.
        resolution, fit, background: preprocessing of `prepare`; see `fit_image`.
    """

    prepare: functools.partial[Tensor]
    mean: Tensor
    std: Tensor

    def __init__(self, source: str | Path, resolution: int = 224, fit: str = "crop", background: str = "white"):
        super().__init__()
        library = optional("transformers", "eval")
        self.prepare = functools.partial(_prepare, resolution=resolution, fit=fit, background=background)
        with naming(
            f"`clip_model` {source} cannot be loaded; it must be a CLIP with safetensors: a folder, or a Hub id that"
            " can be reached"
        ):
            folder = find_folder(source)
            self.model = load_model(library.CLIPModel, folder, dtype=torch.float32)
            self.tokenizer = library.AutoTokenizer.from_pretrained(folder)
            images = library.AutoImageProcessor.from_pretrained(folder)
            for name, levels in (("mean", images.image_mean), ("std", images.image_std)):
                self.register_buffer(name, torch.tensor(levels).view(3, 1, 1))
            if not torch.cat([self.texts(["a fox"]), self.features(torch.zeros(1, 3, 8, 8))]).isfinite().all():
                raise InputError("its features are not finite")
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, D)."""
        _check_images(images)
        side = self.model.config.vision_config.image_size
        with torch.autocast(images.device.type, enabled=False):
            images = F.interpolate(images.float(), (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
            return _pooled(self.model.get_image_features((images / 2 + 0.5 - self.mean) / self.std))

    @torch.no_grad()
    def texts(self, prompts: list[str]) -> Tensor:
        """Texts -> (N, D) on the CPU; long texts are truncated before the end token."""
        features, length = [], self.model.config.text_config.max_position_embeddings
        for start in range(0, len(prompts), 64):
            tokens = self.tokenizer(
                prompts[start : start + 64],
                padding="max_length",
                truncation=True,
                max_length=length,
                return_tensors="pt",
            )
            features.append(_pooled(self.model.get_text_features(**tokens.to(self.mean.device))).cpu())
        return torch.cat(features)

    @property
    def feature_key(self) -> str:
        """Cache key of everything that changes the `features` of a picture."""
        return _feature_key(self, "clip")


def _prepare(image: Source, resolution: int, fit: str, background: str) -> Tensor:
    """Load an image as (3, resolution, resolution) in [-1, 1]."""
    return to_tensor(fit_image(load_image(image, background), resolution, fit, background))


def _feature_key(network: InceptionFeatures | ClipFeatures, kind: str) -> str:
    options = network.prepare.keywords
    paper = "".join(f"{level:02x}" for level in ImageColor.getrgb(options["background"])[:3])
    return f"{fingerprint(network)}-{kind}-{options['resolution']}-{fit_key(options['fit'])}-{paper}"


def _pooled(output) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output  # transformers 4 and 5


def _root(rows: Tensor) -> Tensor:
    """Return a root, (min(N, D), D), so that root.T @ root is the covariance of (N, D)."""
    return torch.linalg.qr((rows - rows.mean(0)) / (len(rows) - 1) ** 0.5, mode="r").R


def _check_images(images: Tensor) -> None:
    if not (images.ndim == 4 and images.shape[1] == 3 and images.numel() and images.is_floating_point()):
        raise InputError(f"expected floats (B, 3, H, W) in [-1, 1], got {images.dtype} {tuple(images.shape)}")
    if images.isnan().any():
        raise InputError("images must not contain NaN")


def _check_features(features: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    for name, rows in (("features", features), ("reference", reference)):
        if rows.ndim != 2 or len(rows) < 2:
            raise InputError(f"{name} must be (N, D) with at least two rows, got {tuple(rows.shape)}")
        if not rows.isfinite().all():
            raise InputError(f"{name} must be finite")
    if features.shape[1] != reference.shape[1]:
        raise InputError(f"features have {features.shape[1]} columns, but reference has {reference.shape[1]}")
    return features.detach().cpu().double(), reference.detach().cpu().double()
