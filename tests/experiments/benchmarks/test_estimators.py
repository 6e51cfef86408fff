"""Estimators are tried in turns, their costs are counted, and equal quality is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import DictConfig
from torch.utils.flop_counter import FlopCounterMode

from cad.attribution import Attribution
from cad.concepts import Concept
from cad.edits import ScoredEdit
from cad.errors import UserError
from cad.models.stable_diffusion import StableDiffusionModel
from cad.objectives import EraseObjective
from experiments.benchmarks import estimators
from experiments.benchmarks.estimator_report import (
    cost_table,
    draw,
    equal_quality_table,
    summarise,
)
from experiments.run.experiment import prepare

SMALL = (
    "rounds=2",
    "model.attribution.steps=2",
    "model.attribution.batch_size=2",
    "references.deterministic.samples=3",
    "references.stochastic.samples=3",
    "~estimators.shared_deterministic",
    "~estimators.shared_25_steps",
    "~estimators.shared_10_steps",
    "~estimators.shared_5_steps",
    "~estimators.shared_3_steps",
    "~estimators.early_5_of_15_steps",
    "estimators.restart.samples=[1]",
    "estimators.shared.samples=[3]",
)

Configure = Callable[..., DictConfig]


def test_trials_are_measured_in_turns_and_kept(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimators, "peak_memory_mb", lambda *_: 1.0)
    monkeypatch.setattr(estimators, "matrix_rate", lambda *_: 1e9)
    config = configure("estimators", *SMALL)
    kept = []
    for _ in range(2):
        estimators.main.__wrapped__(config)  # without Hydra's command line
        kept.append(json.loads((tmp_path / "bench" / "estimators.json").read_text())["rows"])
    first, again = kept
    assert [row["round"] for row in first] == [0, 0, 1, 1]
    for row in first:
        assert not row["cached"]
        assert row["seconds"] > 0
        assert -1 <= row["rank_correlation.deterministic"] <= 1
        assert 0 <= row["mask_overlap.stochastic"] <= 1
    assert all(row["cached"] for row in again)
    assert [row["seconds"] for row in again] == [row["seconds"] for row in first]
    assert (tmp_path / "bench" / "estimators.png").stat().st_size > 0
    assert "restart, 1" in (tmp_path / "bench" / "estimators_equal_quality.md").read_text()


def test_flops_are_those_of_the_whole_attribution(
    tiny_model: StableDiffusionModel, parachute: Concept
) -> None:
    objective = EraseObjective(parachute)
    flops = estimators.flop_counter(tiny_model, objective, Attribution())
    ways = ("shared", "all"), ("shared", "middle"), ("restart", "all"), ("restart", "late")
    for trajectory, stage in ways:
        whole = Attribution(steps=3, samples=2, batch_size=2, trajectory=trajectory, stage=stage)
        with FlopCounterMode(display=False) as counter:
            whole.scores(tiny_model, objective)
        assert flops(whole) == pytest.approx(counter.get_total_flops(), rel=0.02)  # prompts aside


def test_memory_is_that_of_a_process_of_its_own(configure: Configure) -> None:
    experiment = prepare(configure("estimators", *SMALL))
    method = experiment.method
    assert isinstance(method, ScoredEdit)
    objective = method.objective(experiment.concepts[0])
    short = estimators.shorten(replace(method.attribution, steps=3, stage="late"))
    assert (short.steps, short.samples) == (2, 2)
    assert estimators.peak_memory_mb(experiment.model, objective, short) > 0


def test_a_machine_has_a_rate(tiny_model: StableDiffusionModel) -> None:
    assert estimators.matrix_rate(tiny_model.device, tiny_model.dtype) > 1e8  # FLOP/s


def test_the_cheapest_as_good_is_found() -> None:
    rows = pd.DataFrame(
        {
            "estimator": ["restart", "shared", "shared"],
            "samples": [1, 2, 4],
            "seconds": [80.0, 4.0, 8.0],
            "tflop": [2.0, 0.1, 0.2],
            "memory_mb": [1.0, 1.0, 2.0],
            "rank_correlation.truth": [0.5, 0.4, 0.6],
            "mask_overlap.truth": [0.7, 0.4, 0.6],
        }
    )
    summary = summarise(rows)
    ranks, masks = equal_quality_table(summary, ["truth"], "restart").to_dict("records")
    assert (ranks["cheapest"], ranks["times faster"]) == ("shared, 4", "10.0")
    assert (masks["quality"], masks["cheapest"]) == ("0.700", "–")
    table = cost_table(summary, ["truth"], 1e11, "restart")
    assert list(table["faster"]) == ["1.0", "20.0", "10.0"]
    assert list(table["of the matrix rate, %"]) == ["25", "25", "25"]
    assert draw(summary, "truth").startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "override", ["baseline=other", "estimators.restart.samples=[2]", "~estimators.restart"]
)
def test_a_baseline_must_be_tried(configure: Configure, override: str) -> None:
    with pytest.raises(UserError, match=r"baseline=\w+ needs estimators\.\w+\.samples=\[1\]"):
        estimators.list_trials(configure("estimators", override), Attribution())


def test_an_unknown_setting_is_refused(configure: Configure) -> None:
    config = configure("estimators", *SMALL, "+estimators.shared.antithetic=true")
    with pytest.raises(UserError, match="antithetic"):
        estimators.list_trials(config, Attribution())


def test_every_round_has_a_seed_of_its_own(configure: Configure) -> None:
    trials = estimators.list_trials(configure("estimators", *SMALL), Attribution(seed=7))
    assert {(trial.round, trial.attribution.seed) for trial in trials} == {(0, 7), (1, 8)}
    assert {trial.attribution.eta for trial in trials} == {0.0, 1.0}
