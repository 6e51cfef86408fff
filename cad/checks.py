"""Rules for settings: each takes a configuration key and a value, and returns the value to keep.

A rule raises UserError, naming key and value, for what is not allowed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from cad.errors import UserError

Rule = Callable[[str, Any], Any]


def check(settings: Any, place: str, **rules: Rule) -> None:
    """Puts every named field of a dataclass through its rule; `place` begins their keys."""
    for name, rule in rules.items():
        object.__setattr__(settings, name, rule(f"{place}.{name}", getattr(settings, name)))


def only(allowed: Callable[[Any], Any], description: str) -> Rule:
    """Values that are `allowed`, as they are."""

    def rule(key: str, value: Any) -> Any:
        if allowed(value):
            return value
        raise UserError(f"{key}={value!r} is not allowed: it is {description}.")

    return rule


def whole(least: int, most: int = 10**6) -> Rule:
    """Whole numbers of at least `least`, and at most `most`: nobody waits for a million of it."""
    words = f"a whole number, at least {least}, at most {most}"
    return only(lambda x: type(x) is int and least <= x <= most, words)


def number(allowed: Callable[[float], bool], description: str) -> Rule:
    """Finite numbers that are `allowed`, kept as floats, so that 2 and 2.0 are one setting."""
    rule = only(lambda x: type(x) in (int, float) and math.isfinite(x) and allowed(x), description)
    return lambda key, value: float(rule(key, value))


steps = whole(1, 1000)  # denoising steps: the models were trained on so many
seed = whole(0, 2**63 - 1)  # of random generators
flag = only(lambda x: isinstance(x, bool), "true or false")
text = only(lambda x: isinstance(x, str), "a text, such as ' '")


finite = number(lambda x: True, "a finite number")
positive = number(lambda x: x > 0, "a finite number above 0")
not_negative = number(lambda x: x >= 0, "a finite number of at least 0")
share = number(lambda x: 0 <= x <= 1, "a number in [0, 1]")
ratio = number(lambda x: 0 < x <= 1, "a ratio, in (0, 1]")
folder_name = only(
    lambda x: isinstance(x, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{,199}", x),
    "part of a folder's name, so it has letters, digits, '.', '_', '+' and '-' alone, at most 200",
)


def one_of(choices: Collection[str]) -> Rule:
    """One of the names."""

    def rule(key: str, value: Any) -> str:
        if isinstance(value, str) and value in choices:
            return value
        raise UserError(f"{key}={value!r} is unknown; allowed: {', '.join(choices)}.")

    return rule


def optional(rule: Rule) -> Rule:
    """None, or what the rule allows."""
    return lambda key, value: None if value is None else rule(key, value)


def texts(key: str, value: Any) -> tuple[str, ...]:
    """A list of texts; a single text is none."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise UserError(f"{key}={value!r} is not allowed: it is a list of texts, or [].")
    return tuple(text(f"{key}[{i}]", each) for i, each in enumerate(value))
