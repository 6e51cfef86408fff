"""The others' value is the mean of their groups, however many images each has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from evaluation.evaluators.base import GENERAL, Evaluator, Interval, Metric, Record
from evaluation.prompts import Prompt
from experiments.run.groups import MEAN, POOLED, aggregate, mean_of_groups


class Share(Evaluator):
    name: ClassVar[str] = "share"
    unit: ClassVar[str] = "%"
    higher_is_better: ClassVar[bool] = True
    judges: ClassVar[str | None] = "correct"
    instrument = "test"

    def score(
        self,
        images: NDArray[np.uint8],
        prompts: Sequence[Prompt],
        references: NDArray[np.uint8] | None = None,
    ) -> list[Record]:
        raise NotImplementedError


class Total(Share):
    name: ClassVar[str] = "total"
    additive: ClassVar[bool] = True

    def aggregate(self, records: Sequence[Record]) -> Metric:
        count = sum(record["correct"] for record in records)
        return self.metric(Interval(count, count, count), len(records))


class Captions(Share):
    name: ClassVar[str] = "captions"
    measures: ClassVar[str] = GENERAL


def records(**groups: str) -> list[Record]:
    """`church="110"` is three images of churches, the first two correct."""
    return [
        {"group": name, "correct": mark == "1"} for name, marks in groups.items() for mark in marks
    ]


def test_groups_of_one_size_are_pooled() -> None:
    rows = aggregate(Share(), records(church="10", tench="11", face="00"), ["church"], "before")
    target, others, *groups = rows
    assert (target["scope"], target["value"], target["n"]) == ("target", 50, 2)
    assert (others["scope"], others["value"], others["n"]) == ("others", 50, 4)
    assert (others["groups"], others["over"]) == (2, POOLED)
    assert [row["group"] for row in groups] == ["church", "tench", "face"]
    assert {row["state"] for row in rows} == {"before"}


def test_groups_of_other_sizes_count_alike() -> None:
    others = aggregate(Share(), records(church="1", tench="111", face="0"), ["church"], "after")[1]
    assert (others["value"], others["n"]) == (50, 4)  # pooled, it would be 75
    assert (others["groups"], others["over"]) == (2, MEAN)
    assert 0 <= others["low"] < 50 < others["high"] <= 100


def test_without_verdicts_an_evaluator_says_how_it_aggregates() -> None:
    class Silent(Share):
        judges = None

    with pytest.raises(NotImplementedError, match="Silent"):
        Silent().aggregate(records(church="1"))


def test_totals_add_up() -> None:
    others = aggregate(Total(), records(church="1", tench="111", face="0"), ["church"], "after")[1]
    assert (others["value"], others["n"], others["over"]) == (3, 4, POOLED)


def test_several_targets_are_one_scope() -> None:
    rows = aggregate(Share(), records(church="10", tench="11", face="00"), ["face", "church"], "x")
    target, others, *groups = rows
    assert (target["value"], target["n"], target["groups"], target["group"]) == (25, 4, 2, None)
    assert (others["value"], others["n"], others["groups"]) == (100, 2, 1)
    assert len(groups) == 3


def test_general_captions_are_one_row() -> None:
    (row,) = aggregate(Captions(), records(captions="1101"), ["church"], "before")
    assert (row["scope"], row["group"], row["value"], row["n"]) == ("general", None, 75, 4)


def test_the_mean_s_interval_by_hand() -> None:
    metrics = [
        Metric("m", 40.0, 37.0, 43.0, 10, "%", 1, True, "v"),
        Metric("m", 60.0, 56.0, 72.0, 20, "%", 1, True, "v"),
    ]
    mean = mean_of_groups(metrics)
    assert (mean.value, mean.n) == (50.0, 30)
    assert mean.low == pytest.approx(50 - 5 / 2)  # hypot(3, 4) = 5
    assert mean.high == pytest.approx(50 + math.hypot(3, 12) / 2)


def test_equal_groups_agree_with_pooling_in_value() -> None:
    groups = [records(a="1101"), records(b="1000"), records(c="1111")]
    single = [Share().aggregate(group) for group in groups]
    pooled = Share().aggregate([record for group in groups for record in group])
    mean = mean_of_groups(single)
    assert mean.value == pytest.approx(pooled.value)
    assert mean.high - mean.low == pytest.approx(pooled.high - pooled.low, rel=0.5)


def test_only_the_target_has_no_others() -> None:
    rows = aggregate(Share(), records(church="1"), ["church"], "before")
    assert [row["scope"] for row in rows] == ["target", "group"]
