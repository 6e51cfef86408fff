"""Prompt files that were once read with silent guesses."""

from __future__ import annotations

import pytest

from cad.errors import UserError
from evaluation.prompt_files import CELLS, Layout


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"prompt,prompt\na,b\n", "line 1: .*two columns of one name: prompt, prompt"),
        (b"prompt\na\nb\0c\n", "line 3: a NUL byte"),
    ],
)
def test_files_that_say_two_things_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(Layout(None, "error", "error").rows(data, "a file"))


@pytest.mark.parametrize("cell", ["seed", "guidance", "height"])
def test_numbers_are_written_in_ascii_digits(cell: str) -> None:
    assert CELLS[cell]("12") == 12
    with pytest.raises(ValueError, match="it is not a"):
        CELLS[cell]("١٢")
