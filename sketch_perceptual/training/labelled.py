"""Labelled drawings of a training: opened, read once, and split into training and held-out ones."""

from dataclasses import dataclass

from accelerate import Accelerator
from accelerate.logging import get_logger

from ..cli.arguments import Options
from ..data.datasets import LabelledImages
from ..data.options import load_labelled
from ..data.preview import See, in_epochs, read_data
from ..data.scan import Contents
from ..data.splits import Split, describe_split, split, split_hash
from .distributed import on_main
from .feature_cache import scan_folder
from .identity import describe_images
from .startup import dry_run

logger = get_logger(__name__, log_level="INFO")


@dataclass
class LabelledDrawings:
    """Drawings that can be read, with a key to the contents of each and which of them are copies.

    Args:
        record: the split as it is saved.
    """

    data: LabelledImages
    keys: list[str]
    copies: list[int]
    split: Split
    record: dict

    def identity(self) -> dict[str, str]:
        """Return what a resumed run must share: hashes of the drawings with their classes, and of the split."""
        data = describe_images(self.keys, (self.data.classes[label] for label in self.data.labels))
        return {"data": data, "split": split_hash(self.record)}


def open_drawings(args: Options, seed: int, **options) -> LabelledImages:
    """Open the drawings that the options name, without reading them; `options` are keywords of `LabelledImages`."""
    data = load_labelled(args, seed, **options)
    data.scan_folder = scan_folder(vars(args).get("feature_dir"))
    return data


def preview_drawings(args: Options, see: See = in_epochs, **options) -> bool:
    """Return True after a dry run, which only reports on the drawings; `see` as in `read_data`."""
    return dry_run(args, lambda seed: _read(args, open_drawings(args, seed, **options), see))


def read_drawings(
    args: Options, accelerator: Accelerator, data: LabelledImages, see: See = in_epochs
) -> LabelledDrawings:
    """Read each drawing once and split them. InputError lists what cannot be used."""
    (positions, keys, _, copies), result = on_main(accelerator, _read, args, data, see)
    logger.info(result.summary)
    record = describe_split(result, keys, args.validation_share, args.group_column)
    return LabelledDrawings(data.select(positions), keys, copies, result, record)


def _read(args: Options, data: LabelledImages, see: See) -> tuple[Contents, Split]:
    contents = read_data(data, args.on_bad_image, args.figure_data, copies=True, see=see)
    data = data.select(contents.positions)
    return contents, split(data.labels, contents.keys, contents.copies, data.groups, args.validation_share)
