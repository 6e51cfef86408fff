"""conf/table: all fourteen are read, laid out, and have a place for every published value."""

from __future__ import annotations

import functools

import pytest
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from tables_fixture import CONF, NUMBERS, compose_tables, composed_table, small_table

from cad.errors import UserError
from experiments.config import REPOSITORY
from experiments.items.plan import Run, State
from experiments.make import every_item
from experiments.tables.cells import build_cells
from experiments.tables.paper import Published
from experiments.tables.rendering import MARKDOWN, layout, panels
from experiments.tables.table import Table

PAPER = REPOSITORY / "results" / "paper"
MINI = "mini"
VERSIONS = [(None, False), (MINI, False), (MINI, True)]
# The paper prints a dash for the amplified model, no rates without attack in Table 3, and no change
# of the unedited one in Table 14.
NOT_PRINTED = {2: 2, 3: 20, 9: 2, 14: 6}

table = functools.cache(composed_table)


def cells_of(found: Table) -> list:
    runs = [(place, Run((), State.REFUSED, "not run")) for place in found.sweep.places()]
    return build_cells(found, runs, Published(PAPER, found.config.number))


def test_there_are_fourteen() -> None:
    assert every_item("table") == [f"table{number:02d}" for number in NUMBERS]


@pytest.mark.parametrize("number", NUMBERS)
def test_every_published_value_has_one_cell(number: int) -> None:
    cells = cells_of(table(number))
    printed = [cell for cell in cells if cell.paper is not None]
    dashes = 2 if number in (2, 9) else 0
    assert len(printed) == len(Published(PAPER, number)) - dashes
    assert len(cells) - len(printed) == NOT_PRINTED.get(number, 0)
    assert all(cell.comparable for cell in cells)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(("model", "fast"), VERSIONS)
def test_every_version_is_laid_out_whole(number: int, model: str | None, fast: bool) -> None:
    found = table(number, model, fast=fast)
    cells = cells_of(found)
    frame = layout(found, cells, MARKDOWN)
    assert frame.size == len(cells)
    assert panels(frame)
    if model == MINI:
        assert not any(cell.comparable for cell in cells)
        assert any(cell.paper for cell in cells)
    for axis in ("concept", "edit", "prompts", "model"):
        overrides = found.sweep.axes[axis].values() if axis in found.sweep.axes else []
        for override in (each for given in overrides for each in given):
            group, _, option = override.partition("=")
            if group in ("concept", "edit", "prompts", "model"):
                assert (CONF / group / f"{option}.yaml").exists(), override


@pytest.mark.parametrize("number", NUMBERS)
def test_fast_tables_say_so(number: int) -> None:
    assert any(note.startswith("Fast: ") for note in table(number, MINI, fast=True).sweep.notes)


def test_the_miniature_shares_runs_between_tables() -> None:
    def runs(number: int) -> set[tuple[str, ...]]:
        found = table(number, MINI)
        return {
            tuple(sorted(found.sweep.overrides(place)))
            for place in found.sweep.places()
            if not found.sweep.skipped(place)
        }

    assert runs(8) < runs(1)
    assert runs(9) < runs(2)
    assert runs(13) < runs(2)
    assert runs(14) < runs(2) | runs(4)
    assert len(runs(12) & runs(6)) == 2  # the cassette player


def test_names_say_the_model() -> None:
    assert table(1).name == "table01-sd14"
    assert table(13).name == "table13-sd35-sdxl"
    assert table(1, MINI, fast=True).name == "table01-mini-fast"


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"model=sdxl: Table 1 is of sd14; .* model=mini"):
        composed_table(1, "sdxl")
    with pytest.raises(UserError, match=r"fast=true is the miniature's"):
        composed_table(1, fast=True)
    with pytest.raises(OmegaConfBaseException, match="colums"):
        small_table(colums=["edit"])
    with pytest.raises(UserError, match=r"edit is in neither rows nor columns"):
        small_table(columns=["metric"])
    with pytest.raises(UserError, match=r"method is no axis"):
        small_table(compare="method")
    bad = {"x": {"heading": "x", "of": "accuracy", "better": "up"}}
    with pytest.raises(UserError, match=r"metrics\.x\.better=up is not allowed"):
        small_table(metrics=bad)
    with pytest.raises(HydraException):
        compose_tables("table=table15")
