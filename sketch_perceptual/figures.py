"""Grids of images, and plots. Names are drawn as they are: no mathematics, one line, not too long."""

from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont, ImageOps

from .extras import optional

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONGEST = 80  # letters of a name


def image_grid(rows: dict[str, list[Image.Image]], columns: list[str] | None = None, size: int = 160) -> Image.Image:
    """One labelled row of images a name, the longer side of each `size` pixels; columns may have heads."""
    gap, head = 4, 20
    font = ImageFont.load_default(14)
    names = int(max(font.getlength(as_label(name)) for name in rows)) + 3 * gap
    width = max(len(images) for images in rows.values())
    page = Image.new("RGB", (names + width * (size + gap), head + len(rows) * (size + gap)), "white")
    draw = ImageDraw.Draw(page)
    for x, text in enumerate(columns or []):
        draw.text((names + x * (size + gap), gap / 2), as_label(text), "black", font)
    for y, (name, images) in enumerate(rows.items()):
        top = head + y * (size + gap)
        draw.text((gap, top + size / 2), as_label(name), "black", font, anchor="lm")
        for x, image in enumerate(images):
            resample = Image.Resampling.LANCZOS if image.width >= size else Image.Resampling.BICUBIC
            shown = [max(1, round(side * size / max(image.size))) for side in image.size]
            corner = (names + x * (size + gap) + (size - shown[0]) // 2, top + (size - shown[1]) // 2)
            page.paste(image.convert("RGB").resize((shown[0], shown[1]), resample), corner)
    return page


sheet = image_grid


def as_label(name: str) -> str:
    """A name in one line of letters that can be drawn, shortened if it is long."""
    line = " ".join(name.encode("utf-8", "replace").decode().split())
    return line if len(line) <= LONGEST else line[: LONGEST - 3] + "..."


def _plain(name: str) -> str:
    return as_label(name).replace("$", r"\$")  # what stands between two of them is mathematics to matplotlib


def mark(image: Image.Image, right: bool) -> Image.Image:
    """An image in a green frame, or in a red one with its corner cut."""
    colour, width = ("#1a9641", "#d7191c")[not right], max(3, image.width // 30)
    framed = ImageOps.expand(image.convert("RGB"), width, colour)
    if not right:
        corner = framed.width // 5
        ImageDraw.Draw(framed).polygon([(0, 0), (corner, 0), (0, corner)], colour)
    return framed


def empty_figure(inches: tuple[float, float]) -> "Figure":
    return optional("matplotlib.figure", "train").Figure(inches, layout="constrained")


def ratio_bars(ratios: dict[str, float], title: str) -> "Figure":
    """A bar for each model's ratio of inter- to intra-class distance (Seo 2025, Figure 4)."""
    figure = empty_figure((1.5 + 1.3 * len(ratios), 3.5))
    axes = figure.subplots()
    places = range(len(ratios))
    axes.bar_label(axes.bar(places, list(ratios.values()), width=0.6), fmt="%.2f")
    axes.set_xticks(places, list(map(_plain, ratios)))
    axes.set(title=_plain(title), ylabel="inter / intra")
    axes.margins(y=0.12)
    return figure


def learning_curve(history: list[dict]) -> "Figure":
    """Loss and accuracy by epoch, training beside validation, from records as train_backbone.py keeps them."""
    epochs = [record["epoch"] for record in history]
    figure = empty_figure((9, 3.5))
    losses, accuracies = figure.subplots(1, 2)
    for axes, title, curves in (
        (losses, "cross-entropy", {"train_loss": "training", "loss": "validation"}),
        (accuracies, "accuracy", {"train_top1": "training, top-1", "top1": "validation, top-1", "top5": "top-5"}),
    ):
        for name, label in curves.items():
            values = [float("nan") if record[name] is None else record[name] for record in history]
            axes.plot(epochs, values, ".-", label=label)
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    accuracies.set_ylim(0, 1)
    return figure
