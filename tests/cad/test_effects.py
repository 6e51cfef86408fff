"""The predicted effect of an edit against the measured one (Figure 2)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from linear_toy import LinearObjective, LinearToyModel
from scipy.stats import pearsonr

from cad.attribution import Attribution
from cad.edits import CADErase
from cad.effects import (
    RecordedObjective,
    chosen_effect,
    effect_correlation,
    measure_effect,
    pearson_r,
    predict_effect,
    random_components,
)
from cad.errors import UserError
from cad.identity import parameter_digest
from cad.objectives import EraseObjective
from cad.selection import Selection
from cad.weight_edit import Replace, Scale, WeightEdit, Zero

SETTINGS = Attribution(steps=2, samples=2)


@pytest.mark.parametrize("factor", [0.0, 2.0])
@pytest.mark.parametrize("chosen", [[0], [5, 10], [1, 2, 7, 14], list(range(16))])
def test_exact_on_a_linear_model(parachute, factor, chosen):
    model, objective = LinearToyModel(), LinearObjective(parachute)
    scores = SETTINGS.scores(model, objective)
    indices = {"weight": torch.tensor(chosen)}
    change = Scale(indices["weight"], factor) if factor else Zero(indices["weight"])
    edit = WeightEdit({"weight": change}, {"model": model.provenance()})
    recorded = RecordedObjective(model, objective, SETTINGS)
    predicted = predict_effect(scores, indices, factor)
    assert predicted == measure_effect(model, recorded, edit)
    assert predicted != 0.0


def test_predictions_correlate_on_a_network(tiny_model, parachute):
    before = parameter_digest(tiny_model.denoiser)
    effects = effect_correlation(
        tiny_model, EraseObjective(parachute), SETTINGS, count=12, share=0.002, seed=0
    )
    assert effects.predicted.shape == effects.measured.shape == (12,)
    assert effects.pearson_r == pytest.approx(
        pearsonr(effects.predicted, effects.measured).statistic
    )
    assert effects.pearson_r > 0.9
    assert parameter_digest(tiny_model.denoiser) == before


def test_measured_effects_weigh_timesteps_as_the_scores_do(tiny_model, parachute):
    """A change of 0.1 %: the first order is all there is, so prediction equals measurement."""
    objective = EraseObjective(parachute, weighting="epsilon")
    scores = SETTINGS.scores(tiny_model, objective)
    indices = {name: torch.arange(score.numel()) for name, score in scores.items()}
    changes = {name: Scale(flat, 1.001) for name, flat in indices.items()}
    edit = WeightEdit(changes, {"model": tiny_model.provenance()})
    recorded = RecordedObjective(tiny_model, objective, SETTINGS)
    measured = measure_effect(tiny_model, recorded, edit)
    assert predict_effect(scores, indices, 1.001) == pytest.approx(measured, rel=0.05)
    plain = RecordedObjective(tiny_model, EraseObjective(parachute), SETTINGS)
    assert recorded.unedited < 0.9 * plain.unedited


class LinearErase(CADErase):
    def objective(self, concept):
        return LinearObjective(concept)


def test_the_effect_of_a_choice_is_predicted_exactly_on_a_linear_model(parachute):
    model, method = LinearToyModel(), LinearErase(SETTINGS, Selection(0.25, "layer"))
    edit = method(model, parachute)
    found = chosen_effect(model, method, parachute, edit, seeds=2)
    assert found.predicted == found.measured < 0
    assert found.unedited > 0
    assert found.overlap == 1.0  # J has no noise
    replaced = WeightEdit({"weight": Replace(model.denoiser.weight * 0)}, edit.provenance)
    with pytest.raises(UserError, match=r"effect.seeds=2: edit=erase replaces weights"):
        chosen_effect(model, method, parachute, replaced, seeds=2)


def test_a_choice_on_fresh_noise(tiny_model, parachute):
    method = CADErase(SETTINGS, Selection(0.02, "layer"))
    edit = method(tiny_model, parachute)
    found = chosen_effect(tiny_model, method, parachute, edit, seeds=1)
    assert found.predicted < 0 != found.measured
    assert 0 < found.overlap < 1
    other = CADErase(replace(SETTINGS, seed=1), method.selection)(tiny_model, parachute)
    chosen = [
        {(name, i) for name, change in each.changes.items() for i in change.tensor.tolist()}
        for each in (edit, other)
    ]
    assert found.overlap == len(chosen[0] & chosen[1]) / len(chosen[0] | chosen[1])


def test_random_components_are_distinct_and_uniform_over_all_weights():
    weights = {"a": torch.zeros(10, 10), "b": torch.zeros(30, 10), "c": torch.zeros(1, 1)}
    counts = {"a": 0, "b": 0, "c": 0}
    generator = np.random.default_rng(0)
    for _ in range(50):
        chosen = random_components(weights, 40, generator)
        assert sum(len(flat) for flat in chosen.values()) == 40
        for name, flat in chosen.items():
            assert len(flat.unique()) == len(flat)
            assert 0 <= flat.min() <= flat.max() < weights[name].numel()
            counts[name] += len(flat)
    assert counts["a"] / 2000 == pytest.approx(100 / 401, abs=0.04)
    everything = random_components(weights, 401, generator)
    assert torch.equal(everything["b"], torch.arange(300))


def test_a_constant_has_no_pearson_r():
    with pytest.raises(ValueError, match="constant"):
        pearson_r(np.ones(2), np.array([1.0, 2.0]))


@pytest.mark.parametrize(
    ("count", "share", "message"),
    [(1, 0.1, "effect.count=1"), (3, 0.0, "effect.share=0.0"), (3, 1e-9, "less than one weight")],
)
def test_settings_are_checked_before_work_is_spent(parachute, count, share, message):
    with pytest.raises(UserError, match=message):
        effect_correlation(
            LinearToyModel(), LinearObjective(parachute), SETTINGS, count=count, share=share, seed=0
        )
