"""Tables and figures made end to end, then status, report and zoo: random weights, debug=tiny."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import programs
import pytest
from omegaconf import DictConfig
from tables_fixture import composed_table
from weights import write_weights

import cad
from cad.files import file_digest
from cad.identity import parameter_digest
from cad.places import REPOSITORY
from evaluation.evaluators.accuracy import Accuracy
from experiments.run.configuration import CONF, compose, composer
from experiments.run.experiment import prepare
from experiments.run.results import read_json
from experiments.tables import lookup, zoo
from experiments.tables.lookup import RunNames
from experiments.tables.make import make
from experiments.tables.report import write_report
from experiments.tables.status import editing_seconds, line


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(autouse=True)
def small_and_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(lookup, "CODE", ())  # which nobody changes while a test runs
    monkeypatch.setattr(lookup, "CONF", Path("nowhere"))


def passed(weights: Path, results: Path) -> list[str]:
    paths = [f"paths.miniature={weights}", f"paths.results={results}"]
    return [*paths, "logger=none", "debug=tiny"]


def unasked(overrides: Sequence[str]) -> DictConfig:
    raise AssertionError(f"composed {overrides}")


def test_a_table_is_made_measured_again_and_known_to_status(
    tmp_path: Path,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    more = [*passed(weights, tmp_path), "limit=4"]
    given = ["table=table12", "model=mini", 'making.filter="concept=parachute"', *more]
    cfg = compose(given)
    make(cfg, given)
    folder = tmp_path / "reproduction"
    frame = pd.read_csv(folder / "table12-mini.csv").set_index(["concept", "edit"])
    assert frame.loc["parachute", "value"].notna().all()
    assert frame.loc["cassette_player", "value"].isna().all()
    assert list(frame.loc["parachute", "paper"]) == [63.2, 96.4]
    markdown = (folder / "table12-mini.md").read_text()
    assert "2 steps, guidance 1.5, seed 0, float32" in markdown
    assert "Not run yet: 2 runs of 4." in markdown
    images = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").rglob("*.png")}

    assert "attributing" in caplog.text
    caplog.clear()
    monkeypatch.setattr(Accuracy, "version", 2)
    make(cfg, given)
    assert "taken from" in caplog.text  # the edit
    assert "attributing" not in caplog.text
    again = (folder / "table12-mini.md").read_text()
    assert "/v2" in again
    assert "/v2" not in markdown
    assert {path: path.stat().st_mtime_ns for path in images} == images
    assert len(list((tmp_path / "runs").glob("mini-*"))) == 4

    table = composed_table(12, "mini")
    names = RunNames(tmp_path / "runs")
    runs = [names.find(run, unasked) for run in table.list_runs(more)]
    assert [run.state for run in runs] == ["missing", "missing", "done", "done"]
    cells = line(table, runs, cfg.paths)
    assert cells[:5] == ["Table 12", "mini", "2", "2", "0"]
    assert cells[5] == "–"  # the time of debug=tiny tells nothing
    config = next((tmp_path / "runs").glob("mini-parachute-amplify-*/config.yaml"))
    config.write_text(config.read_text().replace("quick:", "quick: {}\nwas:"))
    editing_seconds.cache_clear()
    assert line(table, runs, cfg.paths)[5].endswith(" s")  # one of the two was amplified before
    assert cells[-1] == "made"
    (tmp_path / "runs" / ".names.json").unlink()
    names = RunNames(tmp_path / "runs")
    with composer() as composed:
        assert names.find(runs[2], composed).result == runs[2].result
    names.save()
    assert RunNames(tmp_path / "runs").find(runs[2], unasked).result == runs[2].result


def test_names_are_forgotten_when_code_or_options_change(tmp_path: Path) -> None:
    file = tmp_path / "conf" / "edit" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("a: 1")
    names = RunNames(tmp_path / "runs", [str(tmp_path / "conf")])
    run = composed_table(12, "mini").list_runs()[0]
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "manifest.json").touch()
    names.note(run, "x")
    names.save()
    assert names.find(run, unasked).result == tmp_path / "runs" / "x"
    for damaged in ("[]", "{}", "5", "{"):
        (tmp_path / "runs" / ".names.json").write_text(damaged)
        assert RunNames(tmp_path / "runs", [str(tmp_path / "conf")]).find(run, unasked) == run
    file.write_text("a: 22")
    assert RunNames(tmp_path / "runs", [str(tmp_path / "conf")]).find(run, unasked).result is None


def test_figures_are_made_end_to_end_and_reported(tmp_path: Path, weights: Path) -> None:
    common = ["model=mini", "making.fast=true", *passed(weights, tmp_path), "images_per_class=1"]
    for name, part in (
        ("figure7", "concept=church ratio=0.01,0.02"),
        ("figure3", "edit=uce"),
        ("components", "sign=positive"),
    ):
        given = [f"figure={name}", f'making.filter="{part}"', *common]
        make(compose(given), given)
    folder = tmp_path / "reproduction"
    curves = pd.read_csv(folder / "figure7-mini-fast.csv")
    assert set(curves["ratio"]) == {0.01, 0.02}
    grid = pd.read_csv(folder / "figure3-mini-fast.csv")
    assert list(grid["group"]) == ["church", "parachute"]  # one image of each
    places = pd.read_csv(folder / "components-mini-fast.csv")
    assert places["share"].sum() == pytest.approx(100)
    assert places["expected"].sum() == pytest.approx(100)
    for name in ("figure7", "figure3", "components"):
        for ending in ("png", "pdf", "svg", "md", "html", "json"):
            assert (folder / f"{name}-mini-fast.{ending}").stat().st_size
    page = write_report(folder, "mini", tmp_path / "none", shipped=tmp_path / "none").read_text()
    assert page.index("figure7-mini-fast") < page.index("components-mini-fast")
    assert page.count("data:image/webp;base64,") == 3


def test_the_zoo_has_every_edit_of_a_table_and_each_fits(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup, "CONF", CONF)
    more = [*passed(weights, tmp_path), "limit=4"]
    given = ["table=table12", "model=mini", 'making.filter="concept=parachute edit=amplify"', *more]
    make(compose(given), given)
    paths = [each for each in more if each.startswith("paths.")]
    options = f"overrides=[{','.join(repr(each) for each in more if each not in paths)}]"
    program = REPOSITORY / "experiments" / "tables" / "zoo.py"
    ended = programs.call(program, "model=mini", *paths, options)
    assert ended.returncode == 0, ended.stderr
    folder = tmp_path / "mini" / "zoo"
    index = read_json(folder / "index.json")
    assert ([each["concepts"] for each in index["edits"]], index["left_out"]) == (
        [["parachute"]],
        [],
    )
    readme = (folder / "README.md").read_text()
    table = composed_table(12, "mini")
    runs = [RunNames(tmp_path / "runs").find(run, unasked) for run in table.list_runs(more)]
    done = [run for run in runs if run.result]
    model = prepare(compose(done[0].overrides)).model.load()
    before = parameter_digest(model.denoiser)
    for each in index["edits"]:
        assert each["sha256"] == file_digest(folder / each["file"])
        assert f"`{each['sha256']}`" in readme
        assert "Table 12: concept=parachute edit=amplify" in each["shown"]
        assert {row["state"] for row in each["measured"]} == {"before", "after"}
        with cad.load(folder / each["file"]).applied(model):
            assert parameter_digest(model.denoiser) != before

    monkeypatch.setattr(zoo, "LIMIT", 0)
    found = zoo.distinct_edits([(table, runs)])
    readme = zoo.write_zoo(folder, found, model, "weights").read_text()
    assert not list(folder.glob("*.safetensors"))
    assert readme.partition("Left out:")[2].count("bytes, more than 0") == len(found) == 1
    empty = programs.call(program, "model=mini", f"paths.results={tmp_path / 'none'}")
    assert (empty.returncode, "has no finished run" in empty.stderr) == (2, True)


@pytest.mark.parametrize("content", ["[]", "{", "{}", '{"seconds": null}'])
def test_a_damaged_cost_is_left_out_of_the_times(tmp_path: Path, content: str) -> None:
    for place, told in enumerate(('{"seconds": 3}', content)):
        folder = tmp_path / f"mini-church-erase-{place}"
        folder.mkdir()
        (folder / "cost.json").write_text(told)
        (folder / "config.yaml").write_text("x: 1\nquick: {}\n")
    assert editing_seconds(tmp_path, "mini", "erase") == 3
