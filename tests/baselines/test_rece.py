"""RECE finds the embedding that brings a concept back, erases it, and starts from UCE."""

from __future__ import annotations

import pytest
import readings
import torch

from baselines.closed_form import Text, adversarial_map
from baselines.rece import RECE, StartingUCE, unreached
from baselines.uce import UCE
from cad.errors import UserError

OUT, WIDTH = 3, 6
START = StartingUCE(" ", ["tench"])


def layers(seed, count=4):
    """Projections (OUT, WIDTH), float64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(OUT, WIDTH, generator=generator).double() for _ in range(count)]


def test_unreached_is_a_share_without_a_scale():
    """0 for weights as they were, 1 for weights that only the guide's outputs come out of."""
    original = layers(0, 2)
    states = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(3)).double()
    concept, guide = Text(states[0], 3), Text(states[1], 1)
    whole = adversarial_map(original, original, 1e-10)
    assert unreached(original, original, whole, concept, guide) < 1e-12
    to_guide = torch.eye(WIDTH).double()
    alone = Text(states[0][:4], 3)  # one position, so that one matrix can map it to the guide's
    c, g = alone.states[3], guide.states[1]
    blind = [w @ torch.outer(g, c) / c.dot(c) for w in original]
    assert unreached(blind, original, to_guide, alone, guide) == pytest.approx(1)

    current = layers(1, 2)
    small = unreached(current, original, adversarial_map(current, original, 0.1), concept, guide)
    current, original = [10 * v for v in current], [10 * w for w in original]
    large = unreached(current, original, adversarial_map(current, original, 10.0), concept, guide)
    assert small == pytest.approx(large)
    assert small > 0


def test_no_epochs_are_uce(tiny_model, church):
    made = RECE(START, 0, 0.1)(tiny_model, church)
    assert made.fingerprint == UCE(" ", ["tench"])(tiny_model, church).fingerprint
    assert made.history == ()


@pytest.mark.parametrize(("epochs", "near"), [(0, 0.1), (1, 1e-3), (2, 0.1)])
def test_start_and_rounds_are_as_published(epochs, near, tiny_model, church, parachute):
    """UCE with lambda 0.5, then rounds with 0.1: to 1e-3 of a weight, or 1e-4 of a small one."""
    made = RECE(START, epochs, near)(tiny_model, church, parachute)
    original = readings.projections(tiny_model)
    pairs = [readings.from_last(tiny_model, text, " ") for text in ("church", "parachute")]
    kept, guide, *concepts = (
        readings.embed(tiny_model, text)[0] for text in ("tench", " ", "church", "parachute")
    )
    expected = readings.uce(original, pairs, [kept], (1.0, 1.0, 0.5))
    for _ in range(epochs):
        expected = readings.rece(expected, original, concepts, guide, near)
    assert made.changes.keys() == expected.keys()
    for name, change in made.changes.items():
        weight = expected[name].float()
        torch.testing.assert_close(change.tensor, weight, rtol=1e-3, atol=1e-4, msg=name)
    assert [record["step"] for record in made.history] == list(range(epochs))
    assert all(record["residual"] >= 0 for record in made.history)
    assert made.cost.seconds > 0


def test_rounds_are_skipped_only_where_nothing_is_near(tiny_model, church):
    whole = RECE(START, 2, 0.1)(tiny_model, church)
    residual = whole.history[0]["residual"]
    for threshold, rounds in ((0.5 * residual, 0), (1e6, 2)):
        method = RECE(START, 2, 0.1, skip_if_erased=True, erased_threshold=threshold)
        made = method(tiny_model, church)
        same = START(tiny_model, church) if rounds == 0 else whole
        assert made.fingerprint == same.fingerprint
        assert len(made.history) == max(rounds, 1)  # the round that was found not to be needed
        assert made.history[0] == whole.history[0]


def test_the_keys_of_its_uce_are_named_where_they_stand(tiny_model, church):
    with pytest.raises(UserError, match=r"edit\.uce\.regularisation=-1"):
        StartingUCE(" ", [], regularisation=-1)
    with pytest.raises(UserError, match=r"edit\.uce\.guide='church'"):
        RECE(StartingUCE("church", []), 1, 0.1)(tiny_model, church)
    with pytest.raises(UserError, match=r"^edit\.guide='church'"):
        RECE(UCE(" ", []), 1, 0.1, guide="church")(tiny_model, church)
