"""Neurons, heads and matrices against sums over every subset of weights, one by one."""

from __future__ import annotations

import itertools

import pytest
import torch

from cad.attribution import Attribution
from cad.components import component_weights
from cad.edits import CADErase
from cad.errors import UserError
from cad.selection import Selection
from cad.units import find_units


def random_scores(weights):
    generator = torch.Generator().manual_seed(0)
    shapes = {name: weight.flatten(1).shape for name, weight in weights.items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def members_by_hand(model, weights, unit):
    """{(layer, number): {weight name: flat indices}}, written out weight by weight."""
    found = {}
    for name, weight in weights.items():
        rows, columns = weight.flatten(1).shape
        layer, _, part = name.removesuffix(".weight").rpartition(".to_")
        if unit == "head":
            heads = dict(model.denoiser.named_modules())[layer].heads
        for flat, (r, c) in enumerate(itertools.product(range(rows), range(columns))):
            if unit == "neuron":
                key = (name, r)
            elif unit == "matrix":
                key = (name, 0)
            elif part == "out.0":
                key = (layer, c // (columns // heads))
            else:
                key = (layer, r // (rows // heads))
            found.setdefault(key, {}).setdefault(name, []).append(flat)
    return found


@pytest.mark.parametrize(
    ("component", "unit", "per", "ratio"),
    [
        ("ff", "neuron", "layer", 0.1),
        ("ff", "neuron", "model", 0.1),
        ("residual", "neuron", "layer", 0.2),
        ("ff", "matrix", "model", 0.3),
        ("attn2", "head", "layer", 0.5),
        ("attn1", "head", "model", 0.3),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_units_are_chosen_by_the_sum_of_their_weights(
    tiny_model, component, unit, per, ratio, sign
):
    weights = component_weights(tiny_model, component)
    scores = random_scores(weights)
    members = members_by_hand(tiny_model, weights, unit)
    sums = {
        key: sign * sum(float(scores[n].flatten()[i].double().sum()) for n, i in parts.items())
        for key, parts in members.items()
    }
    expected: dict[str, set[int]] = {}
    layers = [None] if per == "model" else dict.fromkeys(layer for layer, _ in sums)
    for layer in layers:
        rivals = [key for key in sums if layer in (None, key[0])]
        k = int(ratio * len(rivals) + 1e-9)
        for key in sorted(rivals, key=lambda key: -sums[key])[:k]:
            for name, indices in members[key].items() if sums[key] > 0 else ():
                expected.setdefault(name, set()).update(indices)

    selection = Selection(ratio, per, unit)
    units = find_units(tiny_model, weights, unit)
    selection.check(weights, units)
    found = selection.indices(scores, sign, units)
    assert {name: indices.tolist() for name, indices in found.items()} == {
        name: sorted(indices) for name, indices in expected.items()
    }
    assert found


def test_an_edit_knocks_out_whole_neurons(tiny_model, parachute):
    attribution = Attribution(steps=1, samples=1)
    edit = CADErase(attribution, Selection(0.1, "layer", "neuron"))(tiny_model, parachute)
    weights = component_weights(tiny_model, "ff")
    for name, change in edit.changes.items():
        rows, columns = weights[name].shape
        per_row = torch.bincount(change.tensor.long() // columns, minlength=rows)
        assert set(per_row.tolist()) == {0, columns}
        assert 0 < (per_row > 0).sum() <= rows // 10


def test_what_cannot_be_chosen_is_refused_before_the_attribution(
    tiny_model, parachute, monkeypatch
):
    with pytest.raises(UserError, match=r"ratio.unit='block' is unknown; allowed: weight, neuron"):
        Selection(0.1, "layer", "block")
    with pytest.raises(UserError, match=r"ratio.per=row ranks single weights"):
        Selection(0.1, "row", "neuron")
    monkeypatch.setattr(Attribution, "scores", None)
    attribution = Attribution(steps=1, samples=1)
    with pytest.raises(UserError, match=r"ratio.unit=head is not allowed for .*ff.net"):
        CADErase(attribution, Selection(0.5, "layer", "head"))(tiny_model, parachute)
    with pytest.raises(
        UserError, match=r"a layer has at most 1 matrix, so the ratio .* at least 1"
    ):
        CADErase(attribution, Selection(0.5, "layer", "matrix"))(tiny_model, parachute)
