"""Sheets of pictures, and plots."""

from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps


def sheet(rows: dict[str, list[Image.Image]], columns: list[str] | None = None, size: int = 160) -> Image.Image:
    """A labelled grid: one row of pictures a name, each drawn `size` pixels wide and high; columns may have heads."""
    gap, head = 4, 20
    font = ImageFont.load_default(14)
    names = int(max(font.getlength(name) for name in rows)) + 3 * gap
    width = max(len(pictures) for pictures in rows.values())
    page = Image.new("RGB", (names + width * (size + gap), head + len(rows) * (size + gap)), "white")
    draw = ImageDraw.Draw(page)
    for x, text in enumerate(columns or []):
        draw.text((names + x * (size + gap), gap / 2), text, "black", font)
    for y, (name, pictures) in enumerate(rows.items()):
        top = head + y * (size + gap)
        draw.text((gap, top + size / 2), name, "black", font, anchor="lm")
        for x, picture in enumerate(pictures):
            resample = Image.Resampling.LANCZOS if picture.width >= size else Image.Resampling.BICUBIC
            page.paste(picture.convert("RGB").resize((size, size), resample), (names + x * (size + gap), top))
    return page


def mark(picture: Image.Image, right: bool) -> Image.Image:
    """A picture in a green frame, or in a red one with its corner cut."""
    colour, width = ("#1a9641", "#d7191c")[not right], max(3, picture.width // 30)
    framed = ImageOps.expand(picture.convert("RGB"), width, colour)
    if not right:
        corner = framed.width // 5
        ImageDraw.Draw(framed).polygon([(0, 0), (corner, 0), (0, corner)], colour)
    return framed


def ratio_bars(ratios: dict[str, float], title: str) -> Figure:
    """A bar for each model's ratio of inter- to intra-class distance (Seo 2025, Figure 4)."""
    figure = Figure((1.5 + 1.3 * len(ratios), 3.5), layout="constrained")
    axes = figure.subplots()
    axes.bar_label(axes.bar(list(ratios), list(ratios.values()), width=0.6), fmt="%.2f")
    axes.set(title=title, ylabel="inter / intra")
    axes.margins(y=0.12)
    return figure


def learning_curve(history: list[dict]) -> Figure:
    """Loss and accuracy by epoch, training beside validation, from records as train_backbone.py keeps them."""
    epochs = [record["epoch"] for record in history]
    figure = Figure((9, 3.5), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    for axes, title, curves in (
        (losses, "cross-entropy", {"train_loss": "training", "loss": "validation"}),
        (accuracies, "accuracy", {"train_top1": "training, top-1", "top1": "validation, top-1", "top5": "top-5"}),
    ):
        for name, label in curves.items():
            axes.plot(epochs, [record[name] for record in history], ".-", label=label)
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    accuracies.set_ylim(0, 1)
    return figure
