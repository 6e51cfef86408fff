"""The contract of every edit, and what CAD's own choose."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors.torch import save_file

from cad import attribution, instrument
from cad.attribution import Attribution
from cad.edits import CADAmplify, CADErase, CADRescale, Edit, NoEdit
from cad.errors import UserError
from cad.identity import parameter_digest
from cad.models import base
from cad.objectives import EraseObjective
from cad.references import LatentFile
from cad.selection import Selection
from cad.store import Store
from cad.weight_edit import Scale, WeightEdit, Zero

ATTRIBUTION = Attribution(steps=1, samples=1)
SELECTION = Selection(0.05)


@pytest.fixture(params=["none", "erase", "amplify", "rescale"])
def edit(request, tmp_path, tiny_model) -> Edit:
    x_0 = torch.ones(1, *tiny_model.latent_shape)
    save_file({"parachute": x_0, "church": -x_0}, tmp_path / "latents.safetensors")
    references = LatentFile(tmp_path / "latents.safetensors")
    return {
        "none": NoEdit(),
        "erase": CADErase(ATTRIBUTION, SELECTION),
        "amplify": CADAmplify(ATTRIBUTION, SELECTION, references),
        "rescale": CADRescale(ATTRIBUTION, SELECTION, factor=2.0),
    }[request.param]


def test_contract(edit, request, tiny_model, parachute, tmp_path):
    """Deterministic, leaves the model and the random state as found, stored and applied."""
    before, state = parameter_digest(tiny_model.denoiser), torch.get_rng_state()
    made = edit(tiny_model, parachute)
    assert edit(tiny_model, parachute).fingerprint == made.fingerprint
    assert parameter_digest(tiny_model.denoiser) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(p.requires_grad for p in tiny_model.denoiser.parameters())

    assert made.provenance["edit"] == edit.name == request.node.callspec.params["edit"]
    assert made.provenance["model"] == tiny_model.provenance()
    assert made.provenance["concepts"][0]["name"] == "parachute"
    assert json.loads(json.dumps(made.provenance)) == made.provenance
    assert (made.cost.seconds > 0) == (edit.name != "none")
    assert made.cost.memory_kind == ("resident growth" if edit.name != "none" else "")
    assert not made.cost.cached

    made.save(tmp_path / "edit.safetensors")
    with WeightEdit.load(tmp_path / "edit.safetensors").applied(tiny_model):
        assert (parameter_digest(tiny_model.denoiser) != before) == (edit.name != "none")
    assert parameter_digest(tiny_model.denoiser) == before


def test_several_concepts_lose_what_each_would(edit, tiny_model, parachute, church):
    both = edit(tiny_model, parachute, church).changes
    singles = [edit(tiny_model, concept).changes for concept in (parachute, church)]
    expected = {}
    for changes in singles:
        for name, change in changes.items():
            expected.setdefault(name, set()).update(change.tensor.tolist())
    assert {name: change.tensor.tolist() for name, change in both.items()} == {
        name: sorted(indices) for name, indices in expected.items()
    }


def test_erase_zeroes_the_most_positive_and_rescale_strengthens_the_most_negative(
    tiny_model, parachute
):
    scores = ATTRIBUTION.scores(tiny_model, EraseObjective(parachute))
    erased = CADErase(ATTRIBUTION, SELECTION)(tiny_model, parachute).changes
    rescaled = CADRescale(ATTRIBUTION, SELECTION, factor=3.0)(tiny_model, parachute).changes
    for sign, changes, kind in ((1, erased, Zero), (-1, rescaled, Scale)):
        assert set(changes) == set(scores)
        for name, change in changes.items():
            assert isinstance(change, kind)
            chosen = sign * scores[name].flatten()[change.tensor.long()]
            assert (chosen > 0).all()
            assert change.num_weights <= len(scores[name]) * SELECTION.budget(scores[name].shape[1])
            assert chosen.max() == (sign * scores[name]).max()
    assert next(iter(rescaled.values())).factor == 3.0
    whole = CADRescale(ATTRIBUTION, SELECTION, factor=3)(tiny_model, parachute)
    assert whole.fingerprint == WeightEdit(rescaled, {}).fingerprint


def test_a_sweep_over_ratios_costs_one_attribution(tiny_model, parachute, tmp_path, monkeypatch):
    store = Store(tmp_path)
    first = CADErase(ATTRIBUTION, Selection(0.05), store=store)(tiny_model, parachute)
    monkeypatch.setattr(Attribution, "scores", None)  # calling it would be an error
    again = CADErase(ATTRIBUTION, Selection(0.05), store=store)(tiny_model, parachute)
    more = CADErase(ATTRIBUTION, Selection(0.1), store=store)(tiny_model, parachute)
    rescale = CADRescale(ATTRIBUTION, Selection(0.1), factor=2.0, store=store)
    rescaled = rescale(tiny_model, parachute)
    assert again.fingerprint == first.fingerprint
    assert more.num_weights > first.num_weights
    assert rescaled.cost.cached
    assert not first.cost.cached
    assert again.cost.seconds > 0.5 * first.cost.seconds  # the original cost, not the reading's


def test_the_cost_is_the_edit_s_alone(tiny_model, parachute, tmp_path, monkeypatch):
    """Neither hashing the model nor writing the scores counts."""
    slow = 5.0  # seconds, as a patched clock sees them
    clock = itertools.accumulate(itertools.repeat(1e-3))
    passed = [0.0]
    monkeypatch.setattr(instrument.time, "perf_counter", lambda: next(clock) + passed[0])

    def slowly(function):
        def slowed(*args, **kwargs):
            passed[0] += slow
            return function(*args, **kwargs)

        return slowed

    monkeypatch.setattr(base, "parameter_digest", slowly(base.parameter_digest))
    monkeypatch.setattr(attribution, "write_tensors", slowly(attribution.write_tensors))
    monkeypatch.setattr(attribution, "read_tensors", slowly(attribution.read_tensors))
    for _ in range(2):
        edit = CADErase(ATTRIBUTION, SELECTION, store=Store(tmp_path))(tiny_model, parachute)
        assert 0 < edit.cost.seconds < slow
    assert passed[0] >= 3 * slow


def test_missing_references_are_noticed_before_the_work(tiny_model, church, tmp_path, monkeypatch):
    monkeypatch.setattr(CADAmplify, "make", None)  # calling it would be an error
    amplify = CADAmplify(ATTRIBUTION, SELECTION, LatentFile(tmp_path / "nowhere.safetensors"))
    with pytest.raises(UserError, match=r"edit.references.path=.* cannot be read: No such file"):
        amplify(tiny_model, church)


def test_weighting_is_part_of_the_settings_and_of_the_scores(tiny_model, parachute):
    model, epsilon = (
        CADErase(ATTRIBUTION, SELECTION, weighting=weighting) for weighting in ("model", "epsilon")
    )
    assert model.settings([parachute]) != epsilon.settings([parachute])
    rescale = CADRescale(ATTRIBUTION, SELECTION, "epsilon", factor=2.0)
    assert rescale.settings([parachute])["objectives"][0]["weighting"] == "epsilon"
    with pytest.raises(UserError, match=r"edit.weighting='noise' is unknown"):
        CADErase(ATTRIBUTION, SELECTION, weighting="noise")


def test_a_new_version_of_the_scores_is_another_edit(parachute, monkeypatch):
    erase = CADErase(ATTRIBUTION, SELECTION)
    before = erase.identity([parachute])
    monkeypatch.setattr(Attribution, "version", 99)
    assert erase.identity([parachute]) != before


def test_impossible_ratios_are_refused_before_the_attribution(tiny_model, parachute, monkeypatch):
    monkeypatch.setattr(Attribution, "scores", None)
    with pytest.raises(UserError, match=r"ratio.value=0.0001 chooses nothing"):
        CADErase(ATTRIBUTION, Selection(0.0001))(tiny_model, parachute)


@pytest.mark.parametrize("factor", [1.0, 0.0, float("inf"), float("nan")])
def test_factors_that_strengthen_nothing_are_refused(factor):
    with pytest.raises(UserError, match=r"edit\.factor="):
        CADRescale(ATTRIBUTION, SELECTION, factor=factor)
