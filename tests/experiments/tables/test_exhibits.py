"""conf/table and conf/figure: all are read in every version, and have their published values."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
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
from experiments.run.arguments import build
from experiments.run.configuration import CONF, compose, composer
from experiments.run.experiment import prepare
from experiments.tables.cells import Cell, build_cells, read_published
from experiments.tables.exhibit import (
    Exhibit,
    Figure,
    Table,
    by_number,
    filtered,
    read_exhibit,
    with_methods,
)
from experiments.tables.layout import PUBLISHED, lay_out, panels

# The paper prints a dash for the amplified model, no rates without attack in Table 3, and no change
# of the unedited one in Table 14.
NOT_PRINTED = {1: 12, 2: 2, 3: 20, 8: 8, 9: 2, 14: 6}
DASHES = {2: 2, 9: 2}  # printed
TRAINED = ("esd", "salun", "concept_ablation")
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
    assert set(listed) == files - {"all", "costs", "two_judges", "two_judges_amplified"}
    assert set(listed) == set(exhibit_nodes()[group])


@pytest.mark.parametrize("path", [*CONF.glob("table/*.yaml"), *CONF.glob("figure/*.yaml")])
def test_every_file_begins_with_its_command(path: Path) -> None:
    commands = path.read_text().splitlines()[:2]
    assert any(f"# python run.py {path.parent.name}={path.stem} model=mini" in c for c in commands)


@pytest.mark.parametrize("number", NUMBERS)
def test_every_published_value_has_one_cell(number: int) -> None:
    table = composed_table(number)
    beyond = {*table.ours, *table.added}
    cells = [each for each in cells_of(table) if not beyond & {*each.place.values()}]
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


def test_costs_are_those_of_every_method_and_model_without_images() -> None:
    runs = read_exhibit("table", "costs", compose(["table=costs"]).table, None).list_runs()
    assert {run.place["model"] for run in runs} == {"sd14", "sd21", "sdxl", "sd35"}
    methods = {run.place["edit"] for run in runs}
    assert methods > {"amplify", *composed_table(10).axes["edit"]} - {*TRAINED}
    assert {f"{name}_20_iterations" for name in TRAINED} < methods
    with composer() as composed:
        for run in (run for run in runs if "sd14" in run.place.values()):
            experiment = prepare(composed(run.overrides))
            assert experiment.model.weights == "random"
            assert not experiment.evaluators


@pytest.mark.parametrize("stem", FIGURES)
@pytest.mark.parametrize(("model", "fast"), VERSIONS)
def test_every_figure_has_runs_and_a_function(stem: str, model: str | None, fast: bool) -> None:
    figure = composed_figure(stem, model, fast=fast)
    assert isinstance(figure, Figure)
    assert figure.list_runs()
    assert callable(get_method(figure.drawing["_target_"]))


@pytest.mark.parametrize("number", range(2, 13))
def test_figures_are_of_the_papers_models_and_concepts(number: int) -> None:
    figure = composed_figure(f"figure{number}")
    assert figure.called == f"Figure {number}"
    assert figure.models == (["sd21"] if number in (10, 11, 12) else ["sd14"])
    named = {3: ["english_springer"], 5: ["pablo_picasso"], 6: ["church", "chain_saw"]}
    named |= {9: ["van_gogh"]} | {each: ["nudity"] for each in (4, 8, 11)}
    assert list(figure.axes["concept"]) == named.get(number, list(figure.axes["concept"]))
    with pytest.raises(UserError, match=rf"model=sdxl: Figure {number} is of"):
        composed_figure(f"figure{number}", "sdxl")


@pytest.mark.parametrize("number", range(2, 13))
def test_a_run_of_each_of_the_papers_figures_can_be_prepared(number: int, tmp_path: Path) -> None:
    """And what it lacks is named: an amplified object its photographs, which nobody ships."""
    run = composed_figure(f"figure{number}").list_runs()[-1]
    cfg = compose([*run.overrides, "logger=none", f"paths.results={tmp_path}"])
    if number in (6, 12):
        cfg.model.references.object.path = str(tmp_path)
        with pytest.raises(UserError, match="reference"):
            prepare(cfg)
        (tmp_path / run.place["concept"]).mkdir()
        for picture in range(5):
            (tmp_path / run.place["concept"] / f"{picture}.png").touch()
    assert prepare(cfg).folder.final.name.startswith(f"{run.place['model']}-")


@pytest.mark.parametrize(("number", "quoted"), [(8, range(4)), (11, range(4, 12)), (4, (0, 2))])
def test_figures_show_the_prompts_that_captions_quote(number: int, quoted: Sequence[int]) -> None:
    figure = composed_figure(f"figure{number}")
    assert isinstance(figure, Figure)
    cfg = compose(figure.list_runs()[-1].overrides)
    prompts = build(cfg.model.prompts.general).build()
    assert set(figure.drawing["others"]) == {prompts[index].group for index in quoted}
    assert {build(node).measures for node in cfg.evaluator.values()} == {"concept", "general"}


@pytest.mark.parametrize("stem", [f"figure{number}" for number in (3, 5, 9, 10)])
@pytest.mark.parametrize("model", [None, "mini"])
def test_other_groups_are_of_the_runs_prompts(stem: str, model: str | None) -> None:
    figure = composed_figure(stem, model)
    assert isinstance(figure, Figure)
    names = {path.stem for path in (CONF / "concept").glob("*.yaml")}
    assert set(figure.drawing["others"]) <= names


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
    assert runs[12] < runs[6]
    tables = {3: 1, 4: 2, 5: 5, 6: 6, 8: 2, 9: 5, 10: 8, 11: 9, 12: 12}
    for (number, table), fast in itertools.product(tables.items(), (False, True)):
        shown = overrides_of(composed_figure(f"figure{number}", "mini", fast=fast))
        assert shown <= overrides_of(composed_table(table, "mini", fast=fast)), number


def test_our_rows_stand_where_cad_erase_stands_and_say_so() -> None:
    for number in (1, 2, 3, 5, 7, 8, 9, 10):
        for model in (None, "mini"):
            table = composed_table(number, model)
            found = [each for each in cells_of(table) if "contrast" in each.place.values()]
            assert found
            assert not any(cell.paper for cell in found)
            assert "CAD-Contrast (ours)" in lay_out(table, cells_of(table)).to_string()


def test_methods_of_others_that_the_paper_lacks_say_so() -> None:
    for number in (1, 2, 5, 10):
        for model in (None, "mini"):
            table = composed_table(number, model)
            assert {*table.added} < {*table.axes["edit"]}
            assert "SPEED (not in the paper)" in lay_out(table, cells_of(table)).to_string()
        assert (
            not {*table.added} & {*composed_table(number, "mini", fast=True).axes["edit"]}
            or number == 10
        )


def test_names_say_the_model() -> None:
    assert composed_table(1).name == "table01-sd14"
    assert composed_table(13).name == "table13-sd35-sdxl"
    assert composed_table(1, "mini", fast=True).name == "table01-mini-fast"
    assert sorted(["figure10-mini", "figure2-mini"], key=by_number)[0] == "figure2-mini"


def test_the_miniature_replaces_settings_of_a_drawing_one_by_one() -> None:
    paper, mini = composed_figure("figure8"), composed_figure("figure8", "mini")
    assert isinstance(paper, Figure)
    assert isinstance(mini, Figure)
    assert mini.drawing == paper.drawing | {"others": {"mini_captions": 4}}


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
