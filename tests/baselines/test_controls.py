"""Controls remove as many weights as CAD, chosen by what they say."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from baselines.controls import LargestWeights, OtherConcept, RandomWeights
from cad.attribution import Attribution
from cad.components import component_weights
from cad.edits import CADErase
from cad.effects import chosen_effect
from cad.errors import UserError
from cad.selection import Selection

ATTRIBUTION = Attribution(steps=1, samples=1)
LAYER, MODEL = Selection(0.05, "layer"), Selection(0.05, "model")


def counts(edit):
    return {name: change.num_weights for name, change in edit.changes.items()}


def test_random_weights_have_the_share_of_each_layer_or_of_the_model(tiny_model, church, parachute):
    erased = CADErase(ATTRIBUTION, LAYER)(tiny_model, church)
    within = RandomWeights(ATTRIBUTION, LAYER)(tiny_model, church)
    assert counts(within) == counts(erased)
    anywhere = RandomWeights(ATTRIBUTION, MODEL)(tiny_model, church)
    total = sum(weight.numel() for weight in component_weights(tiny_model, "ff").values())
    assert anywhere.num_weights == MODEL.budget(total)
    assert counts(anywhere) != counts(erased)
    again = RandomWeights(Attribution(steps=2, samples=3), LAYER)
    assert again(tiny_model, church).fingerprint == within.fingerprint
    assert again.settings([church]) == RandomWeights(ATTRIBUTION, LAYER).settings([church])
    seeded = RandomWeights(Attribution(seed=1), LAYER)
    assert seeded.settings([church]) != again.settings([church])
    assert seeded(tiny_model, church).fingerprint != within.fingerprint
    assert again(tiny_model, parachute).fingerprint != within.fingerprint


def test_magnitude_takes_the_largest_weights_of_each_layer(tiny_model, church):
    made = LargestWeights(ATTRIBUTION, LAYER)(tiny_model, church)
    for name, weight in component_weights(tiny_model, "ff").items():
        size = weight.detach().abs().flatten()
        top = size.topk(LAYER.budget(size.numel())).indices
        assert set(made.changes[name].tensor.tolist()) == set(top.tolist())


def test_another_concept_s_scores(tiny_model, church, parachute):
    other = OtherConcept(ATTRIBUTION, LAYER, other="parachute")
    made = other(tiny_model, church)
    assert made.fingerprint == CADErase(ATTRIBUTION, LAYER)(tiny_model, parachute).fingerprint
    assert made.provenance["concepts"][0]["name"] == "church"
    with pytest.raises(UserError, match=r"edit.other='parachute' is the prompt of concept="):
        other.settings([parachute])
    with pytest.raises(UserError, match=r"edit\.other=3"):
        OtherConcept(ATTRIBUTION, LAYER, other=3)


def test_controls_leave_the_random_state_as_found(tiny_model, church):
    state = torch.get_rng_state()
    RandomWeights(ATTRIBUTION, LAYER)(tiny_model, church)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("control", [RandomWeights, partial(OtherConcept, other="parachute")])
def test_what_a_control_does_is_predicted_by_the_concept_s_own_scores(tiny_model, church, control):
    """Whatever it chooses by: its choice's effect is what Eq. 3 says of the same weights."""
    method = control(ATTRIBUTION, LAYER)
    edit = method(tiny_model, church)
    as_cad = chosen_effect(tiny_model, CADErase(ATTRIBUTION, LAYER), church, edit, seeds=1)
    found = chosen_effect(tiny_model, method, church, edit, seeds=1)
    assert (found.unedited, found.predicted) == (as_cad.unedited, as_cad.predicted)
    assert found.measured == as_cad.measured != 0
