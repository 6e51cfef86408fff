"""A table, figures and the report made end to end: random weights of the miniature, debug=tiny."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from tables_fixture import compose_tables
from weights import write_weights

from experiments.items.overview import plan_item, status_line
from experiments.make import program
from experiments.report import write_report
from experiments.tables.table import read_table


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(autouse=True)
def small_and_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_a_table_is_made_end_to_end_and_again_at_once(
    tmp_path: Path, weights: Path, capfd: pytest.CaptureFixture[str]
) -> None:
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


def test_figures_are_made_end_to_end_and_reported(tmp_path: Path, weights: Path) -> None:
    paths = [f"paths.miniature={weights}", f"paths.results={tmp_path}"]
    passed = ["logger=none", *paths]
    common = ["model=mini", "fast=true", *passed, 'overrides="debug=tiny images_per_class=1"']
    for name, part in (
        ("figure7", "concept=church ratio=0.01,0.02"),
        ("qualitative_objects", "concept=church edit=none,uce"),
        ("components", "sign=positive"),
    ):
        given = [f"figure={name}", f'filter="{part}"', *common]
        program(compose_tables(*given), given, passed)
    folder = tmp_path / "reproduction"
    curves = pd.read_csv(folder / "figure7-mini-fast.csv")
    assert set(curves["ratio"]) == {0.01, 0.02}
    grid = pd.read_csv(folder / "qualitative_objects-mini-fast.csv")
    assert list(grid["group"]) == ["church", "tench", "english_springer"]  # one image of each
    places = pd.read_csv(folder / "components-mini-fast.csv")
    assert places["share"].sum() == pytest.approx(100)
    assert places["expected"].sum() == pytest.approx(100)
    for name in ("figure7", "qualitative_objects", "components"):
        for ending in ("png", "pdf", "md", "html", "json"):
            assert (folder / f"{name}-mini-fast.{ending}").stat().st_size
    page = write_report(folder, "mini").read_text()
    assert page.index("figure7-mini-fast") < page.index("components-mini-fast")
    assert page.count("data:image/png;base64,") == 3
