"""Matching of file names across operating systems."""

import posixpath
import unicodedata
from collections.abc import Iterable

from ..errors import InputError, shown


def check_unicode(text: str, where: str) -> str:
    """Return `text`; InputError if it cannot be written as UTF-8: a name in another encoding, half an emoji."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        escaped = shown(text.encode("utf-8", "backslashreplace").decode())
        raise InputError(f"{where}: '{escaped}' is not valid Unicode; rename or rewrite it in UTF-8.") from error
    return text


def by_spelling(names: Iterable[str]) -> dict[str, list[str]]:
    """Group paths by normalised spelling: accents as one character or two (macOS), backslashes (Windows)."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(_spelling(name), []).append(name)
    return alike


def match_name(listed: str, names: dict[str, list[str]]) -> str | None:
    """Return `listed` if it is among `names` (from `by_spelling`), or else the only other spelling of it, or None."""
    alike = names.get(_spelling(listed), [])
    return listed if listed in alike else alike[0] if len(alike) == 1 else None


def hint(missing: str, names: Iterable[str]) -> str:
    """Suggest one of `names` for a path that is missing: ", there is a/B.png", or ""."""
    names = list(names)
    for simplify in (str.casefold, posixpath.basename, lambda path: posixpath.splitext(posixpath.basename(path))[0]):
        key = simplify(_spelling(missing))
        if near := next((name for name in names if simplify(_spelling(name)) == key), None):
            return f", there is {shown(near)}"
    return ""


def _spelling(path: str) -> str:
    return posixpath.normpath(unicodedata.normalize("NFC", path.replace("\\", "/")))
