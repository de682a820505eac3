"""Names of files as different systems write them."""

import posixpath
import unicodedata
from collections.abc import Iterable

from ..errors import InputError, shown


def check_unicode(text: str, where: str) -> str:
    """`text`, or InputError if it cannot be written as UTF-8: a name in another encoding, half an emoji."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        escaped = shown(text.encode("utf-8", "backslashreplace").decode())
        raise InputError(f"{where}: '{escaped}' is not valid Unicode; rename or rewrite it in UTF-8.") from error
    return text


def by_spelling(names: Iterable[str]) -> dict[str, list[str]]:
    """Paths by what they are on other systems: accents in one character or two (macOS), back-slashes (Windows)."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(_spelling(name), []).append(name)
    return alike


def match_name(listed: str, names: dict[str, list[str]]) -> str | None:
    """The one of `by_spelling` that is `listed`, or alone is another spelling of it."""
    alike = names.get(_spelling(listed), [])
    return listed if listed in alike else alike[0] if len(alike) == 1 else None


def hint(missing: str, names: Iterable[str]) -> str:
    """What may be meant by a path that is none of `names`: ", there is a/B.png" or ""."""
    names = list(names)
    for part in (str.casefold, posixpath.basename, lambda path: posixpath.splitext(posixpath.basename(path))[0]):
        key = part(_spelling(missing))
        if near := next((name for name in names if part(_spelling(name)) == key), None):
            return f", there is {shown(near)}"
    return ""


def _spelling(path: str) -> str:
    return posixpath.normpath(unicodedata.normalize("NFC", path.replace("\\", "/")))
