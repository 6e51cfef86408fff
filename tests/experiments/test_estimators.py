"""Estimators are tried in turns, their costs are counted, and the edits are commands of run.py."""

from __future__ import annotations

from pathlib import Path

import hydra
import pandas as pd
import pytest
from omegaconf import DictConfig
from torch.utils.flop_counter import FlopCounterMode
from weights import write_weights

from cad.attribution import Attribution
from cad.concepts import Concept
from cad.errors import UserError
from cad.models.stable_diffusion import StableDiffusionModel
from cad.objectives import EraseObjective
from experiments.benchmarks import estimator_effects, estimators
from experiments.benchmarks.estimator_costs import FlopCounts, matrix_rate, peak_memory_mb
from experiments.benchmarks.estimator_report import as_table, at_equal_quality, draw, summarise
from experiments.config import REPOSITORY, plain, register_resolvers
from experiments.items.plan import State, find_runs

SMALL = (
    "rounds=2",
    "effects.rounds=0",
    "model.attribution.steps=2",
    "model.attribution.batch_size=2",
    "references.released.samples=3",
    "references.stochastic.samples=3",
    "estimators.shared_25_steps.settings.steps=1",
    "estimators.shared_10_steps.settings.steps=1",
    *(
        f"estimators.{name}.samples=[1,2]"
        for name in ("restart", "shared_deterministic", "shared", "shared_25_steps")
    ),
    "estimators.shared_10_steps.samples=[3]",
)


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("miniature"))


def compose(*overrides: str) -> DictConfig:
    register_resolvers()
    with hydra.initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        return hydra.compose("benchmark_estimators", list(overrides))


def small(miniature: Path, results: Path, *overrides: str) -> DictConfig:
    places = (f"paths.miniature={miniature}", f"paths.results={results}")
    return compose(*SMALL, *places, "device=cpu", "dtype=float32", *overrides)


def test_trials_are_measured_in_turns_and_kept(
    miniature: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimators, "peak_memory_mb", lambda *_: 1.0)
    bench = estimators.Bench(small(miniature, tmp_path))
    trials = bench.trials()
    half = len(trials) // 2
    assert [each.round for each in trials] == half * [0] + half * [1]
    rows = list(estimators.measure(bench, trials, bench.references()))
    assert not any(row.cached for row in rows)
    for row in rows:
        assert row.seconds > 0
        assert -1 <= row.rank_correlation["released"] <= 1
        assert 0 <= row.mask_overlap["stochastic"] <= 1
    again = list(estimators.measure(bench, trials, bench.references()))
    assert all(row.cached for row in again)
    assert [row.seconds for row in again] == [row.seconds for row in rows]


@pytest.mark.parametrize("trajectory", ["shared", "restart"])
def test_flops_are_those_of_the_whole_attribution(
    tiny_model: StableDiffusionModel, parachute: Concept, trajectory: str
) -> None:
    objective = EraseObjective(parachute)
    whole = Attribution(steps=4, samples=3, batch_size=2, trajectory=trajectory)
    with FlopCounterMode(display=False) as counter:
        whole.scores(tiny_model, objective)
    counted = FlopCounts(tiny_model, objective).of(whole)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)  # prompts aside


def test_memory_is_that_of_a_process_of_its_own(miniature: Path, tmp_path: Path) -> None:
    config = small(miniature, tmp_path)
    bench = estimators.Bench(config)
    assert peak_memory_mb(config, bench.attribution({}, 1, 0)) > 0


def test_a_machine_has_a_rate(tiny_model: StableDiffusionModel) -> None:
    assert matrix_rate(tiny_model.device, tiny_model.dtype) > 1e8  # FLOP/s


def test_the_cheapest_as_good_is_found() -> None:
    frame = pd.DataFrame(
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
    summary = summarise(frame)
    ranks, masks = at_equal_quality(summary, ["truth"], "restart").to_dict("records")
    assert (ranks["cheapest"], ranks["times faster"]) == ("shared, 4", "10.0")
    assert (masks["quality"], masks["cheapest"]) == ("0.700", "–")
    table = as_table(summary, ["truth"], 1e11, "restart")
    assert list(table["faster"]) == ["1.0", "20.0", "10.0"]
    assert list(table["of the matrix rate, %"]) == ["25", "25", "25"]
    assert len(draw(summary, "truth").axes) == 2


def test_edits_from_scores_are_commands_of_run(miniature: Path, tmp_path: Path) -> None:
    config = small(miniature, tmp_path)
    wanted = [
        estimator_effects.overrides_of(config, str(name), samples[0], 1)
        for name, samples in plain(config.effects.estimators).items()
    ]
    runs = find_runs(wanted)
    assert {run.state for run in runs.values()} == {State.MISSING}, [
        r.reason for r in runs.values()
    ]
    assert len({run.folder for run in runs.values()}) == len(wanted)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("baseline=shared", None),
        ("baseline=other", r"other with \[1\] samples is not tried"),
        ("estimators.restart.samples=[2]", r"restart with \[1\] samples is not tried"),
    ],
)
def test_a_baseline_must_be_tried(override: str, reason: str | None) -> None:
    config = compose("effects.rounds=0", override)
    if reason is None:
        estimators.check(config)
        return
    with pytest.raises(UserError, match=reason):
        estimators.check(config)


def test_effects_need_rounds_that_are_run() -> None:
    with pytest.raises(UserError, match=r"effects.rounds=6 is more than rounds=5"):
        estimators.check(compose("effects.rounds=6"))
    with pytest.raises(UserError, match=r"shared with \[3\] samples is not tried"):
        estimators.check(compose("effects.estimators.shared=[3]"))


def test_an_unknown_setting_is_refused(miniature: Path, tmp_path: Path) -> None:
    config = small(miniature, tmp_path, "+estimators.shared.settings.antithetic=true")
    with pytest.raises(UserError, match="antithetic"):
        estimators.Bench(config).trials()
