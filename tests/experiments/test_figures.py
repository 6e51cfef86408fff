"""Figures out of results written by hand, and every figure of conf/ in every version."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hydra.utils import get_class
from PIL import Image
from results_fixture import write_result
from tables_fixture import compose_tables

from cad.errors import UserError
from evaluation.image_sets import ImageSet
from evaluation.prompts import Prompt
from experiments.composing import composer
from experiments.figures import grid
from experiments.figures.components import ComponentPlaces
from experiments.figures.effects import EffectScatter
from experiments.figures.figure import Drawing, Figure, read_figure
from experiments.figures.grid import EditGrid
from experiments.figures.making import make_figure
from experiments.figures.ratios import RatioCurves, mean_over_concepts
from experiments.figures.style import save
from experiments.frames import tidy
from experiments.items.overview import Plan
from experiments.items.plan import Run, State
from experiments.make import every_item
from experiments.results import ResultFolder

FIGURES = every_item("figure")
VERSIONS = [(None, False), ("mini", False), ("mini", True)]


def composed_figure(name: str, model: str | None = None, *, fast: bool = False) -> Figure:
    return read_figure(compose_tables(f"figure={name}").figure, model, fast)


def run_of(folder: Path) -> Run:
    """A finished run whose folder that is."""
    label, _, digest = folder.name.rpartition("-")
    return Run((folder.name,), State.DONE, "", None, ResultFolder(folder.parent, label, digest))


def amended(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The result with another metrics.json."""
    path = folder / "metrics.json"
    metrics = json.loads(path.read_text())
    change(metrics)
    path.write_text(json.dumps(metrics))
    return folder


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize(("model", "fast"), VERSIONS)
def test_every_figure_is_read_in_every_version(name: str, model: str | None, fast: bool) -> None:
    figure = composed_figure(name, model, fast=fast)
    assert isinstance(figure.drawing, Drawing)
    assert figure.stem == name
    assert list(figure.sweep.places())
    if fast:
        assert any(note.startswith("Fast: ") for note in figure.sweep.notes)
        assert figure.name == f"{name}-mini-fast"


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_draws_with_a_class_of_its_own_module(name: str) -> None:
    target = composed_figure(name).config.drawing["_target_"]
    assert issubclass(get_class(target), Drawing)


def test_what_the_miniatures_pictures_show_is_made_for_tables() -> None:
    def runs(item: Any) -> set[tuple[str, ...]]:
        return {tuple(sorted(item.sweep.overrides(place))) for place in item.sweep.places()}

    from tables_fixture import composed_table

    for name, number in (("objects", 1), ("explicit", 2), ("styles", 5), ("amplified", 6)):
        for fast in (False, True):
            shown = runs(composed_figure(f"qualitative_{name}", "mini", fast=fast))
            assert shown <= runs(composed_table(number, "mini", fast=fast)), name


def test_unknown_keys_and_models_are_named() -> None:
    with pytest.raises(UserError, match=r"model=sdxl: Figure 7 is of sd14; .* model=mini"):
        composed_figure("figure7", "sdxl")
    with pytest.raises(UserError, match=r"fast=true is the miniature's: Figure 2"):
        composed_figure("figure2", fast=True)


def test_ratio_curves_have_a_panel_each_and_the_mean(tmp_path: Path) -> None:
    runs = [
        ({"concept": concept}, run_of(write_result(tmp_path, concept=concept, ratio=ratio)))
        for concept in ("church", "tench")
        for ratio in (0.01, 0.02)
    ]
    drawn = RatioCurves().draw(runs)
    titles = [panel.get_title() for panel in drawn.canvas.axes if panel.get_title()]
    assert titles == ["church", "tench", "mean of 2"]
    mean = drawn.data[drawn.data["concept"] == "mean"]
    assert len(mean) == 2 * 2 * 2  # ratios, scopes, states
    after = mean[(mean["scope"] == "target") & (mean["state"] == "after")]
    assert list(after["value"]) == [5.0, 5.0]
    assert list(after["n"]) == [40, 40]
    assert save(drawn.canvas) == save(drawn.canvas)  # the same bytes


def test_the_mean_is_of_all_concepts_or_none(tmp_path: Path) -> None:
    frame = pd.concat(
        [tidy(write_result(tmp_path, concept=c, ratio=r)) for c, r in (("church", 1), ("face", 2))]
    )
    assert mean_over_concepts(frame) is None
    assert mean_over_concepts(frame[frame["concept"] == "church"]) is None


def test_effects_are_points_with_their_correlation(tmp_path: Path) -> None:
    folder = write_result(tmp_path, effect=True)
    (folder / "effects.csv").write_text("predicted,measured\n1,2\n2,4\n3,6.5\n4,8\n")
    drawn = EffectScatter().draw([({"concept": "parachute"}, run_of(folder))])
    (title,) = (panel.get_title() for panel in drawn.canvas.axes)
    assert title == "parachute: r = 0.996, n = 4"
    assert drawn.says[0].startswith("parachute: Pearson r 0.996 [0.8")
    assert "4 random ablations of 0.1 % of the weights" in drawn.says[0]
    assert len(drawn.data) == 4


def test_places_of_components_are_shares(tmp_path: Path) -> None:
    weights = [
        {"name": "up_blocks.0.ff.net.2.weight", "changed": 6, "of": 100},
        {"name": "down_blocks.0.ff.net.2.weight", "changed": 2, "of": 300},
    ]

    def whole(metrics: dict[str, Any]) -> None:
        metrics["edit"] |= {"per": "model", "weights": weights}

    folder = amended(write_result(tmp_path / "a"), whole)
    runs = [({"sign": "positive"}, run_of(folder)), ({"sign": "negative"}, run_of(folder))]
    drawn = ComponentPlaces().draw(runs)
    assert list(drawn.data["share"]) == [75.0, 25.0] * 2
    assert list(drawn.data["expected"]) == [25.0, 75.0] * 2
    labels = [label.get_text() for label in drawn.canvas.axes[0].get_yticklabels()]
    assert labels == ["down.0.ff.net.2", "up.0.ff.net.2"]  # the way through the network
    assert "densest in up_blocks.0.ff.net.2.weight: 75.0 %" in drawn.says[1]
    with pytest.raises(UserError, match=r"ratio\.per=model"):
        ComponentPlaces().draw([({"sign": "positive"}, run_of(write_result(tmp_path / "b")))])


PROMPTS = tuple(Prompt(f"a {group}", i, group) for i in range(3) for group in ("church", "tench"))


def image_set(folder: Path, value: int) -> ImageSet:
    folder.mkdir(parents=True)
    images = ImageSet(folder, PROMPTS)
    for index in range(len(PROMPTS)):
        Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(images.path(index))
    return images


def test_grids_have_a_column_for_each_edit_and_the_unedited_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = image_set(tmp_path / "before", 10)
    sets = {"uce": {"before": before, "after": image_set(tmp_path / "after", 200)}}
    sets["none"] = {"before": before}
    runs = []
    for edit in ("none", "uce"):
        folder = write_result(tmp_path / edit, concept="church", ratio=None)
        lines = [
            {"metric": "accuracy", "state": "before", "index": i, "correct": i != 2}
            for i in range(len(PROMPTS))
        ]
        (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        runs.append(({"concept": "church", "edit": edit}, run_of(folder)))
    by_folder = {run.folder: sets[place["edit"]] for place, run in runs}
    monkeypatch.setattr(grid, "concept_images", lambda run: by_folder[run.folder])
    drawn = EditGrid(targets=2, others=1).draw(runs)
    assert list(drawn.data["group"]) == ["church", "church", "tench"]
    assert [panel.get_title() for panel in drawn.canvas.axes[:2]] == ["unedited", "uce"]
    shown = [panel.images[0].get_array().mean() for panel in drawn.canvas.axes]
    assert shown == [10, 200] * 3
    failed = EditGrid(targets=2, others=0, failures=True).draw(runs)
    assert list(failed.data["index"]) == [2]
    for run in (run for _, run in runs):
        (run.folder / "records.jsonl").write_text("")
    with pytest.raises(UserError, match="no prompt is left"):
        EditGrid(targets=2, others=0, failures=True).draw(runs)


def test_a_run_without_images_cannot_be_shown(tmp_path: Path) -> None:
    run = run_of(write_result(tmp_path))
    with pytest.raises(LookupError):
        grid.concept_images(run)
    with composer() as compose:
        cfg = compose("config", ["prompts=objects_and_face", "images_per_class=20"])  # 220
        assert set(grid.concept_images(replace(run, cfg=cfg))) == {"before", "after"}
        fewer = compose("config", ["prompts=objects_and_face", "images_per_class=3"])
        with pytest.raises(UserError, match="has no images of all"):
            grid.concept_images(replace(run, cfg=fewer))


def test_a_figure_of_nothing_is_a_dash(tmp_path: Path) -> None:
    figure = composed_figure("figure7", "mini", fast=True)
    runs = tuple((place, Run(("x",), State.MISSING)) for place in figure.sweep.places())
    rendered = make_figure(compose_tables(), figure, Plan(figure, runs, runs), {})
    assert "png" not in rendered.files
    assert f"Not run yet: {len(runs)} runs of {len(runs)}." in rendered.notes
