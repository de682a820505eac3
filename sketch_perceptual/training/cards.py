"""Model cards."""

import logging
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..errors import shown
from ..files import CARD as README
from ..files import MARK, card_path, write_text

logger = logging.getLogger(__name__)

TEMPLATE = """---
{metadata}
---
{mark}

# {title}

{description}

{pictures}

## Use

{install}

```python
{snippet}
```

## Training

| option | value |
|---|---|
{options}
"""
TRAINING = "\n## Training\n"
OWN_PACKAGE = "It needs the package of these scripts, sketch-perceptual: run `pip install .` in its folder."


def write_card(
    folder: str | Path,
    *,
    data: ModelCardData,
    title: str,
    description: str,
    snippet: str,
    options: dict,
    pictures=(),
    install: str = OWN_PACKAGE,
) -> None:
    """Write the model card of `folder`, with description, usage and training options, and validate its metadata.

    The card is README.md. If there is one that this program did not write, it is kept and the card is written beside
    it.
    """
    path = card_path(folder)
    if path.name != README:
        logger.warning(f"{path.with_name(README)} was not written by this program and is kept; the card is {path}")
    text = TEMPLATE.format(
        mark=MARK,
        metadata=data.to_yaml(),
        title=_one_line(title),
        description=description,
        install=install,
        snippet=snippet,
        pictures="\n".join(f"![{Path(p).stem}](./{p})" for p in pictures),
        options="\n".join(f"| {name} | {_one_line(value)} |" for name, value in options.items()),
    )
    ModelCard(text, ignore_metadata_errors=False).save(path)


def set_section(folder: str | Path, title: str, lines: list[list[str]], about: str) -> Path | None:
    """Insert a table, header first, into the card of `folder`, replacing a section of the same title.

    Returns the card's path, or None if there is no card with a training section. Warns if the only README.md was not
    written by this program.
    """
    path = card_path(folder)
    if not path.exists():
        if path.name != README:
            logger.warning(
                f"{path.with_name(README)} was not written by this program and is kept without {title.lower()}"
            )
        return None
    if TRAINING not in (text := path.read_text(encoding="utf-8")):
        return None
    start, _, rest = text.partition(TRAINING)
    start = start.partition(f"\n## {title}\n")[0]
    text = f"{start}\n## {title}\n\n{markdown_table(lines)}\n\n{about}\n{TRAINING}{rest}"
    write_text(path, text)
    return path


def markdown_table(lines: list[list[str]]) -> str:
    """Format lines of cells, the header first, as a Markdown table."""
    head, *rows = lines
    return "\n".join(f"| {' | '.join(map(_one_line, line))} |" for line in (head, ["---"] * len(head), *rows))


def listing(folder: str | Path, files: dict[str, str]) -> str:
    """List the files written to `folder` and their uses, one per line."""
    width = max(map(len, files))
    return "\n".join([str(folder), *(f"  {name:<{width}}  {use}" for name, use in files.items())])


def model_name(model_id: str | None, output_dir: str | Path) -> str:
    """Return the model's name: its Hub id or, without one, the name of its folder."""
    return model_id or Path(output_dir).resolve().name


def hub_id(name: str | None) -> str | None:
    """Return `name` if it is a Hub id, which a card may name; None if it is a local path."""
    return name if name and not Path(name).exists() else None


def _one_line(value) -> str:
    value = " ".join(map(str, value)) if isinstance(value, list) else value
    return shown(" ".join(str(value).split())).replace("|", "\\|")
