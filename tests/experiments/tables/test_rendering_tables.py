"""Cells out of results and published values, and the table in all its formats."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tables_fixture import composed_table, finished_run, row, small_table

from cad.errors import UserError
from experiments.tables.cells import (
    Cell,
    ResultReader,
    build_cells,
    read_published,
)
from experiments.tables.exhibit import ListedRun, Scope, ShownMetric, Table, with_seeds
from experiments.tables.layout import PUBLISHED, cell_text, lay_out, render_table
from experiments.tables.notes import absences, table_notes
from experiments.tables.publishing import publish

WHOLE = {
    ("church", "none"): (76.0, 72.1, 79.5),
    ("church", "erase"): (4.4, 2.9, 6.6),
    ("tench", "none"): (81.0, 77.3, 84.2),
    ("tench", "erase"): (0.2, 0.0, 1.1),
}
PRINTED = read_published(PUBLISHED / "table01.csv")


def runs_of(tmp_path: Path, values: dict[tuple[str, str], Any]) -> list[ListedRun]:
    """The small table's runs with these rows of accuracy; the others are missing."""
    runs = []
    for run in small_table().list_runs():
        key = (run.place["concept"], run.place["edit"])
        if key not in values:
            runs.append(run)
            continue
        rows = [row(*values[key], state="before" if key[1] == "none" else "after")]
        runs.append(finished_run(tmp_path, "-".join(key), rows, edit=key[1], concept=key[0]))
    return runs


def cells_of(tmp_path: Path, values: dict[tuple[str, str], Any], **changed: Any) -> list[Cell]:
    return build_cells(small_table(**changed), runs_of(tmp_path, values), PRINTED)


def texts(cells: list[Cell]) -> dict[tuple[str, str], str]:
    return {(cell.place["concept"], cell.place["edit"]): cell_text(cell) for cell in cells}


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


THREE = {"concept": ["church"], "edit": ["none", "erase", "uce", "esd"]}


def best_of(tmp_path: Path, shown: dict[str, list[bool]]) -> list[str]:
    """The edits that are best where these images of the class were recognised after them."""
    table = small_table(axes=THREE | {"edit": list(shown)})
    runs = []
    for run in table.list_runs():
        edit = run.place["edit"]
        state = "before" if edit == "none" else "after"
        told = {"metric": "accuracy", "state": state, "group": "church"}
        records = [told | {"index": i, "correct": each} for i, each in enumerate(shown[edit])]
        value = 100 * sum(shown[edit]) / len(shown[edit])
        rows = [row(value, value - 30, value + 30, state=state)]
        made = finished_run(tmp_path, edit, rows, edit=edit, records=records, place=run.place)
        runs.append(made)
    return [cell.place["edit"] for cell in build_cells(table, runs, {}) if cell.best]


def test_the_best_is_so_by_the_paired_test_and_no_edit_is_none(tmp_path: Path) -> None:
    none, half = [False] * 20, [True] * 10 + [False] * 10
    shown = {"none": none, "erase": none, "uce": half, "esd": half}
    assert best_of(tmp_path / "1", shown) == ["erase"]  # 10 of 10: p = 0.002
    assert best_of(tmp_path / "2", shown | {"uce": none}) == ["erase", "uce"]
    few = [True] * 5 + [False] * 15  # 5 of 5: p = 0.0625
    assert best_of(tmp_path / "3", shown | {"uce": few}) == []
    assert best_of(tmp_path / "4", {"none": half, "erase": none}) == ["erase"]  # a single edit
    assert best_of(tmp_path / "5", {"none": none, "erase": half}) == []


def test_without_images_judged_one_by_one_intervals_must_be_disjoint(tmp_path: Path) -> None:
    for high, best in ((6.6, True), (7.0, False)):
        values = {("church", "erase"): (4.4, 2.9, high), ("church", "uce"): (8.0, 6.8, 9.0)}
        table = small_table(axes={"concept": ["church"], "edit": ["erase", "uce"]})
        runs = [
            finished_run(tmp_path / str(high), "-".join(at), [row(*numbers)], place=run.place)
            for run, (at, numbers) in zip(table.list_runs(), values.items(), strict=True)
        ]
        assert [cell.best for cell in build_cells(table, runs, {})] == [best, False]


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
    assert lay_out(small_table(average="concept"), cells).index[-1] == ("Average",)


def seeds_of(tmp_path: Path, table: Table, values: dict[str, list[float]]) -> list[ListedRun]:
    """The runs of a table by two edits of one object, of each edit those at the first seeds."""
    runs = []
    for run in table.list_runs():
        edit, seed = run.place["edit"], int(run.place["seed"])
        if seed < len(values[edit]):
            value = values[edit][seed]
            rows = [row(value, value - 1, value + 1)]
            run = finished_run(tmp_path, f"{edit}-{seed}", rows, edit=edit, place=run.place)
        runs.append(run)
    return runs


def test_seeds_have_a_mean_and_a_standard_deviation(tmp_path: Path) -> None:
    axes = {"concept": ["church"], "edit": ["erase", "uce"]}
    table = with_seeds(small_table(axes=axes, average="concept"), [0, 1, 2])
    assert isinstance(table, Table)
    assert table.list_runs()[2].overrides[-1] == "seed=2"
    runs = seeds_of(tmp_path, table, {"erase": [1.0, 2.0, 6.0], "uce": [8.0, 9.0, 9.0]})
    rendering = render_table(table, runs)
    files = {ending: content.decode() for ending, content in rendering.files.items()}
    assert "| Church  | **3.0** ± 2.6 [2.4, 3.6] (1.60)" in files["md"]
    assert "| Average | **3.0** ± 2.6 [2.4, 3.6]" in files["md"]
    assert r"Church & \textbf{3.0} $\pm$ 2.6 & 8.7 $\pm$ 0.6 \\" in files["tex"]
    assert "Means ± standard deviations over seeds 0, 1, 2" in files["md"]
    frame = pd.read_csv(io.StringIO(files["csv"]))
    assert list(frame["deviation"].round(2)) == [2.65, 0.58] * 2
    part = seeds_of(tmp_path / "part", table, {"erase": [1.0, 2.0, 6.0], "uce": [8.0]})
    markdown = render_table(table, part).files["md"].decode()
    assert "| Church  | 3.0 ± 2.6 [2.4, 3.6] (1.60)" in markdown  # and not yet the best
    assert "Not run yet: 2 runs of 6." in markdown


def test_another_model_is_shown_beside_the_paper_and_not_judged(tmp_path: Path) -> None:
    mini = {"axes": {"concept": ["face"], "edit": ["erase"]}, "stands_for": {"face": "church"}}
    table = small_table("mini", mini=mini, compare=None)
    place = {"model": "mini", "concept": "face", "edit": "erase"}
    run = finished_run(tmp_path, "x", [row(50.0, 40.0, 60.0)], concept="face", place=place)
    (cell,) = build_cells(table, [run], PRINTED)
    assert cell_text(cell) == "50.0 [40.0, 60.0] (1.60)"
    assert list(lay_out(table, [cell]).index) == [("Face (for Church)",)]
    assert "of sd14, another model" in table_notes(table, [cell], [run])[0]


def test_every_format_from_one_layout(tmp_path: Path) -> None:
    table, runs = small_table(), runs_of(tmp_path, WHOLE)
    rendering = render_table(table, runs)
    assert (
        "50 steps, guidance 7.5, seed 0, float16 on a GPU; commit 012345678" in rendering.notes[1]
    )
    assert "n = 500 by test" in rendering.notes[2]
    paths = publish(table, rendering, runs, tmp_path / "out")
    endings = ("md", "tex", "html", "csv")
    assert {path.name for path in paths.values()} == {f"table01-sd14.{each}" for each in endings}
    markdown, tex, page = (paths[each].read_text() for each in endings[:3])
    assert "accuracy on the class, % ↓" in markdown
    assert "| Church | 76.0 [72.1, 79.5] (76.20) | **4.4** [2.9, 6.6] (1.60)† |" in markdown
    for words in (
        r"\toprule",
        r"Church & 76.0 & \textbf{4.4} \\",
        r"\multicolumn{3}{l}{\emph{accuracy on the class, \% $\downarrow$}} \\",
        "% Measured: accuracy on the class, %: n = 500",
        r"\caption{accuracy. Bold: significantly the best.}",
        r" & Original & CAD-Erase \\",
    ):
        assert words in tex
    assert page.startswith("<!doctype html>")
    assert "<strong>4.4</strong><small>[2.9, 6.6]</small><i>(1.60)†</i>" in page
    frame = pd.read_csv(paths["csv"])
    assert list(frame["value"]) == [76.0, 4.4, 81.0, 0.2]
    assert list(frame["excludes_paper"]) == [False, True, False, False]
    again = publish(table, rendering, runs, tmp_path / "again")
    assert all(paths[each].read_bytes() == again[each].read_bytes() for each in paths)


def test_a_heading_of_one_level_is_no_tuple_in_latex(tmp_path: Path) -> None:
    table = small_table(columns=["edit"])
    tex = render_table(table, runs_of(tmp_path, WHOLE)).files["tex"].decode()
    assert r" & Original & CAD-Erase \\" in tex


def test_an_emptier_table_replaces_none(tmp_path: Path) -> None:
    table, out = small_table(), tmp_path / "out"
    whole, part = (runs_of(tmp_path / str(n), dict([*WHOLE.items()][:n])) for n in (4, 3))
    paths = publish(table, render_table(table, whole), whole, out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match=r"has 4 of its 4 places filled and would have 3"):
        publish(table, render_table(table, part), part, out)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    fewer = small_table(axes={"concept": ["church"], "edit": ["none", "erase"]})
    publish(fewer, render_table(fewer, whole[:2]), whole[:2], out)  # other places, all filled
    publish(table, render_table(table, part), part, out)
    assert "Not run yet: 1 run of 4." in paths["md"].read_text()


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
    label = reader.read(ShownMetric("x", "nudity", label="FACE_MALE"))
    change = reader.read(ShownMetric("x", "nudity", change=True))
    assert label is not None
    assert change is not None
    assert (label.value, label.n, label.unit) == (5, 10, "%")
    assert label.low < 5 < label.high
    assert (change.value, change.unit) == (-75, "%")
    assert -100 <= change.low < -75 < change.high < 0
    assert reader.read(ShownMetric("x", "fid", Scope.general)) is None
    unedited = finished_run(tmp_path, "y", rows, records=records, edit="none").folder
    change = ResultReader(unedited).read(ShownMetric("x", "nudity", change=True))
    assert change is not None
    assert change.value == 0
    assert math.isnan(change.low)


def test_costs_have_no_interval(tmp_path: Path) -> None:
    table = composed_table(10)
    run = finished_run(tmp_path, "x", [], edit="esd", place=table.list_runs()[0].place)
    seconds, memory = build_cells(table, [run], read_published(PUBLISHED / "table10.csv"))
    assert cell_text(seconds) == "12.34 (5691)"
    assert cell_text(memory) == "568 (10225)"
    unedited = finished_run(tmp_path, "y", [], edit="none")
    assert ResultReader(unedited.folder).read(table.metrics["seconds"]) is None


def test_what_is_not_there_is_said_with_its_reason() -> None:
    runs = [ListedRun(i, {}, (), failed="no memory" if i == 0 else "") for i in range(3)]
    runs += [ListedRun(0, {}, (), refused="not built yet") for _ in range(2)]
    assert absences(runs) == [
        "Failed, 1 run: no memory.",
        "Not run yet: 2 runs of 5.",
        "Not run, 2 runs: not built yet.",
    ]
