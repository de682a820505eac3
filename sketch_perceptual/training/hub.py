"""Uploads to the Hugging Face Hub."""

import argparse
import glob
import json
import shlex
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from huggingface_hub import HfApi

from ..errors import HUB_ERRORS, InputError, hub_reason
from ..files import CARD, card_path
from .cards import model_name
from .run import Run

logger = get_logger(__name__, log_level="INFO")


def create_repo(args: argparse.Namespace, run: Run) -> None:
    """Set the run's `hub_model_id`; with `push_to_hub`, create the repository and add the owner to the id."""
    run.hub_model_id = args.hub_model_id
    if not (args.push_to_hub and run.accelerator.is_main_process):
        return
    repo_id, api = model_name(args.hub_model_id, args.output_dir), HfApi(token=args.hub_token)
    try:
        repo_id = api.create_repo(repo_id, private=args.hub_private_repo or None, exist_ok=True).repo_id
        is_public = args.hub_private_repo and not api.model_info(repo_id).private
    except HUB_ERRORS as error:
        raise InputError(
            f"`push_to_hub` cannot create {repo_id}: {hub_reason(error)}. Or train without it and upload later"
        ) from error
    if is_public:
        raise InputError(
            f"`hub_private_repo`: {repo_id} exists and is public; make it private in its settings, or choose another"
            " `hub_model_id`"
        )
    run.hub_model_id = repo_id


def push(
    args: argparse.Namespace, run: Run, folder: str | Path, made: list[str], at_times: tuple[str, ...] = ()
) -> None:
    """With `push_to_hub`, upload only the files `made` in `folder`. If that fails, the local files stay.

    `at_times` names files that only some runs of the script make: those of an earlier run are deleted on the Hub.
    """
    if not (args.push_to_hub and run.accelerator.is_main_process):
        return
    card = card_path(folder)
    made = [card.name if name == CARD and card.exists() else name for name in made]
    assert run.hub_model_id is not None, "create_repo comes first"
    upload: dict[str, Any] = {"repo_id": run.hub_model_id, "folder_path": str(folder)}
    upload["allow_patterns"] = list(map(glob.escape, made))
    if at_times:
        upload["delete_patterns"] = list(map(glob.escape, at_times))
    try:
        url = HfApi(token=args.hub_token).upload_folder(**upload, commit_message="End of training").commit_url
    except HUB_ERRORS as error:
        keywords = ", ".join(f"{name}={json.dumps(value)}" for name, value in upload.items())
        command = f"from huggingface_hub import upload_folder; upload_folder({keywords})"
        raise InputError(
            f"the upload to {run.hub_model_id} failed: {hub_reason(error)}. All files are in {folder}. To upload"
            f" them: python -c {shlex.quote(command)}"
        ) from error
    logger.info(f"uploaded: {url}")
