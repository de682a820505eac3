"""Cards of what was trained."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from .files import replacing

CARD = """---
{metadata}
---

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
OWN_PACKAGE = "It needs the package of these scripts, sketch-perceptual: `pip install .` in its folder."


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
    """Write `folder/README.md`: what it is, how to use it, and the options that made it; checks its metadata."""
    text = CARD.format(
        metadata=data.to_yaml(),
        title=title,
        description=description,
        install=install,
        snippet=snippet,
        pictures="\n".join(f"![{Path(p).stem}](./{p})" for p in pictures),
        options="\n".join(f"| {name} | {_one_line(value)} |" for name, value in options.items()),
    )
    ModelCard(text, ignore_metadata_errors=False).save(Path(folder, "README.md"))


def set_section(folder: str | Path, title: str, lines: list[list[str]], about: str) -> bool:
    """Put a table, its head first, into the card of `folder`, in place of one of this title; False: there is none."""
    path = Path(folder, "README.md")
    if not path.is_file() or TRAINING not in (text := path.read_text(encoding="utf-8")):
        return False
    start, _, rest = text.partition(TRAINING)
    start = start.partition(f"\n## {title}\n")[0]
    text = f"{start}\n## {title}\n\n{markdown_table(lines)}\n\n{about}\n{TRAINING}{rest}"
    with replacing(folder) as aside:
        (aside / path.name).write_text(text, encoding="utf-8")
    return True


def markdown_table(lines: list[list[str]]) -> str:
    """Cells by line, the head first."""
    head, *rows = lines
    return "\n".join(f"| {' | '.join(map(_one_line, line))} |" for line in (head, ["---"] * len(head), *rows))


def model_name(model_id: str | None, output_dir: str | Path) -> str:
    """What the model is called: its id on the Hub, or else the name of its folder."""
    return model_id or Path(output_dir).resolve().name


def hub_id(name: str | None) -> str | None:
    """A model or data set as a card may name it: its id on the Hub, never a folder of this machine."""
    return name if name and not Path(name).exists() else None


def _one_line(value) -> str:
    value = " ".join(map(str, value)) if isinstance(value, list) else value
    return " ".join(str(value).split()).replace("|", "\\|")
