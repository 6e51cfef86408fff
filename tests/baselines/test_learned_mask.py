"""The learned mask starts as CAD's, lowers its loss, and zeroes whatever gate it closed."""

from __future__ import annotations

import pytest
import torch

from baselines.learned_mask import CHOSEN, LearnedMask, gate_weight, start_logits
from baselines.training import with_weights
from cad.attribution import Attribution
from cad.components import component_weights
from cad.edits import CADErase
from cad.errors import UserError
from cad.selection import Selection
from cad.units import find_units

ATTRIBUTION = Attribution(steps=2, samples=2, batch_size=2)


def learned(unit="weight", ratio=0.05, **settings):
    given = {"preserve": ["tench"], "iterations": 3} | settings
    return LearnedMask(ATTRIBUTION, Selection(ratio, "layer", unit), **given)


@pytest.mark.parametrize("unit", ["weight", "neuron"])
def test_without_learning_it_is_cads(unit, tiny_model, church):
    cad = CADErase(ATTRIBUTION, Selection(0.05, "layer", unit))(tiny_model, church)
    made = learned(unit, lr=1e-9, iterations=1)(tiny_model, church)
    assert made.fingerprint == cad.fingerprint


@pytest.mark.parametrize("sparsity", [0.0, 1e3])
def test_gates_close_and_open(sparsity, tiny_model, church):
    """A price on closed gates opens them all, so that nothing is zeroed."""
    made = learned(sparsity=sparsity, lr=0.5, iterations=5)(tiny_model, church)
    assert (made.num_weights == 0) == (sparsity > 0)


def test_the_loss_falls(tiny_model, church):
    method = learned(sparsity=0.0, lr=0.05, iterations=20, preserve_scale=0.0)
    weights = component_weights(tiny_model, "ff")
    wanted = method._wanted(tiny_model, "church", "")
    logits = start_logits(weights, {}, by_row=False)

    @torch.no_grad()
    def predict(x_t, t):
        return tiny_model.predict(x_t, t, wanted.c.expand(len(x_t)))

    def error():
        gates = {name: logit.detach().sigmoid() for name, logit in logits.items()}
        gated = {name: gate_weight(weights[name], gate) for name, gate in gates.items()}
        found = 0.0
        for *at, target in wanted.states:
            prediction = with_weights(tiny_model.denoiser, gated, predict, *at)
            found += float((prediction - target).square().mean())
        return found

    before = error()
    method._learn(tiny_model, weights, logits, wanted, [wanted], 1)
    assert error() < before


def test_a_rows_gate_is_of_all_its_weights(tiny_model):
    weights = component_weights(tiny_model, "ff")
    name = next(iter(weights))
    row = torch.arange(weights[name].shape[1]) + weights[name].shape[1]  # the second
    logits = start_logits(weights, {name: row}, by_row=True)
    assert logits[name].shape == (len(weights[name]), 1)
    assert (logits[name] == CHOSEN).flatten().nonzero().tolist() == [[1]]
    gate = torch.zeros(len(weights[name]), 1)
    gate[0] = 1
    gated = gate_weight(weights[name], gate)
    assert torch.equal(gated[0], weights[name][0])
    assert not gated[1:].any()
    assert find_units(tiny_model, weights, "neuron") is not None


@pytest.mark.parametrize(("key", "value"), [("lr", 0), ("iterations", 0), ("sparsity", -1)])
def test_bad_values_are_named(key, value, church):
    with pytest.raises(UserError, match=rf"edit\.{key}="):
        learned(**{key: value})
    with pytest.raises(UserError, match=r"ratio\.unit=head has no gates"):
        learned("head")
    with pytest.raises(UserError, match=r"edit\.preserve=\['church'\]|keeps nothing"):
        learned(preserve=["church"]).settings([church])
