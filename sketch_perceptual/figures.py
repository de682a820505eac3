"""Grids of images, and plots. Names are drawn literally (no mathematics), on one line, shortened if long."""

import contextlib
import functools
import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING, cast

from PIL import Image, ImageDraw, ImageFont, ImageOps

from .errors import printable
from .extras import optional
from .files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

logger = logging.getLogger(__name__)

SHEET_SIZE = 160  # pixels a picture in a grid
LONGEST = 80  # characters of a name
FONT_SIZE = 14
# Tried after Pillow's own, which has little more than ASCII; Pillow searches the system's font folders for them.
FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "NotoSansCJKjp-Regular.otf"),  # Linux
    *("NotoSansDevanagari-Regular.ttf", "wqy-microhei.ttc", "DroidSansFallbackFull.ttf"),
    *("Arial Unicode.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc"),  # macOS
    *("segoeui.ttf", "msyh.ttc", "YuGothM.ttc", "malgun.ttf", "Nirmala.ttc", "Nirmala.ttf"),  # Windows
)
NO_LETTER = "\U0010ffff"  # in no font


def image_grid(
    rows: dict[str, list[Image.Image]], columns: list[str] | None = None, size: int = SHEET_SIZE
) -> Image.Image:
    """Return a grid with one labelled row of images per name, with longer sides of `size` pixels.

    `columns` are optional headings.
    """
    gap, head = 4, 20
    labels = [fit_font(as_label(name)) for name in rows]
    names = int(max(font.getlength(text) for text, font in labels)) + 3 * gap
    width = max(len(images) for images in rows.values())
    page = Image.new("RGB", (names + width * (size + gap), head + len(rows) * (size + gap)), "white")
    pen = ImageDraw.Draw(page)
    for x, (text, font) in enumerate(map(fit_font, map(as_label, columns or []))):
        pen.text((names + x * (size + gap), gap / 2), shorten(text, font, size), "black", font)
    for y, ((text, font), images) in enumerate(zip(labels, rows.values(), strict=True)):
        top = head + y * (size + gap)
        pen.text((gap, top + size / 2), text, "black", font, anchor="lm")
        for x, image in enumerate(images):
            resample = Image.Resampling.LANCZOS if image.width >= size else Image.Resampling.BICUBIC
            shown = [max(1, round(side * size / max(image.size))) for side in image.size]
            corner = (names + x * (size + gap) + (size - shown[0]) // 2, top + (size - shown[1]) // 2)
            page.paste(image.convert("RGB").resize((shown[0], shown[1]), resample), corner)
    return page


def write_figure(path: str | Path, figure) -> None:
    """Write a matplotlib figure or a PIL image atomically; InputError."""
    write_whole(
        path, lambda partial: figure.savefig(partial, dpi=150) if hasattr(figure, "savefig") else figure.save(partial)
    )


def with_caption(image: Image.Image, name: str) -> Image.Image:
    """Add a name below an image; of a name that is too long only the end is shown."""
    text, font = fit_font(as_label(name))
    page = Image.new("RGB", (image.width, image.height + FONT_SIZE + 4), "white")
    page.paste(image, (0, 0))
    ImageDraw.Draw(page).text(
        (image.width / 2, image.height + 2), shorten(text, font, image.width), "black", font, anchor="ma"
    )
    return page


def shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Shorten a line to the end that fits in `width` pixels."""
    while font.getlength(text) > width and text.strip("."):
        text = "..." + text.lstrip(".")[1:]
    return text


def fit_font(text: str) -> tuple[str, ImageFont.FreeTypeFont]:
    """Return a line and the font with most of its letters; those that it lacks are escaped, as in \\u6905."""
    font = min(fonts(), key=lambda font: sum(is_missing(font, letter) for letter in text))
    if missing := {letter for letter in text if is_missing(font, letter)}:
        _warn_of_missing_letters()
    return "".join(ascii(letter)[1:-1] if letter in missing else letter for letter in text), font


@functools.cache
def fonts() -> list[ImageFont.FreeTypeFont]:
    """Return Pillow's own font, and those of FONTS and matplotlib's DejaVu Sans that are installed."""
    names = list(FONTS)
    if (spec := importlib.util.find_spec("matplotlib")) and spec.origin:
        names.insert(0, str(Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"))
    installed = []
    for name in names:
        with contextlib.suppress(OSError):  # not installed
            installed.append(ImageFont.truetype(name, FONT_SIZE))
    return [cast(ImageFont.FreeTypeFont, ImageFont.load_default(FONT_SIZE)), *installed]


@functools.cache
def is_missing(font: ImageFont.FreeTypeFont, letter: str) -> bool:
    """Return whether a font draws the box for missing letters."""
    mask, box = (font.getmask(text) for text in (letter, NO_LETTER))
    return not letter.isspace() and (mask.size, bytes(mask)) == (box.size, bytes(box))


@functools.cache
def _warn_of_missing_letters() -> None:
    """Log a warning, once per process."""
    logger.warning(
        "no installed font has all letters of the names in figures, missing ones are escaped: install Noto Sans CJK"
    )


def as_label(name: str) -> str:
    """Return a name on one line, with printable characters only, shortened if it is long."""
    line = " ".join(printable(name).encode("utf-8", "replace").decode().split())
    return line if len(line) <= LONGEST else line[: LONGEST - 3] + "..."


def _plain(name: str) -> str:
    """Return a name for matplotlib, with dollar signs escaped, which would start mathematics."""
    return fit_font(as_label(name))[0].replace("$", r"\$")


def _set_font(text: "Text", name: str) -> None:
    path = fit_font(as_label(name))[1].path
    if isinstance(path, str):  # Pillow's own has none, and matplotlib's has its letters
        properties = text.get_fontproperties().copy()
        properties.set_file(path)
        text.set_fontproperties(properties)


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
    """Plot a bar for each model's ratio of inter- to intra-class distance (Seo 2025, Figure 4)."""
    figure = empty_figure((1.5 + 1.3 * len(ratios), 3.5))
    axes = figure.subplots()
    positions = range(len(ratios))
    axes.bar_label(axes.bar(positions, list(ratios.values()), width=0.6), fmt="%.2f")
    axes.set_xticks(positions, list(map(_plain, ratios)))
    axes.set(title=_plain(title), ylabel="inter / intra")
    for text, name in zip(axes.get_xticklabels(), ratios, strict=True):
        _set_font(text, name)
    axes.margins(y=0.12)
    return figure


def learning_curve(history: list[dict]) -> "Figure":
    """Plot loss and accuracy by epoch, in training and validation, from the records of train_backbone.py."""
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
