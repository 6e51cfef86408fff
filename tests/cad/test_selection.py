"""The selection by hand, and its counts at the published model's sizes."""

from __future__ import annotations

import pytest
import torch

from cad.errors import UserError
from cad.selection import Selection

SCORES = torch.tensor(
    [
        [0.9, 0.1, -5.0, 0.3, 0.2],
        [-1.0, -2.0, 0.5, -0.1, -3.0],
        [-1.0, -2.0, -4.0, 0.0, -3.0],
    ]
)  # (3, 5)


@pytest.mark.parametrize(
    ("ratio", "per", "sign", "expected"),
    [
        (0.4, "row", +1, [0, 3, 7]),  # k = 2; the second row has one positive, the third none
        (0.59, "row", +1, [0, 3, 7]),  # floor(2.95) = 2
        (0.4, "row", -1, [2, 6, 9, 12, 14]),  # the first row has one negative
        (0.2, "layer", +1, [0, 3, 7]),  # k = 3 of 15
        (0.2, "layer", -1, [2, 12, 14]),  # -5, -4, -3; of the two -3 either
        (1.0, "row", +1, [0, 1, 3, 4, 7]),
    ],
)
def test_by_hand(ratio, per, sign, expected):
    scores = SCORES.clone()
    scores[1, 4] += 0.5  # -2.5: no ties among the negatives that decide
    assert Selection(ratio, per).indices({"w": scores}, sign)["w"].tolist() == expected


def test_all_weights_compete_for_one_budget_per_model():
    scores = {"a": torch.tensor([[5.0, 1.0], [-3.0, 2.0]]), "b": torch.tensor([[4.0, -9.0, 3.0]])}
    top = Selection(0.43, "model").indices(scores)  # floor(3.01) = 3 of 7
    assert {name: found.tolist() for name, found in top.items()} == {"a": [0], "b": [0, 2]}
    low = Selection(0.15, "model").indices(scores, -1)
    assert {name: found.tolist() for name, found in low.items()} == {"b": [1]}
    everything = Selection(1.0, "model").indices(scores)  # the positive ones
    assert {name: found.tolist() for name, found in everything.items()} == {
        "a": [0, 1, 3],
        "b": [0, 2],
    }
    Selection(0.15, "model").check(scores)
    with pytest.raises(UserError, match=r"at least 0\.143"):
        Selection(0.1, "model").check(scores)


def test_weights_without_a_choice_are_left_out():
    assert Selection(0.5).indices({"w": -torch.ones(2, 4)}) == {}
    assert Selection(0.2).indices({"w": torch.ones(2, 4)}) == {}  # floor(0.8) = 0


def test_the_ratio_is_taken_as_written():
    # 0.29 * 100 is 28.999999999999996 in floats
    shares = {(0.29, 100): 29, (0.001, 1280): 1, (0.001, 320): 0, (0.1, 10): 1, (1 / 3, 3): 0}
    assert {each: Selection(each[0]).budget(each[1]) for each in shares} == shares


@pytest.mark.parametrize(("ratio", "most"), [(0.001, 107_840), (0.00075, 26_240)])
def test_most_weights_that_sd14_can_lose(ratio, most):
    """Feed-forward weights of SD-1.4's 16 blocks: (8 d, d) and (d, 4 d)."""
    widths = [320] * 5 + [640] * 5 + [1280] * 6
    budget = Selection(ratio).budget
    assert sum(8 * d * budget(d) + d * budget(4 * d) for d in widths) == most


def test_a_ratio_that_can_choose_nothing_is_refused():
    weights = {"w": torch.ones(3, 5), "conv": torch.ones(2, 2, 3, 3)}
    Selection(0.06).check(weights)  # a convolution's row has 18 inputs
    with pytest.raises(UserError, match=r"at most 18 components.*ratio.per=layer"):
        Selection(0.05).check(weights)


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, float("nan")])
def test_settings_out_of_range_are_refused(ratio):
    with pytest.raises(UserError, match=r"ratio.value=.*\(0, 1\]"):
        Selection(ratio)
    with pytest.raises(UserError, match="allowed: row, layer"):
        Selection(0.1, "column")
