"""Draw labelled sketches and their coloured counterparts, any number of them, without a download.

    python -m sketch_perceptual.drawings --output_dir drawings/sketches --per_class 16

Every class is a small scene whose proportions, parts and colours depend only on (seed, class, index).
It is laid out in hundredths of the picture's side: x from -50 to 50, y from 0 (top) to 100. Photo and
sketches of one index are rendered from the same scene, so they match pixel for pixel.
"""

from ..cli.arguments import Parser, at_least
from ..cli.console import print_result
from ..cli.entry import run
from ..errors import shown
from ..files import check_folder
from .folder import write_folder
from .render import STYLES


def parse_args(argv=None):
    parser = Parser(
        prog="python -m sketch_perceptual.drawings",
        description=__doc__,
    )
    add = parser.add_argument
    add("--output_dir", required=True, help="folder to write to; created if missing")
    add("--per_class", type=at_least(1), default=16, help="images per class and style")
    add("--size", type=at_least(16), default=256, help="side of an image in pixels")
    add("--seed", type=int, default=0, help="random seed")
    add("--styles", nargs="+", default=["pen"], help=f"{', '.join(STYLES)} or photo; default: pen")
    return parser.parse_args(argv)


def main(argv=None):
    run(write_drawings, parse_args(argv), "python -m sketch_perceptual.drawings")


def write_drawings(args):
    check_folder("output_dir", args.output_dir)
    count = write_folder(args.output_dir, args.per_class, args.seed, args.size, args.styles)
    print_result(f"{count} images written to {shown(args.output_dir)}")


if __name__ == "__main__":
    main()
