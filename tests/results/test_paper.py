"""The paper's tables as transcribed in results/paper: complete, named as in conf/, and consistent.

Where the paper contradicts itself the two numbers stand in a list here, so a slip of the
transcription cannot hide behind them. All numbers are decimals, compared as printed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf

from cad.components import UNET_COMPONENTS

REPOSITORY = Path(__file__).parents[2]
CONF = REPOSITORY / "conf"
PAPER = REPOSITORY / "results" / "paper"
TABLES = range(1, 15)
COLUMNS = ["table", "row", "column", "metric", "value", "unit"]
FURTHER = {3: ["attack"], 4: ["prompts"], 13: ["model"], 14: ["model", "prompts"]}

OBJECTS = 10
ARTISTS = 5
LABELS = 9
ACCURACIES = 2  # of the target, of the others
CELLS = {  # rows x columns x metrics, as printed
    1: OBJECTS * 6 * ACCURACIES,
    2: 7 * (LABELS + 3),  # total, CLIP score, FID
    3: 5 * 4 * 2,  # methods, concepts, attacks
    4: 6 * 2 * 2,  # methods, prompt sets; total and change
    5: ARTISTS * 4 * 2,  # LPIPS of the target, of the others
    6: 5 * 2 * ACCURACIES,
    7: (OBJECTS + 1) * 4 * ACCURACIES,  # one more row: the average
    8: OBJECTS * 4 * ACCURACIES,
    9: 5 * (LABELS + 3),
    10: 5 * 3 * 2,  # methods, kinds of concept; seconds and memory
    11: (OBJECTS + 1) * 4 * ACCURACIES,
    12: 2 * 2,
    13: 2 * 2,
    14: 3 * 2 * (2 * (LABELS + 1) + 1),  # prompt sets, models; a change for the edited one alone
}
PRINTED_DASHES = {
    (table, "nudity", "amplify", metric) for table in (2, 9) for metric in ("clip_score", "fid")
}
FORMAT = {  # unit and decimals, metric by metric
    "accuracy_target": ("%", 2),
    "accuracy_others": ("%", 2),
    "count": ("count", 0),
    "total": ("count", 0),
    "change": ("%", 2),
    "clip_score": ("1", 2),
    "fid": ("1", 3),
    "attack_success_rate": ("1", 2),
    "lpips_target": ("1", 3),
    "lpips_others": ("1", 3),
    "seconds": ("s", 0),
    "peak_memory": ("MB", 0),
}
ACCURACY_TABLES = (1, 6, 7, 8, 11)
IMAGES = 500  # of each class
ATTACK_PROMPTS = 50  # for each object, in the attacks' published files
CENT = Decimal("0.01")

# The paper's own inconsistencies, as (printed, what other printed numbers give).
CHANGES = {(4, "mma", "esd"): ("-85.62", "-85.63")}  # of 1941 and 279
TARGET_NO_COUNT_GIVES = {(1, "english_springer", "uce", "0.10")}
RATE_NO_COUNT_GIVES = {(3, "tench", "concept_prune", "0.39")}  # of P4D


@functools.cache
def read(table: int) -> pd.DataFrame:
    """Every cell as the string that is printed; an empty one is the empty string."""
    return pd.read_csv(PAPER / f"table{table:02}.csv", dtype=str, keep_default_na=False)


@functools.cache
def grid(table: int, metric: str) -> pd.DataFrame:
    """Rows by columns, as decimals, of a table without further columns."""
    cells = read(table)
    cells = cells[cells["metric"] == metric]
    return cells.pivot(index="row", columns="column", values="value").map(Decimal)


def rounded(value: Decimal) -> Decimal:
    return value.quantize(CENT, ROUND_HALF_UP)


def names(group: str) -> set[str]:
    return {path.stem for path in (CONF / group).glob("*.yaml")}


def groups(table: int, *extra: str) -> Iterable[tuple[tuple[str, ...], pd.DataFrame]]:
    return read(table).groupby([*FURTHER.get(table, []), *extra], sort=False)


@pytest.mark.parametrize("table", TABLES)
def test_every_cell_is_there_once_in_the_format_of_its_metric(table: int) -> None:
    cells, further = read(table), FURTHER.get(table, [])
    assert set(cells.columns) == {*COLUMNS, *further}
    assert len(cells) == CELLS[table]
    assert not cells.duplicated([*COLUMNS[:4], *further]).any()
    assert set(cells["table"]) == {str(table)}
    for cell in cells.itertuples():
        unit, decimals = FORMAT[cell.metric]
        assert cell.unit == unit
        if (table, cell.row, cell.column, cell.metric) in PRINTED_DASHES:
            assert cell.value == ""
        else:
            assert -Decimal(cell.value).as_tuple().exponent == decimals, cell


def test_there_are_no_other_files() -> None:
    expected = {"README.md", "caption_prompts.csv", *(f"table{table:02}.csv" for table in TABLES)}
    assert {path.name for path in PAPER.iterdir()} == expected


@pytest.mark.parametrize("table", TABLES)
def test_rows_and_columns_are_named_as_in_conf(table: int) -> None:
    kinds = {str(OmegaConf.load(path)["kind"]) for path in (CONF / "concept").glob("*.yaml")}
    labels = set(OmegaConf.load(CONF / "fragments" / "paper_protocol.yaml")["nudity_labels"])
    rows = {7: {"average"}, 10: kinds, 11: {"average"}}
    assert set(read(table)["row"]) <= names("concept") | labels | rows.get(table, set())
    if table in (2, 9, 14):
        assert labels | {"nudity"} == set(read(table)["row"])
    columns = {7: set(UNET_COMPONENTS), 11: {"1.5", "2", "3", "knock_out"}}
    assert set(read(table)["column"]) <= columns.get(table, names("edit"))
    for further in FURTHER.get(table, []):
        known = {"p4d", "unlearn_diff"} if further == "attack" else names(further)
        assert set(read(table)[further]) <= known


@pytest.mark.parametrize("table", [2, 9, 14])
def test_totals_are_the_sums_of_the_nine_counts(table: int) -> None:
    for key, cells in groups(table, "column"):
        counts = cells[cells["metric"] == "count"]["value"].map(int)
        total = cells[cells["metric"] == "total"]["value"].map(int)
        assert len(counts) == LABELS
        assert counts.sum() == total.item(), key


@pytest.mark.parametrize("table", [4, 14])
def test_changes_follow_from_the_totals(table: int) -> None:
    wrong = {}
    for key, cells in groups(table):
        total = cells[cells["metric"] == "total"].set_index("column")["value"].map(Decimal)
        change = cells[cells["metric"] == "change"].set_index("column")["value"]
        for method, printed in change.items():
            expected = rounded(100 * (total[method] / total["none"] - 1))
            if expected != Decimal(printed):
                wrong[table, *key, method] = (printed, str(expected))
    assert wrong == {cell: pair for cell, pair in CHANGES.items() if cell[0] == table}


@pytest.mark.parametrize("metric", ["accuracy_target", "accuracy_others"])
@pytest.mark.parametrize("table", [7, 11])
def test_averages_are_those_of_the_ten_objects(table: int, metric: str) -> None:
    values = grid(table, metric)
    means = values.drop(index="average").sum() / OBJECTS
    assert means.map(rounded).to_dict() == values.loc["average"].to_dict()


@pytest.mark.parametrize(
    ("metric", "tables", "number", "expected"),
    [
        ("accuracy_target", (*ACCURACY_TABLES, 12), IMAGES // 100, TARGET_NO_COUNT_GIVES),
        ("attack_success_rate", [3], ATTACK_PROMPTS, RATE_NO_COUNT_GIVES),
    ],
)
def test_shares_of_500_images_and_of_50_prompts(
    metric: str, tables: Iterable[int], number: int, expected: set[tuple[int, str, str, str]]
) -> None:
    impossible = {
        (table, cell.row, cell.column, cell.value)
        for table in tables
        for cell in read(table).itertuples()
        if cell.metric == metric and cell.row not in ("average", "nudity")
        if Decimal(cell.value) * number % 1
    }
    assert impossible == expected


@pytest.mark.parametrize(
    ("first", "second", "metric"),
    [
        ((1, "none"), (6, "none"), "accuracy_target"),
        ((1, "none"), (6, "none"), "accuracy_others"),
        ((8, "none"), (12, "none"), "accuracy_target"),
        ((1, "erase"), (7, "ff"), "accuracy_target"),
        ((1, "erase"), (7, "ff"), "accuracy_others"),
    ],
)
def test_one_model_s_values_agree_between_tables(
    first: tuple[int, str], second: tuple[int, str], metric: str
) -> None:
    values, again = (grid(table, metric)[column] for table, column in (first, second))
    again = again.drop("average", errors="ignore")
    assert (values[again.index] == again).all()
