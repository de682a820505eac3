"""The site: README.md is its first page, and links between files are the same as in the repository."""

from pathlib import Path

import sketch_perceptual

project = "sketch-perceptual"
author = copyright = "The sketch-perceptual maintainers"
release = sketch_perceptual.__version__
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "benchmarks/*.md", "research/*.md", "sketch_perceptual/assets/*/README.md"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3  # of links to #sections, as code hosts make them
default_role = "code"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # no paths of this machine
autodoc_typehints = "description"
html_theme = "furo"
html_title = "sketch-perceptual"
html_static_path = ["static"]
html_css_files = ["wrap.css"]

CONTENTS = """
```{toctree}
:hidden:

docs/use-the-loss
docs/train-a-lora
docs/draw-in-four-steps
docs/tune-a-backbone
docs/find-drawings
docs/photos-to-sketches
docs/reproduce-the-paper
docs/what-survives-what
docs/api
benchmarks/README
research/distances
research/backbone
research/retrieval
research/style
research/term
research/strokes
research/stable-diffusion
research/speed
research/compatibility
sketch_perceptual/assets/attention-vgg16/README
sketch_perceptual/assets/tiny-sd/README
CONTRIBUTING
CHANGELOG
```
"""


def add_contents(app, name, source):
    """To the README, which shows none in the repository."""
    if name == root_doc:
        source[0] += CONTENTS


def start_at_readme(app, error):
    text = f'<meta http-equiv="refresh" content="0; url={root_doc}.html">'
    Path(app.outdir, "index.html").write_text(text, encoding="utf-8")


def setup(app):
    app.connect("source-read", add_contents)
    app.connect("build-finished", start_at_readme)
