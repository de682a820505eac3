"""Cards and uploads."""

import argparse
from pathlib import Path

from accelerate import Accelerator
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from ..errors import InputError

CARD = """---
{metadata}
---

# {title}

{description}

{pictures}

## Use

```python
{snippet}
```

## Training

| option | value |
|---|---|
{options}
"""


def write_card(
    folder: str | Path, *, data: ModelCardData, title: str, description: str, snippet: str, options: dict, pictures=()
) -> None:
    """Write `folder/README.md`: what it is, how to use it, and the options that made it; checks its metadata."""
    text = CARD.format(
        metadata=data.to_yaml(),
        title=title,
        description=description,
        snippet=snippet,
        pictures="\n".join(f"![{Path(p).stem}](./{p})" for p in pictures),
        options="\n".join(f"| {name} | {_one_line(value)} |" for name, value in options.items()),
    )
    ModelCard(text, ignore_metadata_errors=False).save(Path(folder, "README.md"))


def model_name(model_id: str | None, output_dir: str | Path) -> str:
    """What the model is called: its id on the Hub, or else the name of its folder."""
    return model_id or Path(output_dir).resolve().name


def dataset_id(name: str | None) -> str | None:
    """The data set as a card may name it: its id on the Hub, never a folder of this machine."""
    return name if name and not Path(name).exists() else None


def create_repo(args: argparse.Namespace, accelerator: Accelerator) -> str | None:
    """With `push_to_hub`, create the repository, or find it, before training; its full id on the main process."""
    if not (args.push_to_hub and accelerator.is_main_process):
        return None
    repo_id, token = model_name(args.hub_model_id, args.output_dir), args.hub_token
    try:
        return HfApi(token=token).create_repo(repo_id, exist_ok=True).repo_id
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise InputError(
            f"`push_to_hub` cannot reach {repo_id} ({_one_line(error)}); log in with `hf auth login` or train without"
        ) from error


def push(folder: str | Path, repo_id: str, files: list[str], token: str | None) -> None:
    """Upload `files`, names or patterns inside `folder`, and nothing else. What fails keeps the local files."""
    try:
        HfApi(token=token).upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=files, commit_message="End of training"
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        include = " ".join(f"--include {name!r}" for name in files)
        raise InputError(
            f"the upload to {repo_id} failed ({_one_line(error)}); all is in {folder}. To try again:"
            f" hf upload {repo_id} {folder} . {include}"
        ) from error


def _one_line(value) -> str:
    value = " ".join(map(str, value)) if isinstance(value, list) else value
    return " ".join(str(value).split()).replace("|", "\\|")
