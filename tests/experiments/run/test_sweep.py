"""A multirun's summary: one row per run, a plot only where ratios were swept."""

from __future__ import annotations

import itertools
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from results_fixture import write_result

from experiments.run.command_line import note
from experiments.run.curves import draw_edits
from experiments.run.pictures import CELL, GAP, LABEL, MARGIN, side_by_side
from experiments.run.rendering import tidy
from experiments.run.results import read_json
from experiments.run.sweep import (
    edit_series,
    over_seeds,
    ratio_series,
    shown_together,
    summarise,
)

RATIOS = (0.005, 0.01, 0.02)


def sweep(tmp_path: Path, *runs: tuple[str, float | None]) -> Path:
    folder = tmp_path / "sweep"
    for number, (concept, ratio) in enumerate(runs):
        job = folder / str(number)
        job.mkdir(parents=True)
        note(job, write_result(tmp_path / "runs", concept=concept, ratio=ratio))
    assert summarise(folder)
    return folder


def test_ratios_are_tabulated_and_plotted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = sweep(tmp_path, *(("church", ratio) for ratio in RATIOS))
    frame = pd.read_csv(folder / "sweep.csv")
    assert sorted(frame["ratio"].unique()) == list(RATIOS)
    assert len(frame) == len(RATIOS) * 4  # two scopes, before and after
    table = (folder / "table.md").read_text()
    assert table.count("95.0 → 5.0 [0.9, 23.6]") == len(RATIOS)
    assert table.startswith("3 runs: model miniature, concept church, edit CAD-Erase,")
    for name in ("ratio  ", "accuracy, target", "accuracy, others"):
        assert name in table
    assert (folder / "plot.png").stat().st_size > 0
    assert (folder / "plot.pdf").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "3 runs" in printed
    assert max(len(line) for line in printed.splitlines()) <= 80


def test_runs_that_differ_in_their_seeds_alone_are_one_row(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    for number, (ratio, seed) in enumerate(itertools.product((0.01, 0.02), (0, 1, 3))):
        (folder / str(number)).mkdir(parents=True)
        note(folder / str(number), write_result(tmp_path / "runs", ratio=ratio, seed=seed))
    assert summarise(folder)
    assert len(pd.read_csv(folder / "sweep.csv")) == 6 * 4
    table = (folder / "table.md").read_text()
    assert table.startswith("6 runs: model miniature, concept parachute, edit CAD-Erase,")
    assert "seed 0, 1, 3; mean ± standard deviation over seeds" in table
    assert table.count("96.3 → 6.3 ± 1.5") == 2  # of 5, 6 and 8
    metrics = [read_json(path) for path in (tmp_path / "runs").glob("*/metrics.json")]
    assert over_seeds([*metrics, metrics[0]]) == [*metrics, metrics[0]]  # a seed twice: of what?


def test_other_sweeps_have_a_table_but_no_plot(tmp_path: Path) -> None:
    folder = sweep(tmp_path, ("church", 0.01), ("tench", 0.01), ("face", None))
    assert (folder / "table.md").exists()
    assert not (folder / "plot.png").exists()


def test_methods_on_the_same_images_stand_side_by_side(tmp_path: Path) -> None:
    results = [write_result(tmp_path, concept="church", ratio=ratio) for ratio in (None, 0.01, 0.2)]
    height = LABEL + 2 * (CELL + GAP)
    for shade, result in enumerate(results):
        size = (MARGIN + 2 * (CELL + GAP), height - (CELL + GAP) * (shade == 0))
        Image.new("RGB", size, (50 * shade,) * 3).save(result / "before_after.png")
    frame = pd.concat([tidy(result) for result in results[:2]])
    ((name, group),) = edit_series(frame).items()
    assert (name, list(group["edit"])) == ("Church: accuracy", ["none"] * 2 + ["erase"] * 2)
    (panel,) = draw_edits({name: group}).axes
    names = [label.get_text() for label in panel.get_yticklabels()]
    assert names == ["Original", "CAD-Erase"]
    (shown,) = shown_together(results).values()
    assert list(shown) == ["Original", "CAD-Erase\n0.01", "CAD-Erase\n0.2"]
    side_by_side(shown, tmp_path / "church.png")
    with Image.open(tmp_path / "church.png") as picture:
        assert picture.height == LABEL + 3 * (CELL + GAP)
        rows = [picture.getpixel((picture.width - 9, LABEL + n * (CELL + GAP))) for n in range(3)]
    assert rows == [(0, 0, 0), (50, 50, 50), (100, 100, 100)]


def test_each_concept_is_a_series_of_its_own(tmp_path: Path) -> None:
    results = [
        write_result(tmp_path, concept=concept, ratio=ratio)
        for concept in ("church", "tench")
        for ratio in RATIOS
    ]
    frame = pd.concat([tidy(result) for result in results])
    assert list(ratio_series(frame)) == ["Church", "Tench"]


def test_what_finished_is_summarised_though_a_job_failed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "sweep"
    for number, ratio in enumerate(RATIOS):
        (folder / str(number)).mkdir(parents=True)
        if ratio == RATIOS[0]:
            note(folder / str(number), error="ratio.value=0.005 chooses nothing")
        else:
            note(folder / str(number), write_result(tmp_path, ratio=ratio))
    assert not summarise(folder)
    assert sorted(pd.read_csv(folder / "sweep.csv")["ratio"].unique()) == list(RATIOS[1:])
    assert "run 0 of the sweep failed: ratio.value=0.005 chooses nothing" in caplog.text


def test_jobs_without_a_result_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    (folder / "0").mkdir(parents=True)
    summarise(folder)
    assert not (folder / "table.md").exists()
