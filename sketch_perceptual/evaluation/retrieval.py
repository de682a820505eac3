"""Retrieval of drawings of a query's class from a gallery (Seo 2025, section 4.2, Table 3)."""

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from PIL import Image
from torch import Tensor

from ..data.class_names import class_names
from ..data.datasets import LabelledImages
from ..data.preview import pad
from ..data.splits import split, split_hash
from ..errors import InputError, first_line, from_hub
from ..figures import image_grid, mark
from ..measures.ranking import rank
from ..networks.backbone import is_vgg16_weights
from ..networks.embedder import SketchEmbedder
from ..networks.hub_model import read_config
from ..seeds import generator
from ..training.distributed import on_main
from .embedding import Drawings, Extract, embed_cached, embed_models, saved_background
from .tables import SHEET_ROWS, Report

logger = get_logger(__name__, log_level="INFO")

COLUMNS = {"embedding": "", "top1": ".1%", "top5": ".1%", "map": ".3f", "recall@10": ".1%", "recall@50": ".1%"}


@dataclass(frozen=True)
class Sides:
    """Positions of the queries, of the gallery, and of drawings in neither."""

    queries: list[int]
    gallery: list[int]
    left_out: list[int]
    summary: str = field(compare=False)


def rank_models(
    accelerator: Accelerator,
    data: LabelledImages,
    models: list[tuple[str, str]],
    extract: Extract,
    *,
    on_bad_image: str = "error",
    held_out: float = 0.1,
    seed: int = 0,
    **options,
) -> Report | None:
    """Return top-1, top-5, mean average precision and recall of each model; None off the main process.

    Queries are the drawings held out in training, as recorded in a model's split. If no model has one, a new `split`
    holds out the fraction `held_out`.

    Args:
        models: name and source of each.
        seed: selects the queries in the figure.
        options: keyword arguments of `load_embedder`; None is the model's own value.
    """
    background = options.get("background") or saved_background(models[0][1])
    drawings = Drawings(accelerator, data, on_bad_image, background)
    sides = saved_sides(accelerator, models, drawings) or new_sides(drawings, held_out)
    logger.info(sides.summary)
    about: dict[str, Any] = {"queries": len(sides.queries), "gallery": len(sides.gallery)}
    about |= {"classes": len(set(drawings.data.labels)), "left_out": len(sides.left_out)}
    about["split"] = split_hash({"validation": sorted(drawings.keys[index] for index in sides.queries)})
    drawings.keep(sides.queries + sides.gallery)
    count = len(sides.queries)
    labels, copies, runs, nearest = drawings.data.labels, drawings.copies, [], {}
    for model, embedder, cache, keys in embed_models(accelerator, models, drawings, extract, options):
        vectors = embed_cached(embedder, cache, keys, accelerator.device)
        ranking = rank(
            vectors[:count], vectors[count:], labels[:count], labels[count:], copies[:count], copies[count:]
        )
        runs.append(model | ranking.scores)
        nearest.setdefault(model["name"], ranking.nearest)
    if not runs:
        return None
    if unmatched := runs[0]["unmatched"]:
        logger.info(f"queries left out, since the gallery has no drawing of their class: {unmatched}")
    queries, gallery = (drawings.data.select(range(*bounds)) for bounds in ((count,), (count, len(labels))))
    return Report(runs, COLUMNS, about, functools.partial(query_sheet, queries, gallery, nearest, seed))


def new_sides(drawings: Drawings, held_out: float) -> Sides:
    parts = split(drawings.data.labels, drawings.keys, drawings.copies, drawings.data.groups, held_out)
    return Sides(parts.validation, parts.train, parts.left_out, parts.summary)


def saved_sides(accelerator: Accelerator, models: list[tuple[str, str]], drawings: Drawings) -> Sides | None:
    """Return the split recorded with `models`, None without one; InputError if they differ or the data lack it."""
    first = None
    for _, source in models:
        if (record := on_main(accelerator, read_split, source)) is None:
            continue
        sides = match_split(record, drawings.on(saved_background(source))[1], source)
        if first is not None and sides != first[1]:
            raise InputError(
                f"{first[0]} and {source} were trained on different drawings, so that each would be scored on some of"
                " its training data: evaluate one at a time"
            )
        first = first or (source, sides)
    return first and first[1]


def read_split(source: str) -> dict[str, set[str]] | None:
    """Return the content keys that a model of `train_retrieval.py` held out; None for other networks. InputError."""
    if is_vgg16_weights(source) or "backbone" not in read_config(source, SketchEmbedder)[1]:
        return None
    path = Path(source, "split.json")
    if not Path(source).is_dir():
        with from_hub(f"the split of {source} cannot be read"):
            try:
                path = Path(hf_hub_download(source, path.name))
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:  # an embedder from elsewhere
                return None
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {name: set(map(str, record[name])) for name in ("validation", "left_out")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is not a split of train_retrieval.py ({first_line(error)})") from error


def match_split(record: dict[str, set[str]], keys: list[str], source: str) -> Sides:
    """Return the recorded sides of the drawings with these keys; InputError if recorded drawings are not there."""
    held_out, left_out = record["validation"], record["left_out"] - record["validation"]
    if lost := (held_out | left_out) - set(keys):
        raise InputError(
            f"{len(lost)} of the {len(held_out)} drawings that the training of {source} held out are not in this data,"
            " which may therefore contain drawings it was trained on: pass the data of its training"
        )
    queries, apart = ([index for index, key in enumerate(keys) if key in side] for side in (held_out, left_out))
    gallery = sorted(set(range(len(keys))) - set(queries) - set(apart))
    summary = f"the split of {source}: {len(queries)} queries, {len(gallery)} drawings in the gallery"
    return Sides(queries, gallery, apart, summary)


def query_sheet(
    queries: LabelledImages, gallery: LabelledImages, nearest: dict[str, Tensor], seed: int
) -> Image.Image:
    """Return a grid of queries of different classes, a row per model, the five nearest framed green if right."""
    rows, names = {}, class_names(queries.classes)
    for index in _choose_queries(queries, gallery, max(1, SHEET_ROWS // len(nearest)), seed):
        label = queries.labels[index]
        for name, order in nearest.items():
            row = [pad(queries.image(index), queries.background)]
            for position in filter(lambda position: position >= 0, order[index].tolist()):
                picture = pad(gallery.image(position), gallery.background)
                row.append(mark(picture, gallery.labels[position] == label))
            rows[names[label] if len(nearest) == 1 else f"{names[label]}: {name}"] = row
    return image_grid(rows, ["query", *"12345"])


def _choose_queries(queries: LabelledImages, gallery: LabelledImages, count: int, seed: int) -> list[int]:
    """Return positions of queries, each of a different class that the gallery has."""
    chosen, labels, findable = {}, queries.labels, set(gallery.labels)
    for index in torch.randperm(len(labels), generator=generator(seed, "sheet")).tolist():
        if labels[index] in findable and len(chosen) < count:
            chosen.setdefault(labels[index], index)
    return list(chosen.values())
