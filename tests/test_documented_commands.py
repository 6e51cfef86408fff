"""Every `python run.py` of the documentation composes, and heeds all that it is told."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from cad.places import REPOSITORY
from experiments.run.configuration import check, check_overrides, compose

COMMAND = re.compile(r"python run\.py ((?:(?!  |`|\||\\).)+)")
OTHERWISE = ("-m", "--", "table=", "figure=", "PATH")  # no single run, or not to be taken as it is


def commands() -> list[str]:
    pages = [REPOSITORY / "README.md", REPOSITORY / "DEVIATIONS.md"]
    pages += sorted(Path(REPOSITORY, "docs").glob("*.md"))
    found = {each.strip() for page in pages for each in COMMAND.findall(page.read_text())}
    return sorted(each for each in found if not any(sign in each for sign in OTHERWISE))


@pytest.mark.parametrize("command", commands())
def test_a_documented_command_is_not_refused(command: str) -> None:
    overrides = shlex.split(command)
    cfg = compose(overrides)
    check(cfg)
    check_overrides(cfg, overrides)
