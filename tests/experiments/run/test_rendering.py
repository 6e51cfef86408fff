"""The table of a run says what its files say."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from results_fixture import write_result

from experiments.run.groups import MEAN
from experiments.run.rendering import (
    DASH,
    format_interval,
    result_table,
    show_result,
    title,
    to_markdown,
)
from experiments.run.results import read_json


def table(folder: Path) -> pd.DataFrame:
    return result_table(read_json(folder / "metrics.json"), read_json(folder / "cost.json"))


def test_rows_of_an_erasure(tmp_path: Path) -> None:
    rows = table(write_result(tmp_path, effect=True)).to_numpy().tolist()
    assert rows[0] == [
        "accuracy on parachute, % (n = 20)",
        "95.0 [76.4, 99.1]",
        "5.0 [0.9, 23.6]",
        "-90.0",
    ]
    assert rows[1][0] == "accuracy on the 10 others, % ↑ (n = 200)"
    assert rows[1][3] == "-3.5"
    assert rows[2] == ["weights changed", DASH, "12,345", DASH]
    assert rows[3] == ["editing time", DASH, "18.2 s", DASH]
    assert rows[4] == ["peak memory of editing (resident growth)", DASH, "512 MB", DASH]
    assert rows[5][2] == "0.930"


def test_the_mean_of_unequal_groups_is_called_so(tmp_path: Path) -> None:
    folder = write_result(tmp_path)
    metrics, cost = read_json(folder / "metrics.json"), read_json(folder / "cost.json")
    for row in metrics["metrics"]:
        row |= {"groups": 3, "over": MEAN, "n": 5}
    label = result_table(metrics, cost).iloc[1, 0]
    assert label == "accuracy on the 3 others, % ↑ (n = 5, mean of groups)"


def test_broken_images_have_a_row_only_if_there_are_any(tmp_path: Path) -> None:
    rows = table(write_result(tmp_path, broken=7)).to_numpy().tolist()
    assert rows[2][0].startswith("broken images")
    assert rows[2][1:] == ["0 of 220", "7 of 220", DASH]
    whole = table(write_result(tmp_path, concept="church")).to_numpy().tolist()
    assert not any(row[0].startswith("broken") for row in whole)


def test_no_edit_has_no_after_and_no_cost(tmp_path: Path) -> None:
    folder = write_result(tmp_path, ratio=None)
    rows = table(folder).to_numpy().tolist()
    assert [row[2] for row in rows] == [DASH, DASH]
    assert title(read_json(folder / "metrics.json")) == "parachute by mini, unedited"


def test_markdown_keeps_the_digits(tmp_path: Path) -> None:
    frame = pd.DataFrame([["a", "0.500"]], columns=["", "x"])
    assert "0.500" in to_markdown(frame)


def test_a_missing_metric_is_a_dash() -> None:
    assert format_interval(None) == DASH


@pytest.mark.parametrize("reused", [True, False])
def test_the_console_names_the_folder_and_says_when_nothing_was_computed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], reused: bool
) -> None:
    folder = write_result(tmp_path)
    show_result(folder, reused=reused)
    shown = capsys.readouterr().out
    assert str(folder) in shown.replace("\n", "")
    assert ("nothing was computed" in shown) is reused
