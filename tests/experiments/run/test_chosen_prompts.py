"""Which prompts of a set are drawn."""

from __future__ import annotations

import pytest

from evaluation.prompts import Prompt
from experiments.run.groups import take_in_turn, take_of_each

PROMPTS = tuple(Prompt("x", i, group) for i in range(3) for group in ("tench", "church", "face"))


def test_no_limit_keeps_all_in_order() -> None:
    assert take_in_turn(PROMPTS, ["church"], None) == PROMPTS


@pytest.mark.parametrize(
    ("limit", "groups"),
    [
        (1, ["church"]),
        (2, ["tench", "church"]),
        (4, ["tench", "church", "face", "church"]),
        (99, [prompt.group for prompt in PROMPTS]),
    ],
)
def test_a_limit_takes_the_target_first_and_goes_round(limit: int, groups: list[str]) -> None:
    assert [prompt.group for prompt in take_in_turn(PROMPTS, ["church"], limit)] == groups


def test_of_each_group_the_first_are_taken() -> None:
    taken = take_of_each(PROMPTS, ["church", "tench"], 2, 0)
    assert [(prompt.group, prompt.seed) for prompt in taken] == [
        *(("tench", 0), ("church", 0), ("tench", 1), ("church", 1)),
    ]
    assert len(take_of_each(PROMPTS, ["face"], None, 0)) == 3
    fewer = [prompt.group for prompt in take_of_each(PROMPTS, ["face"], None, 1)]
    assert sorted(fewer) == ["church", *["face"] * 3, "tench"]
