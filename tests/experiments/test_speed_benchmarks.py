"""Benchmarks of speed run whole, at the smallest size, and write what they measured."""

from __future__ import annotations

import json
from pathlib import Path

import hydra
import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from weights import write_weights

from cad.errors import UserError
from experiments.benchmarks import attacks, edits, evaluators, generation, growth
from experiments.benchmarks.measuring import alternate, medians, write_benchmark
from experiments.config import REPOSITORY, register_resolvers

CPU = ("device=cpu",)
GROWTH = (
    "works.attribution.base={steps: 2, samples: 2, width: 1}",
    "works.generation.base={steps: 2, images: 2, width: 1}",
    "works.attribution.grows={steps: [1, 2], samples: [1, 2], width: [1, 2]}",
    "works.generation.grows={steps: [1, 2], images: [1, 2], width: [1, 2]}",
)


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("miniature"))


@pytest.fixture
def small(miniature: Path, tmp_path: Path) -> tuple[str, ...]:
    """Overrides for one round on small weights, written below the test's folder."""
    places = (f"paths.miniature={miniature}", f"paths.results={tmp_path}")
    return ("rounds=1", "dtype=float32", *places)


def compose(name: str, *overrides: str) -> DictConfig:
    register_resolvers()
    with hydra.initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        return hydra.compose(f"benchmark_{name}", [*CPU, *overrides])


def run(program: object, config: DictConfig) -> None:
    program.main.__wrapped__(config)  # without Hydra's command line


def test_tasks_take_turns() -> None:
    calls: list[str] = []
    tasks = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = alternate(tasks, rounds=2)
    assert calls == ["a", "b", "a", "b", "a", "b"]  # the first of each is not counted
    assert {name: len(each) for name, each in seconds.items()} == {"a": 2, "b": 2}
    assert medians({"a": [3.0, 1.0, 2.0]}) == {"a": 2.0}


def test_a_benchmark_is_written_with_its_conditions(tmp_path: Path) -> None:
    table = pd.DataFrame([{"way": "fast", "ratio": "2.0"}])
    write_benchmark(tmp_path, "x", "Two ways", [{"seconds": 1.0}], torch.device("cpu"), table)
    kept = json.loads((tmp_path / "x.json").read_text())
    assert kept["rows"] == [{"seconds": 1.0}]
    assert kept["environment"]["load"] >= 0
    text = (tmp_path / "x.md").read_text()
    assert text.startswith("Two ways. ")
    assert f"{torch.get_num_threads()} threads" in text
    assert "| fast" in text


def test_an_edit_is_measured_from_selecting_to_loading(tmp_path: Path) -> None:
    small = ["model=sd14", "model.weights=random-small", "concept=church", "ratio.value=0.1"]
    config = compose("edits")
    config.models.sd14.overrides = small
    model, method, _ = edits.build(config, "sd14")
    row = edits.edit_costs(model, method, rounds=1)
    assert 0 < row["weights"] < 0.1 * row["may change"]
    assert row["file, MB"] > 0
    assert all(row[step] >= 0 for step in ("select", "apply", "undo", "save", "load"))


def test_a_sweep_costs_one_attribution(
    tiny_model: object, parachute: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cad.attribution import Attribution
    from cad.edits import CADErase
    from cad.selection import Selection

    method = CADErase(Attribution(steps=1, samples=1), Selection(0.1))
    calls: list[object] = []
    compute = edits.compute_scores
    monkeypatch.setattr(
        edits, "compute_scores", lambda *given: calls.append(given) or compute(*given)
    )
    config = OmegaConf.create({"ratios": [0.1, 0.2, 0.3], "rounds": 1})
    one, every, apart = edits.sweep_costs(tiny_model, method, method.objective(parachute), config)
    assert len(calls) == 4  # two tasks, each twice
    assert one["times one ratio"] == 1.0
    assert apart["seconds"] == pytest.approx(3 * one["seconds"], abs=0.02)
    assert every["seconds"] >= 0


def test_evaluators_are_measured_and_missing_ones_named(
    small: tuple[str, ...], tmp_path: Path
) -> None:
    config = compose(
        "evaluators",
        "evaluator=[accuracy,clip_score]",
        "images=4",
        *small,
        "model.classifier.folder=/nowhere",
    )
    run(evaluators, config)
    rows = {row["evaluator"]: row for row in read(tmp_path, "evaluators")["rows"]}
    assert float(rows["clip_score"]["images per second"]) > 0
    assert "/nowhere" in rows["accuracy"]["why"]


def test_three_ways_to_make_images(small: tuple[str, ...], tmp_path: Path) -> None:
    config = compose(
        "generation",
        "images_per_class=1",
        "model.sampler.steps=2",
        "model.sampler.batch_size=4",
        *small,
    )
    run(generation, config)
    kept = read(tmp_path, "generation")
    ways = [row[""] for row in kept["rows"]]
    assert ways == ["plain loop", "pipeline's batches", "generator"]
    assert kept["rows"][0]["ratio"] == 1.0


def test_attacks_in_batches_end_as_one_by_one(small: tuple[str, ...], tmp_path: Path) -> None:
    config = compose(
        "attacks",
        "prompts_attacked=2",
        "quick.iterations=1",
        "model.sampler.steps=2",
        *small,
    )
    run(attacks, config)
    kept = read(tmp_path, "attack_p4d")
    assert [row[""] for row in kept["rows"]] == ["one by one", "batched"]
    assert "2 of 2 end with the same tokens" in kept["caption"]


def test_growth_is_fitted_and_drawn(
    small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "in_a_process", growth.measured)  # here: a process takes seconds
    run(growth, compose("growth", *GROWTH, *small))
    rows = read(tmp_path, "growth")["rows"]
    assert len({row["series"] for row in rows}) == 6
    assert all(row["seconds"] > 0 for row in rows)
    assert (tmp_path / "bench" / "growth.png").stat().st_size > 0


def test_exponents_are_slopes() -> None:
    x = pd.Series([1.0, 2.0, 4.0])
    assert growth.slope(x, 3 * x**2) == pytest.approx(2.0)
    assert growth.slope(x, pd.Series(np.ones(3))) == pytest.approx(0.0, abs=1e-9)


def test_an_unknown_series_is_refused() -> None:
    with pytest.raises(UserError, match="matches none of the series: attribution against steps"):
        growth.chosen_points(compose("growth", "only=nothing"))


def read(results: Path, name: str) -> dict:
    return json.loads((results / "bench" / f"{name}.json").read_text())
