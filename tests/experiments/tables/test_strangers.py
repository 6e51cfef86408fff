"""A method, metric, concept and table that lie outside the repository, found by --config-dir."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from weights import write_weights

from experiments.run.configuration import REPOSITORY
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


def ask(stranger: Path, *command: str) -> str:
    """The output of a program of the suite, called from the stranger's folder."""
    paths = [f"paths.miniature={stranger}/weights", f"paths.results={stranger}/results"]
    environment = {"PYTHONPATH": f"{REPOSITORY}:{stranger}", "COLUMNS": "150"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, *command, *paths, "--config-dir", str(stranger / "conf")],
        cwd=stranger,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


RUN = (str(REPOSITORY / "run.py"), "model=mini", "debug=tiny", "logger=none", "limit=4")


def test_a_run_has_a_strangers_method_and_metric(stranger: Path) -> None:
    shown = ask(stranger, *RUN, "edit=mine", "evaluator=[brightness]")
    assert "brightness on parachute, grey levels" in shown


def test_a_table_of_ones_own_is_made_and_known(stranger: Path) -> None:
    ask(stranger, *RUN, "table=light")
    frame = pd.read_csv(stranger / "results" / "reproduction" / "light-mini.csv")
    assert list(frame["edit"]) == ["none", "mine"]
    assert frame["value"].notna().all()
    assert frame["paper"].isna().all()
    overrides = 'overrides=["debug=tiny","limit=4"]'
    shown = ask(stranger, "-m", "experiments.tables.status", "model=mini", overrides)
    (line,) = (line for line in shown.splitlines() if "My table" in line)
    assert line.split("│")[3].strip() == "2"  # done


def test_a_strangers_method_stands_in_table_1_and_in_the_report(stranger: Path) -> None:
    fast = ("table=table01", "making.fast=true", "making.methods=+mine")
    ask(stranger, *RUN, *fast, 'making.filter="concept=church edit=mine"')
    folder = stranger / "results" / "reproduction"
    frame = pd.read_csv(folder / "table01-mini-fast.csv").set_index(["concept", "edit"])
    assert frame.loc[("church", "mine"), "value"].notna().all()
    page = write_report(folder, "mini").read_text()
    assert "<th" in page
    assert ">mine</th>" in page
    assert "Table 1 (1 of 18 runs)" in page
