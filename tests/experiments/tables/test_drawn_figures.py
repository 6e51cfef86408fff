"""Figures out of results written by hand."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tables_fixture import composed_figure, finished_run, row

from cad.attribution import FORMAT
from cad.errors import UserError
from cad.store import Store, write_tensors
from cad.weight_edit import WeightEdit
from evaluation.evaluators.base import Metric
from experiments.run.curves import save
from experiments.run.rendering import tidy
from experiments.run.results import read_json, write_json
from experiments.tables.exhibit import Figure, ListedRun
from experiments.tables.figures.components import draw_components
from experiments.tables.figures.drawing import render_figure
from experiments.tables.figures.effects import draw_effects
from experiments.tables.figures.faithfulness import draw_faithfulness
from experiments.tables.figures.grid import draw_grid
from experiments.tables.figures.ratios import draw_curves, mean_over_concepts
from experiments.tables.figures.robustness import draw_robustness, harmonic
from experiments.tables.figures.stages import draw_stages

STATES = {"before": (95.0, 76.4, 99.1), "after": (5.0, 0.9, 23.6)}
GROUPS = ("church", "tench")
USES = {"concept": GROUPS * 3, "general": ("beach", "skyline")}  # what images measure: their groups


def measured(runs: Path, concept: str = "church", ratio: float = 0.01) -> ListedRun:
    """A run with an accuracy of both scopes before and after."""
    rows = [
        row(*numbers, scope=scope, state=state, n=20)
        for state, numbers in STATES.items()
        for scope in ("target", "others")
    ]
    return finished_run(runs, f"mini-{concept}-{ratio}", rows, concept=concept, ratio=ratio)


def test_ratio_curves_have_a_panel_each_and_the_mean(tmp_path: Path) -> None:
    runs = [measured(tmp_path, concept, ratio) for concept in GROUPS for ratio in (0.01, 0.02)]
    drawing = draw_curves(runs)
    titles = [panel.get_title() for panel in drawing.canvas.axes if panel.get_title()]
    assert titles == ["Church", "Tench", "mean of 2"]
    mean = drawing.data[drawing.data["concept"] == "mean"]
    assert len(mean) == 2 * 2 * 2  # ratios, scopes, states
    after = mean[(mean["scope"] == "target") & (mean["state"] == "after")]
    assert list(after["value"]) == [5.0, 5.0]
    assert list(after["n"]) == [40, 40]
    assert save(drawing.canvas) == save(drawing.canvas)  # the same bytes


def test_the_mean_is_of_all_concepts_or_none(tmp_path: Path) -> None:
    runs = [measured(tmp_path, "church", 0.1), measured(tmp_path, "face", 0.2)]
    frame = pd.concat([tidy(run.folder) for run in runs])
    assert mean_over_concepts(frame) is None
    assert mean_over_concepts(frame[frame["concept"] == "church"]) is None


def test_effects_are_points_with_their_correlation(tmp_path: Path) -> None:
    effect = {"count": 4, "share": 0.001, "pearson_r": 0.996}
    run = finished_run(tmp_path, "x", [], concept="parachute", effect=effect)
    (run.folder / "effects.csv").write_text("predicted,measured\n1,2\n2,4\n3,6.5\n4,8\n")
    drawing = draw_effects([run])
    (title,) = (panel.get_title() for panel in drawing.canvas.axes)
    assert title == "Parachute: r = 0.996, n = 4"
    assert drawing.says[0].startswith("parachute: Pearson r 0.996 [0.8")
    assert "4 random ablations of 0.1 % of the weights" in drawing.says[0]
    assert len(drawing.data) == 4


def scored_runs(tmp_path: Path, *, with_effects: bool = False) -> list[ListedRun]:
    """Runs of two concepts at three shares by two kinds of scores."""
    heights = {  # (class, others) at each share, by scores
        "erase": {0.01: (80, 90), 0.1: (20, 80), 1.0: (0, 40)},
        "random": {0.01: (90, 90), 0.1: (90, 80), 1.0: (50, 40)},
    }
    runs = []
    for concept, (scores, curve) in itertools.product(GROUPS, heights.items()):
        for ratio, (target, others) in curve.items():
            if (concept, scores, ratio) == ("tench", "random", 1.0):
                continue  # not run: the concept counts for no area of it
            rows = [
                row(value, value - 5, value + 5, scope=scope, state="after")
                for scope, value in (("target", target), ("others", others))
            ]
            rows += [{**each, "state": "before", "value": 95} for each in rows]
            place = {"scores": scores, "concept": concept}
            name = f"{concept}-{scores}-{ratio}"
            effect = {"seeds": 2, "unedited": 4.0, "predicted": -8.0 * ratio, "overlap": 0.5}
            effect["measured"] = -4.0 * ratio if ratio == 1.0 else -8.0 * ratio
            given = {"place": place, "concept": concept, "ratio": ratio}
            given |= {"effect": effect} if with_effects and scores == "erase" else {}
            runs.append(finished_run(tmp_path, name, rows, **given))
    return runs


def test_faithfulness_is_the_area_over_the_logarithm_of_the_share(tmp_path: Path) -> None:
    runs = scored_runs(tmp_path)
    drawing = draw_faithfulness(runs)
    assert drawing.table is not None
    assert drawing.table.to_numpy().tolist() == [
        # (80 + 20) / 2 and (20 + 0) / 2, each over half the span
        ["CAD-Erase", "30.0 [30.0, 30.0]", "72.5 [72.5, 72.5]", "42.5 [42.5, 42.5]", "2"],
        ["Random weights", "80.0 [80.0, 80.0]", "72.5 [72.5, 72.5]", "-7.5 [-7.5, -7.5]", "1"],
    ]
    panel = drawing.canvas.axes[0]
    assert [line.get_label() for line in panel.lines] == ["unedited", "CAD-Erase", "Random weights"]
    assert list(panel.lines[1].get_ydata()) == [80, 20, 0]
    figure = composed_figure("faithfulness", "mini", fast=True)
    figure.drawing = {"_target_": "experiments.tables.figures.faithfulness.draw_faithfulness"}
    markdown = render_figure(figure, runs).files["md"].decode()
    assert re.search(r"\| CAD-Erase +\| 30\.0 \[30\.0, 30\.0\] +\| 72\.5", markdown)


def test_faithfulness_has_predicted_effects_and_overlaps_too(tmp_path: Path) -> None:
    runs = scored_runs(tmp_path, with_effects=True)
    drawing = draw_faithfulness(runs)
    assert drawing.table is not None
    assert [list(row)[-2:] for row in drawing.table.to_numpy()] == [
        ["100 to 50", "50 to 50"],
        2 * ["–"],
    ]
    predicted, measured = drawing.canvas.axes[2].lines
    np.testing.assert_allclose(predicted.get_ydata(), [-2, -20, -200])
    np.testing.assert_allclose(measured.get_ydata(), [-2, -20, -100])
    own = drawing.data[drawing.data["scores"] == "erase"]
    assert own["overlap"].eq(50).all()
    assert save(draw_faithfulness(runs).canvas) == save(draw_faithfulness(runs).canvas)


def test_places_and_stages_are_shares_of_stored_scores(tmp_path: Path) -> None:
    store, runs = Store(tmp_path / "scores"), []
    up = "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.2.weight"
    for stage, (first, second) in {"early": (6, 2), "middle": (2, -3), "late": (0, -1)}.items():
        place_ = {"concept": "church", "stage": stage}
        runs.append(finished_run(tmp_path / "runs", stage, [], place=place_))
        key = {"version": 2, "model": {"id": "x"}, "objective": {}, "attribution": {"stage": stage}}
        key |= {"device": "cpu", "versions": {}}
        scores = {"mid_block.resnets.0.conv1.weight": torch.tensor([[float(first)]])}
        write_tensors(store.path(key), scores | {up: torch.tensor([[second, 0.0]])}, {}, FORMAT)
        settings = {"attribution": {"version": 2, "stage": stage}, "objectives": [{}]}
        told = {"settings": settings, "model": {"id": "x"}, "device": "cpu", "versions": {}}
        WeightEdit({}, told).save(runs[-1].folder / "edit.safetensors")
        (runs[-1].folder / "config.yaml").write_text("paths: {scores: /x/scores, runs: /x/runs}")
    drawing = draw_stages(runs)
    assert drawing.table is not None
    assert drawing.table.to_numpy().tolist() == [
        ["mid conv1", "33.3", "60.0", "20.0", "0.0", "0.0", "0.0", "0.0"],
        ["up 1 ff.net.2", "66.7", "20.0", "0.0", "0.0", "0.0", "75.0", "25.0"],
    ]
    assert list(drawing.table.columns[:3]) == ["place", "of the weights, %", "positive, early, %"]
    assert drawing.data.groupby("sign")["share"].sum().tolist() == [100, 100]
    with pytest.raises(UserError, match="no concept has the scores of all stages"):
        draw_stages(runs[:2])
    store.path(key).unlink()
    with pytest.raises(UserError, match=r"the scores .* are gone"):
        draw_stages(runs)


def test_places_of_components_are_shares(tmp_path: Path) -> None:
    weights = [
        {"name": "up_blocks.0.ff.net.2.weight", "changed": 6, "of": 100},
        {"name": "down_blocks.0.ff.net.2.weight", "changed": 2, "of": 300},
    ]
    runs = []
    for sign in ("positive", "negative"):
        runs.append(finished_run(tmp_path, sign, [], place={"sign": sign}))
        path = runs[-1].folder / "metrics.json"
        metrics = read_json(path)
        metrics["edit"] |= {"per": "model", "weights": weights}
        write_json(path, metrics)
    drawing = draw_components(runs)
    assert list(drawing.data["share"]) == [75.0, 25.0] * 2
    assert list(drawing.data["expected"]) == [25.0, 75.0] * 2
    labels = [label.get_text() for label in drawing.canvas.axes[0].get_yticklabels()]
    assert labels == ["down.0.ff.net.2", "up.0.ff.net.2"]  # the way through the network
    assert "densest in up_blocks.0.ff.net.2.weight: 75.0 %" in drawing.says[1]
    other = finished_run(tmp_path, "other", [], place={"sign": "positive"})
    with pytest.raises(UserError, match=r"ratio\.per=model"):
        draw_components([other])


def judged(root: Path, edit: str, *, kind: str = "object") -> ListedRun:
    """A run with three images of two groups, and two of captions, in each state.

    The second church was not recognised before the edit.
    """
    values = {"before": 10} if edit == "none" else {"before": 10, "after": 200}
    records: list[dict[str, Any]] = []
    images: dict[str, dict[str, Any]] = {"concept": {}, "general": {}}
    for state, (use, groups) in itertools.product(values, USES.items()):
        folder = root / "images" / f"{use}-{state}"
        folder.mkdir(parents=True, exist_ok=True)
        images[use][state] = {"folder": folder.name, "count": len(groups), "broken": 0}
        for index, group in enumerate(groups):
            pixels = np.full((8, 8, 3), values[state], np.uint8)
            Image.fromarray(pixels).save(folder / f"{index:06d}.png")
            known = {"index": index, "prompt": f"a {group}", "seed": index, "group": group}
            score = {"score": 0.5} if use == "general" else {"correct": index != 2}
            origin = {"state": state, "metric": use, "images": folder.name}
            records.append(origin | known | score)
    run = finished_run(root / "runs", f"x-{edit}", [], edit=edit, records=records, images=images)
    (run.folder / "config.yaml").write_text(
        "paths: {images: /elsewhere/images, runs: /elsewhere/runs}\n"
        f"safety: {{mask: true}}\nconcept: {{kind: {kind}}}\n"
    )
    return run


def test_grids_have_a_column_for_each_edit_and_the_unedited_first(tmp_path: Path) -> None:
    runs = [judged(tmp_path, "none"), judged(tmp_path, "uce")]
    drawing = draw_grid(runs, targets=2, others={"tench": 1, "skyline": 1, "church": 9})
    assert list(drawing.data["group"]) == ["church", "church", "tench", "skyline"]
    assert list(drawing.data["index"]) == [0, 2, 1, 1]
    assert list(drawing.data.columns) == ["concept", "group", "prompt", "seed", "index"]
    assert [panel.get_title() for panel in drawing.canvas.axes[:2]] == ["Original", "UCE"]
    shown = [panel.images[0].get_array().mean() for panel in drawing.canvas.axes]
    assert shown == [10, 200] * 4
    with pytest.raises(UserError, match="no prompt is left"):
        draw_grid(runs, targets=0)
    bare = finished_run(tmp_path / "runs", "bare", [], images={})
    (bare.folder / "config.yaml").write_text("")
    with pytest.raises(UserError, match="has no images of its concept"):
        draw_grid([bare])


@pytest.mark.parametrize(
    ("recognised", "indices"), [(None, [0, 2, 4]), (False, [2]), (True, [0, 4])]
)
def test_the_concepts_rows_are_those_that_were_so_judged(
    recognised: bool | None, indices: list[int], tmp_path: Path
) -> None:
    drawing = draw_grid([judged(tmp_path, "uce")], 3, {"beach": 1}, recognised)
    assert list(drawing.data["index"]) == [*indices, 0]


def test_pictures_of_explicit_content_are_masked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "experiments.tables.figures.grid.Masker", lambda: lambda pixels: np.zeros_like(pixels)
    )
    drawing = draw_grid([judged(tmp_path, "uce", kind="explicit")], targets=1)
    assert [panel.images[0].get_array().mean() for panel in drawing.canvas.axes] == [0, 0]


def test_a_figure_of_nothing_is_a_dash() -> None:
    figure = composed_figure("figure7", "mini", fast=True)
    assert isinstance(figure, Figure)
    runs = figure.list_runs()
    rendering = render_figure(figure, runs)
    assert "png" not in rendering.files
    assert not any(rendering.filled.values())
    assert f"Not run yet: {len(runs)} runs of {len(runs)}." in rendering.notes


NEAR = {"tench": 30.0, "gas_pump": 50.0}


def robustness_run(
    runs: Path, edit: str, state: str, concept: str, target: float, **changed: Any
) -> ListedRun:
    rows = [
        row(value, value - 5, value + 5, scope=scope, n=20, **changed)
        for scope, value in (("target", target), ("others", 80.0))
    ]
    rows += [row(g, g, g, scope="group", group=name, n=20) for name, g in NEAR.items()]
    rows.append(row(90.0, 85.0, 95.0, state="before", n=20))
    place = {"model": "sd14", "concept": concept, "edit": edit, "state": state}
    return finished_run(runs, f"{edit}-{state}-{concept}", rows, place=place)


def test_robustness_ranks_by_the_harmonic_mean(tmp_path: Path) -> None:
    figure = composed_figure("robustness", "mini")
    assert isinstance(figure, Figure)
    fast = composed_figure("robustness", "mini", fast=True)
    assert all("attack.limit=4" in run.overrides for run in fast.list_runs())
    names = ("erased", "kept", "revived", "random signs (control)")
    quantities = {name: figure.drawing["quantities"][name] for name in names}
    states = {"edited": (20.0, 40.0), "revived": (60.0, 60.0), "random_signs": (30.0, 30.0)}
    runs = [
        robustness_run(tmp_path, "uce", state, concept, value)
        for state, values in states.items()
        for concept, value in zip(GROUPS, values, strict=True)
    ]
    runs += [robustness_run(tmp_path, "esd", each, "church", 10.0) for each in states]
    runs += [robustness_run(tmp_path, "erase", "edited", "church", 0.0)]
    drawing = draw_robustness(runs, quantities)
    assert drawing.table is not None
    assert list(drawing.table["method"]) == ["ESD", "UCE", "CAD-Erase"]
    uce = drawing.table.set_index("method").loc["UCE"]
    assert list(uce)[:4] == [
        "70.0 [66.5, 73.5]",
        "80.0 [76.5, 83.5]",
        "40.0 [36.5, 43.5]",
        "70.0 [66.5, 73.5]",
    ]
    assert uce["harmonic mean, %"].startswith(f"{3 / (1 / 70 + 1 / 80 + 1 / 40):.1f} [")
    assert drawing.table.set_index("method").loc["CAD-Erase", "harmonic mean, %"] == "–"
    assert uce["time, s"] == "12.3 [12.3, 12.3]"
    assert save(drawing.canvas) == save(drawing.canvas)
    assert "harmonic mean: of erased, kept, revived, its interval" in drawing.says[0]
    assert list(drawing.table)[-2:] == ["time, s", "harmonic mean, %"]
    assert [tick.get_text() for tick in drawing.canvas.axes[0].get_xticklabels()] == [*names[:3]]


def test_robustness_tells_neighbours_and_what_was_there_before(tmp_path: Path) -> None:
    groups = {"church": ["tench", "gas_pump"], "parachute": ["tench"]}
    near = {"state": "edited", "metric": "accuracy", "scope": "group", "gone": False}
    quantities = {
        "neighbours": near | {"groups": groups},
        "unedited": {"state": "edited", "metric": "accuracy", "when": "before", "control": True},
        "implicit": {"state": "implicit", "metric": "accuracy"},
    }
    concepts = ("church", "parachute")
    runs = [robustness_run(tmp_path, "uce", "edited", each, 0.0) for each in concepts]
    drawing = draw_robustness(runs, quantities)
    assert drawing.table is not None
    (found,) = drawing.table.to_dict("records")
    assert found["neighbours, %"].startswith("36.7 [")  # (30 + 50 + 30) / 3
    assert found["unedited, %"].startswith("10.0 [")
    assert "implicit, %" not in found
    assert drawing.says[1] == "Neighbours: of Church Tench and Gas pump; of Parachute Tench."


def test_implicit_prompts_are_the_miniature_s() -> None:
    def refused(model: str | None) -> set[str]:
        runs = composed_figure("robustness", model).list_runs()
        return {run.refused for run in runs if run.place["state"] == "implicit"}

    assert refused("mini") == {""}
    assert refused("sd14") == {"prompts=implicit is made for the miniature"}


def test_harmonic_means_interval_is_that_of_its_only_part(tmp_path: Path) -> None:
    metric = Metric("x", 50.0, 40.0, 70.0, 20, "%", 1, True, "test")
    assert harmonic([metric]) == (50.0, 40.0, 70.0)
    assert harmonic([metric, replace(metric, value=0.0)]).value == 0
