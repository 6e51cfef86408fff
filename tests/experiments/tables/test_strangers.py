"""A method, metric, concept and table that lie outside the repository, found by --config-dir."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import programs
import pytest
from weights import write_weights

from cad.places import REPOSITORY
from experiments.tables.report import write_report

PAGE = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of docs/extending.md, weights laid out as the miniature's."""
    folder = tmp_path_factory.mktemp("stranger")
    write_weights(folder / "weights")
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


@pytest.fixture
def ask(stranger: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The output of a program of the suite, called from the stranger's folder."""
    monkeypatch.chdir(stranger)
    monkeypatch.syspath_prepend(stranger)
    paths = [f"paths.miniature={stranger}/weights", f"paths.results={stranger}/results"]

    def ask(*command: str) -> str:
        ended = programs.call(*command, *paths, "--config-dir", str(stranger / "conf"))
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    return ask


STATUS = REPOSITORY / "experiments" / "tables" / "status.py"
RUN = (REPOSITORY / "run.py", "model=mini", "debug=tiny", "logger=none", "limit=4")


def test_a_run_has_a_strangers_method_and_metric(ask: Callable[..., str]) -> None:
    shown = ask(*RUN, "edit=mine", "evaluator=[brightness]")
    assert "brightness on parachute, grey levels" in shown


def test_a_table_of_ones_own_is_made_and_known(ask: Callable[..., str], stranger: Path) -> None:
    ask(*RUN, "table=light")
    frame = pd.read_csv(stranger / "results" / "reproduction" / "light-mini.csv")
    assert list(frame["edit"]) == ["none", "mine"]
    assert frame["value"].notna().all()
    assert frame["paper"].isna().all()
    overrides = 'overrides=["debug=tiny","limit=4"]'
    shown = ask(STATUS, "model=mini", overrides)
    (line,) = (line for line in shown.splitlines() if "My table" in line)
    assert line.split("│")[3].strip() == "2"  # done


def test_a_strangers_method_stands_in_table_1_and_in_the_report(
    ask: Callable[..., str], stranger: Path
) -> None:
    fast = ("table=table01", "making.fast=true", "making.methods=+mine")
    ask(*RUN, *fast, 'making.filter="concept=church edit=mine"')
    folder = stranger / "results" / "reproduction"
    frame = pd.read_csv(folder / "table01-mini-fast.csv").set_index(["concept", "edit"])
    assert frame.loc[("church", "mine"), "value"].notna().all()
    page = write_report(folder, "mini", stranger / "results" / "runs").read_text()
    assert "<th" in page
    assert ">Mine</th>" in page
    assert "Table 1 (1 of 18 runs)" in page
