"""A table made end to end: the miniature's classes with random weights, debug=tiny."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from tables_fixture import compose_tables
from weights import write_weights

from experiments.items.overview import plan_item, status_line
from experiments.make import program
from experiments.tables.table import read_table


def test_a_table_is_made_end_to_end_and_again_at_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    weights = write_weights(tmp_path / "weights")
    paths = [f"paths.miniature={weights}", f"paths.results={tmp_path}"]
    given = ["table=table12", "model=mini", 'filter="concept=parachute"', "logger=none", *paths]
    given.append('overrides="debug=tiny limit=4"')
    passed = ["logger=none", *paths]
    config = compose_tables(*given)
    program(config, given, passed)
    folder = tmp_path / "reproduction"
    frame = pd.read_csv(folder / "table12-mini.csv").set_index(["concept", "edit"])
    assert frame.loc["parachute", "value"].notna().all()
    assert frame.loc["cassette_player", "value"].isna().all()
    assert list(frame.loc["parachute", "paper"]) == [63.2, 96.4]
    markdown = (folder / "table12-mini.md").read_text()
    assert "2 steps, guidance 4.5, seed 0, float32" in markdown
    assert "Not run yet: 2 runs of 4." in markdown
    capfd.readouterr()
    program(config, given, passed)
    assert "Launching" not in "".join(capfd.readouterr())
    assert (folder / "table12-mini.md").read_text() == markdown
    table = read_table(config.table, "mini", False)
    line = status_line(config, plan_item(config, table, passed, whole=False))
    assert (line["done"], line["missing"], line["rendered"]) == ("2", "0", "table12-mini.md")
