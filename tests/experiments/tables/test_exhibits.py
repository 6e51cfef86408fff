"""conf/table and conf/figure: all are read in every version, and have their published values."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import HydraException
from hydra.utils import get_method
from omegaconf.errors import OmegaConfBaseException
from tables_fixture import (
    FIGURES,
    NUMBERS,
    VERSIONS,
    composed_figure,
    composed_table,
    exhibit_nodes,
    small_table,
)

from cad.errors import UserError
from experiments.run.configuration import CONF, compose
from experiments.tables.cells import Cell, build_cells, read_published
from experiments.tables.exhibit import Exhibit, Figure, Table, filtered, with_methods
from experiments.tables.layout import PUBLISHED, lay_out, panels

# The paper prints a dash for the amplified model, no rates without attack in Table 3, and no change
# of the unedited one in Table 14.
NOT_PRINTED = {2: 2, 3: 20, 9: 2, 14: 6}
DASHES = {2: 2, 9: 2}  # printed
GROUPS = ("concept", "edit", "prompts", "model")


def cells_of(table: Table) -> list[Cell]:
    return build_cells(table, table.list_runs(), read_published(PUBLISHED / f"{table.stem}.csv"))


def overrides_of(exhibit: Exhibit) -> set[tuple[str, ...]]:
    """The runs that are not skipped, each whatever the order of its overrides."""
    return {tuple(sorted(run.overrides)) for run in exhibit.list_runs() if not run.refused}


@pytest.mark.parametrize("group", ["table", "figure"])
def test_all_lists_every_file(group: str) -> None:
    listed = compose([f"{group}=all"])[group].each
    files = {path.stem for path in (CONF / group).glob("*.yaml")}
    assert set(listed) == files - {"all", "qualitative"}
    assert set(listed) == set(exhibit_nodes()[group])


@pytest.mark.parametrize("path", [*CONF.glob("table/*.yaml"), *CONF.glob("figure/*.yaml")])
def test_every_file_begins_with_its_command(path: Path) -> None:
    commands = path.read_text().splitlines()[:2]
    assert any(f"# python run.py {path.parent.name}={path.stem} model=mini" in c for c in commands)


@pytest.mark.parametrize("number", NUMBERS)
def test_every_published_value_has_one_cell(number: int) -> None:
    table = composed_table(number)
    cells = [each for each in cells_of(table) if not {*table.ours} & {*each.place.values()}]
    printed = [cell for cell in cells if cell.paper is not None]
    values = read_published(PUBLISHED / f"table{number:02d}.csv")
    assert len(printed) == len(values) - DASHES.get(number, 0)
    assert len(cells) - len(printed) == NOT_PRINTED.get(number, 0)
    assert all(cell.comparable for cell in cells)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(("model", "fast"), VERSIONS)
def test_every_table_is_laid_out_whole(number: int, model: str | None, fast: bool) -> None:
    table = composed_table(number, model, fast=fast)
    cells = cells_of(table)
    frame = lay_out(table, cells)
    assert frame.size == len(cells)
    assert panels(frame)
    if model == "mini":
        assert not any(cell.comparable for cell in cells)
        assert any(cell.paper for cell in cells)
    for override in itertools.chain(*(run.overrides for run in table.list_runs())):
        group, _, option = override.partition("=")
        assert group not in GROUPS or (CONF / group / f"{option}.yaml").exists(), override


@pytest.mark.parametrize("stem", FIGURES)
@pytest.mark.parametrize(("model", "fast"), VERSIONS)
def test_every_figure_has_runs_and_a_function(stem: str, model: str | None, fast: bool) -> None:
    figure = composed_figure(stem, model, fast=fast)
    assert isinstance(figure, Figure)
    assert figure.list_runs()
    assert callable(get_method(figure.drawing["_target_"]))


def test_fast_versions_say_so() -> None:
    tables = [composed_table(number, "mini", fast=True) for number in NUMBERS]
    for exhibit in [*tables, *(composed_figure(stem, "mini", fast=True) for stem in FIGURES)]:
        assert any(note.startswith("Fast: ") for note in exhibit.note), exhibit.name


def test_exhibits_of_the_miniature_share_their_runs() -> None:
    runs = {number: overrides_of(composed_table(number, "mini")) for number in NUMBERS}
    assert runs[8] < runs[1]
    assert runs[9] < runs[2]
    assert runs[13] < runs[2]
    assert runs[14] < runs[2] | runs[4]
    assert len(runs[12] & runs[6]) == 2  # the cassette player
    for name, number in (("objects", 1), ("explicit", 2), ("styles", 5), ("amplified", 6)):
        for fast in (False, True):
            shown = overrides_of(composed_figure(f"qualitative_{name}", "mini", fast=fast))
            assert shown <= overrides_of(composed_table(number, "mini", fast=fast)), name


def test_our_rows_stand_where_cad_erase_stands_and_say_so() -> None:
    for number in (1, 2, 3, 5, 7, 8, 9, 10):
        for model in (None, "mini"):
            table = composed_table(number, model)
            found = [each for each in cells_of(table) if "contrast" in each.place.values()]
            assert found
            assert not any(cell.paper for cell in found)
            assert "contrast (ours)" in lay_out(table, cells_of(table)).to_string()


def test_names_say_the_model() -> None:
    assert composed_table(1).name == "table01-sd14"
    assert composed_table(13).name == "table13-sd35-sdxl"
    assert composed_table(1, "mini", fast=True).name == "table01-mini-fast"


def test_later_overrides_replace_earlier_ones() -> None:
    table = small_table(runs=["a=1", "b=2", "+c={}"])
    expected = ("a=3", "b=2", "+c={}", "model=sd14", "concept=church", "edit=none")
    assert table.list_runs(["a=3"])[0].overrides == expected


def test_a_filter_chooses_runs() -> None:
    table = small_table()
    runs = table.list_runs()
    chosen = filtered(runs, "concept=church edit=none,erase", table)
    assert [run.number for run in chosen] == [0, 1]
    assert filtered(runs, "", table) == runs
    with pytest.raises(UserError, match=r"no axis 'method'; choose from model, concept, edit"):
        filtered(runs, "method=uce", table)
    with pytest.raises(UserError, match=r"no edit 'esd'; choose from none, erase"):
        filtered(runs, "edit=esd", table)


def test_methods_are_added_or_replace() -> None:
    table = composed_table(2, "mini")
    more = with_methods(table, "+mine")
    assert list(more.axes["edit"]) == [*table.axes["edit"], "mine"]
    assert more.axes["edit"]["mine"] == ["edit=mine"]
    fewer = with_methods(table, "amplify,mine")
    assert fewer.axes["edit"]["amplify"] == ["edit=amplify", "evaluator=[nudity]"]
    assert len(fewer.list_runs()) == 2
    with pytest.raises(UserError, match=r"Table 7 has no axis of edits"):
        with_methods(composed_table(7), "+mine")


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"model=sdxl: Table 1 is of sd14; .* model=mini"):
        composed_table(1, "sdxl")
    with pytest.raises(UserError, match=r"making\.fast=true is the miniature's: Figure 2"):
        composed_figure("figure2", fast=True)
    for changed in ({"colums": ["edit"]}, {"mini": {"run": []}}, {"drawing": {}}):
        with pytest.raises(OmegaConfBaseException, match="not in"):
            small_table("mini", **changed)
    with pytest.raises(UserError, match=r"edit is in neither rows nor columns"):
        small_table(columns=["metric"])
    with pytest.raises(UserError, match=r"method is no axis"):
        small_table(compare="method")
    with pytest.raises(UserError, match=r"prompts is no axis"):
        small_table(skip={"why": {"prompts": "mma"}})
    bad: dict[str, Any] = {"x": {"heading": "x", "of": "accuracy", "better": "up"}}
    with pytest.raises(OmegaConfBaseException, match=r"metrics\.x\.better"):
        small_table(metrics=bad)
    with pytest.raises(HydraException):
        compose(["table=table15"])
