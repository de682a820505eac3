"""The description, whose links need the repository's address elsewhere: REPOSITORY of the environment."""

import os
import re
from pathlib import Path

from setuptools import setup


def with_addresses(text: str, repository: str) -> str:
    """Markdown whose links and pictures in the repository are those of its main branch."""
    views = {"!": "raw", "": "blob"}
    return re.sub(
        r"(!?)(\[[^]]*]\()(?!https?:|#)([^)]+\))",
        lambda found: f"{found[1]}{found[2]}{repository}/{views[found[1]]}/main/{found[3]}",
        text,
    )


readme, repository = Path("README.md").read_text(encoding="utf-8"), os.environ.get("REPOSITORY", "").rstrip("/")
setup(
    long_description=with_addresses(readme, repository) if repository else readme,
    long_description_content_type="text/markdown",
    url=repository or None,
)
