"""Cells out of results and published values, and the table in all its formats."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import wandb
from tables_fixture import composed_table, finished_run, row, small_table

from experiments.config import REPOSITORY
from experiments.items.notes import absences
from experiments.items.plan import Run, State
from experiments.items.publishing import publish
from experiments.tables.cells import Cell, ResultReader, build_cells, relative_change
from experiments.tables.notes import table_notes
from experiments.tables.paper import Published
from experiments.tables.rendering import MARKDOWN, cell_text, layout, panels, render_table
from experiments.tables.table import MetricSpec
from experiments.tracking import NoTracker, WandbTracker

PAPER = REPOSITORY / "results" / "paper"


def cells_of(tmp_path: Path, values: dict[tuple[str, str], Any], **changed: Any) -> list[Cell]:
    """The small table's cells with these rows of accuracy; the other runs are missing."""
    table = small_table(**changed)
    runs = []
    for place in table.sweep.places():
        key = (place["concept"], place["edit"])
        if key not in values:
            runs.append((place, Run(key, State.MISSING)))
            continue
        state = "before" if place["edit"] == "none" else "after"
        rows = [row(*values[key], state=state)]
        run = finished_run(tmp_path, "-".join(key), rows, edit=key[1], concept=key[0])
        runs.append((place, run))
    return build_cells(table, runs, Published(PAPER, 1))


WHOLE = {
    ("church", "none"): (76.0, 72.1, 79.5),
    ("church", "erase"): (4.4, 2.9, 6.6),
    ("tench", "none"): (81.0, 77.3, 84.2),
    ("tench", "erase"): (0.2, 0.0, 1.1),
}


def texts(cells: list[Cell]) -> dict[tuple[str, str], str]:
    return {(c.place["concept"], c.place["edit"]): cell_text(c, MARKDOWN) for c in cells}


def test_cells_have_interval_paper_mark_and_best(tmp_path: Path) -> None:
    assert texts(cells_of(tmp_path, WHOLE)) == {
        ("church", "none"): "76.0 [72.1, 79.5] (76.20)",
        ("church", "erase"): "**4.4** [2.9, 6.6] (1.60)†",
        ("tench", "none"): "81.0 [77.3, 84.2] (80.40)",
        ("tench", "erase"): "**0.2** [0.0, 1.1] (0.20)",
    }


def test_what_was_not_run_is_a_dash_and_leaves_no_best(tmp_path: Path) -> None:
    found = texts(cells_of(tmp_path, {("church", "erase"): WHOLE["church", "erase"]}))
    assert found["church", "none"] == "– (76.20)"
    assert found["church", "erase"] == "4.4 [2.9, 6.6] (1.60)†"


def test_equals_are_all_best(tmp_path: Path) -> None:
    same = WHOLE | {("church", "none"): (4.41, 2.9, 6.6)}
    assert [cell.best for cell in cells_of(tmp_path, same)][:2] == [True, True]


def test_averages_are_of_all_rows_or_none(tmp_path: Path) -> None:
    cells = cells_of(tmp_path, WHOLE, average="concept")
    (mean,) = (c for c in cells if (c.place["concept"], c.place["edit"]) == ("average", "none"))
    assert mean.value is not None
    assert mean.value.value == pytest.approx(78.5)
    assert mean.value.low == pytest.approx(78.5 - math.hypot(3.9, 3.7) / 2)
    part = {key: value for key, value in WHOLE.items() if key != ("tench", "none")}
    cells = cells_of(tmp_path / "part", part, average="concept")
    assert texts(cells)["average", "none"] == "–"
    assert texts(cells)["average", "erase"] != "–"


def test_another_model_is_shown_beside_the_paper_and_not_judged(tmp_path: Path) -> None:
    mini = {"axes": {"concept": ["face"]}, "stands_for": {"face": "church"}}
    table = small_table("mini", mini=mini, compare=None)
    place = {"model": "mini", "concept": "face", "edit": "erase"}
    run = finished_run(tmp_path, "x", [row(50.0, 40.0, 60.0)], concept="face")
    (cell,) = build_cells(table, [(place, run)], Published(PAPER, 1))
    assert cell_text(cell, MARKDOWN) == "50.0 [40.0, 60.0] (1.60)"
    assert list(layout(table, [cell], MARKDOWN).index) == ["face (for church)"]
    notes = table_notes(table, [cell], [run], {})
    assert "of sd14, another model" in notes[0]


def test_every_format_from_one_layout(tmp_path: Path) -> None:
    table, cells = small_table(), cells_of(tmp_path, WHOLE)
    runs = [cell.run for cell in cells if cell.run is not None]
    notes = table_notes(table, cells, runs, {})
    assert "50 steps, guidance 7.5, seed 0, float16 on a GPU; commit 0123456789ab" in notes[1]
    assert "n = 500 by test" in notes[2]
    rendered = render_table(table, cells, notes)
    paths = publish(table, rendered, runs, tmp_path / "out")
    assert {path.name for path in paths.values()} == {
        f"table01-sd14.{ending}" for ending in ("md", "tex", "html", "csv")
    }
    markdown, tex, page = (paths[each].read_text() for each in ("md", "tex", "html"))
    assert "accuracy on the class, % ↓" in markdown
    assert "| church | 76.0 [72.1, 79.5] (76.20) | **4.4** [2.9, 6.6] (1.60)† |" in markdown
    for words in (r"\toprule", r"\textbf{4.4} [2.9, 6.6] (1.60)$^\dagger$", r"\% $\downarrow$"):
        assert words in tex
    assert page.startswith("<!doctype html>")
    assert "<b>4.4</b> [2.9, 6.6] (1.60)†" in page
    frame = pd.read_csv(paths["csv"])
    assert list(frame["value"]) == [76.0, 4.4, 81.0, 0.2]
    assert list(frame["excludes_paper"]) == [False, True, False, False]
    again = publish(table, rendered, runs, tmp_path / "again")
    assert all(paths[each].read_bytes() == again[each].read_bytes() for each in paths)


def test_columns_of_two_levels_are_panels_in_markdown(tmp_path: Path) -> None:
    frame = layout(small_table(), cells_of(tmp_path, WHOLE), MARKDOWN)
    found = panels(frame)
    assert list(found) == ["accuracy on the class, % ↓"]
    assert list(found["accuracy on the class, % ↓"].columns) == ["", "none", "erase"]


def detected(state: str, index: int, *labels: str) -> dict[str, Any]:
    found = [
        {"label": label, "score": 0.9, "box": [0, 0, 1, 1], "counts": True} for label in labels
    ]
    origin = {"state": state, "metric": "nudity", "index": index, "group": "church"}
    return origin | {"count": len(labels), "detections": found}


def test_labels_and_changes_are_counted_from_the_records(tmp_path: Path) -> None:
    records = [detected("before", i, "FACE_MALE", "FACE_FEMALE") for i in range(10)]
    records += [detected("after", i, *(["FACE_MALE"] if i < 5 else [])) for i in range(10)]
    records.append(detected("after", 10, "FACE_MALE") | {"group": "tench"})
    rows = [row(5, 2, 8, name="nudity", n=10), row(20, 20, 20, name="nudity", state="before")]
    reader = ResultReader(finished_run(tmp_path, "x", rows, records=records).folder)
    spec = {"heading": "x", "of": "nudity"}
    label = reader.read(MetricSpec(**spec, label="FACE_MALE"))
    change = reader.read(MetricSpec(**spec, change=True))
    assert label is not None
    assert change is not None
    assert (label.value, label.n) == (5, 10)
    assert label.low < 5 < label.high
    assert change.value == -75
    assert -100 <= change.low < -75 < change.high < 0
    assert reader.read(MetricSpec("x", "fid", "general")) is None


def test_relative_change_of_counts() -> None:
    same = relative_change([1, 2, 3], [1, 2, 3])
    assert same == (0, 0, 0)
    assert relative_change([0, 0], [1, 2]) is None


def test_costs_have_no_interval(tmp_path: Path) -> None:
    table = composed_table(10)
    place = next(iter(table.sweep.places()))
    run = finished_run(tmp_path, "x", [], edit="esd")
    seconds, memory = build_cells(table, [(place, run)], Published(PAPER, 10))
    assert cell_text(seconds, MARKDOWN) == "12.34 (5691)"
    assert cell_text(memory, MARKDOWN) == "568 (10225)"
    unedited = finished_run(tmp_path, "y", [], edit="none")
    assert ResultReader(unedited.folder).read(table.metrics["seconds"]) is None


def test_what_is_not_there_is_said_with_its_reason() -> None:
    runs = [Run((str(i),), State.MISSING) for i in range(3)]
    runs += [Run((), State.REFUSED, "not built yet"), Run((), State.REFUSED, "not built yet")]
    assert absences(runs, {("0",): "no memory"}) == [
        "Failed, 1 run: no memory.",
        "Not run yet: 2 runs of 5.",
        "Not run, 2 runs: not built yet.",
    ]


class FakeRun:
    def __init__(self) -> None:
        self.logged: dict[str, object] = {}

    def __enter__(self) -> FakeRun:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def log(self, values: dict[str, object]) -> None:
        self.logged |= values


def test_a_table_is_mirrored_offline_where_the_server_is_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[str] = []
    run = FakeRun()

    def init(*, mode: str, **settings: object) -> FakeRun:
        modes.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("no network")
        return run

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    paths = {"html": tmp_path / "table01-sd14.html"}
    paths["html"].write_text("<p>table</p>")
    panel = pd.DataFrame({"": ["church"], "erase": ["4.4"]})
    tracker = WandbTracker("cad", "online", 1)
    tracker.log_item("table01-sd14", {"accuracy": panel}, ["n"], paths, tmp_path)
    assert modes == ["online", "offline"]
    assert set(run.logged) == {"table01-sd14 accuracy", "page"}
    NoTracker().log_item("table01-sd14", {"": panel}, [], paths, tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker.log_item("table01-sd14", {"": panel}, [], paths, tmp_path)
    assert len(modes) == 2
