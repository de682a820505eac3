"""Validation of a network's settings, from keywords or from an untrusted config.json."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import InputError

Rule = tuple[Callable[[Any], bool], str]  # a check of the value, and a description of valid values
Rules = Mapping[str, "Rule | Rules"]  # nested rules: a setting that holds settings

FLAG: Rule = (lambda value: isinstance(value, bool), "true or false")
TEXT: Rule = (lambda value: isinstance(value, str), "a string")
TEXTS: Rule = (lambda value: isinstance(value, list | tuple) and all(map(TEXT[0], value)), "a list of strings")


def integer(low: int) -> Rule:
    description = "a positive integer" if low == 1 else f"an integer of at least {low}"
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= low, description


def one_of(*choices: str) -> Rule:
    return lambda value: value in choices, f"one of {', '.join(choices)}"


def optional(rule: Rule) -> Rule:
    return lambda value: value is None or rule[0](value), rule[1]


def is_positive(value: Any) -> bool:
    """Return whether `value` is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def check_settings(rules: Rules, values: Mapping[str, Any]) -> None:
    """InputError for a keyword that breaks its rule."""
    for name, value in values.items():
        rule = rules[name]
        if isinstance(rule, tuple) and not rule[0](value):
            raise InputError(f"`{name}` must be {rule[1]}, got {repr(value)[:80]}")


def check_json(rules: Rules, values: Any, where: str) -> None:
    """InputError for settings from a JSON file, nested ones included, that are unknown or break their rules."""
    if not isinstance(values, dict):
        raise InputError(f"{where} must hold an object, got {_shown(values)}")
    for name, value in values.items():
        rule = rules.get(name)
        if rule is None:
            raise InputError(f"{where}: there is no setting {name[:80]!r}, only {', '.join(rules)}")
        if isinstance(rule, Mapping):
            check_json(rule, value, f"{where}: {name}")
        elif not rule[0](value):
            raise InputError(f"{where}: {name} must be {rule[1]}, got {_shown(value)}")
    if missing := [name for name, rule in rules.items() if isinstance(rule, Mapping) and name not in values]:
        raise InputError(f"{where}: there is no {missing[0]}")


def _shown(value: Any) -> str:
    return json.dumps(value)[:80]
