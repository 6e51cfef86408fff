"""Scores on disk: found again, told apart, and made again when damaged."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

import pytest
import torch
from linear_toy import LinearObjective, LinearToyModel

from cad import score_store
from cad.attribution import Attribution
from cad.objectives import EraseObjective
from cad.runtime import describe_runtime
from cad.score_store import ScoreStore

SETTINGS = Attribution(steps=2, samples=1)


@pytest.fixture
def store(tmp_path):
    return ScoreStore(tmp_path)


@pytest.fixture
def filled(store, parachute):
    """The path of the toy's scores, and the scores."""
    scored = store.scored(LinearToyModel(), LinearObjective(parachute), SETTINGS)
    return next(store.root.glob("*.safetensors")), scored


def test_a_hit_returns_the_same_scores_and_the_original_cost(store, filled, parachute):
    again = store.scored(LinearToyModel(), LinearObjective(parachute), SETTINGS)
    assert torch.equal(again.scores["weight"], filled[1].scores["weight"])
    assert again.cost == replace(filled[1].cost, cached=True)
    assert len(list(store.root.glob("*.safetensors"))) == 1


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "empty"])
def test_a_damaged_file_is_reported_and_made_again(store, filled, parachute, caplog, damage):
    path, scored = filled
    whole = path.read_bytes()
    damaged = {
        "truncated": whole[: len(whole) // 2],
        "flipped": whole[:-1] + bytes([whole[-1] ^ 1]),
        "foreign": b"something else",
        "empty": b"",
    }[damage]
    path.write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        again = store.scored(LinearToyModel(), LinearObjective(parachute), SETTINGS)
    assert "damaged" in caplog.text
    assert not again.cost.cached
    assert torch.equal(again.scores["weight"], scored.scores["weight"])
    assert store.scored(LinearToyModel(), LinearObjective(parachute), SETTINGS).cost.cached


def test_the_key_holds_all_that_matters(store, tiny_model, parachute, church):
    def path(model=tiny_model, concept=parachute, **settings):
        return store.path(model, EraseObjective(concept), replace(SETTINGS, **settings))

    other = LinearToyModel()
    larger = copy.copy(tiny_model)
    larger.resolution, larger.latent_shape = 128, (4, 16, 16)
    paths = [
        path(),
        path(concept=church),
        path(concept=replace(parachute, base_prompt="a photo")),
        path(model=other),
        path(model=larger),
        store.path(tiny_model, EraseObjective(parachute, weighting="epsilon"), SETTINGS),
        path(seed=1),
        path(steps=3),
        path(component="attn1"),
        path(trajectory="restart"),
    ]
    assert len(set(paths)) == len(paths)
    assert path(concept=replace(parachute, name="chute")) == path()  # the prompts are what counts


@pytest.mark.parametrize("changed", [{"device": "cuda"}, {"versions": {"torch": "0"}}])
def test_the_key_holds_device_and_libraries(store, parachute, monkeypatch, changed):
    objective = LinearObjective(parachute)
    before = store.path(LinearToyModel(), objective, SETTINGS)
    there = describe_runtime(torch.device("cpu")) | changed
    monkeypatch.setattr(score_store, "describe_runtime", lambda device: there)
    assert store.path(LinearToyModel(), objective, SETTINGS) != before
