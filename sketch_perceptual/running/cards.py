"""Cards of what was trained."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

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


def model_name(model_id: str | None, output_dir: str | Path) -> str:
    """What the model is called: its id on the Hub, or else the name of its folder."""
    return model_id or Path(output_dir).resolve().name


def hub_id(name: str | None) -> str | None:
    """A model or data set as a card may name it: its id on the Hub, never a folder of this machine."""
    return name if name and not Path(name).exists() else None


def _one_line(value) -> str:
    value = " ".join(map(str, value)) if isinstance(value, list) else value
    return " ".join(str(value).split()).replace("|", "\\|")
