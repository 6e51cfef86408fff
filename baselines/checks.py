"""Checks of the methods' settings; `key` is how the configuration calls one, "edit.iterations"."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from cad.errors import UserError


def check_count(key: str, value: object, least: int) -> None:
    """UserError unless it is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{key}={value!r} is not allowed: it is a whole number, at least {least}.")


def checked_number(
    key: str,
    value: object,
    allowed: Callable[[float], bool] = math.isfinite,
    rule: str = "it is a finite number",
) -> float:
    """The value as a float, so that 2 and 2.0 are one setting. UserError if it is not allowed."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        number = float(value)
        if allowed(number):
            return number
    raise UserError(f"{key}={value!r} is not allowed: {rule}.")


def checked_positive(key: str, value: object, *, zero: bool = False) -> float:
    """The value as a float, if it is finite and above 0, or 0 if `zero`. UserError otherwise."""
    if zero:
        return checked_number(key, value, lambda x: x >= 0, "it is a finite number of at least 0")
    return checked_number(key, value, lambda x: x > 0, "it is a finite number above 0")


def checked_text(key: str, value: object) -> str:
    """The value, if it is a text. UserError otherwise."""
    if not isinstance(value, str):
        raise UserError(f"{key}={value!r} is not allowed: it must be a text, such as ' '.")
    return value


def checked_texts(key: str, value: object) -> list[str]:
    """A list of texts as a plain list. UserError for anything else, a single text among it."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise UserError(f"{key}={value!r} is not allowed: it must be a list of texts, or [].")
    return [checked_text(f"{key}[{i}]", each) for i, each in enumerate(value)]
