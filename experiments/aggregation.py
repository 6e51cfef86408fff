"""A run's aggregates: over the targets' images, over the others', over each group's, over all.

"The others", and several targets together, are the mean of their groups' values, as in the paper's
tables. Where all groups have the same number of images that is the aggregate of all these images at
once, which has the evaluator's own interval. Where they have not (`limit` cut the last round), the
mean is taken, and its interval is put together from the groups' intervals: Zou, Huang and Zhang, "A
note on confidence interval estimation for a linear function of binomial proportions" (2009). Of a
metric that is a total, it is the total over all their images.

Metrics of general captions are over all of them at once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from typing import Any

from evaluation.evaluators.base import GENERAL, Evaluator, Metric, Record

POOLED = "all images"  # the aggregate of all images at once
MEAN = "mean of groups"


def aggregate(
    evaluator: Evaluator, records: Sequence[Record], targets: Collection[str], state: str
) -> list[dict[str, Any]]:
    """A row per scope, as JSON data; scopes without images have none.

    The scopes are "target", "others" and "group", or "general" alone for an evaluator of general
    captions. A row is a `Metric` with its scope, state ("before", "after"), group (None for
    several), the number of `groups` in it, and what it was taken `over`: POOLED or MEAN.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(str(record["group"]), []).append(record)
    if evaluator.measures == GENERAL:
        whole = (evaluator.aggregate(records), POOLED)
        return [{"state": state} | _row("general", None, len(groups), whole)]
    rows = []
    for scope, wanted in (("target", True), ("others", False)):
        names = [name for name in groups if (name in targets) == wanted]
        if names:
            only = names[0] if wanted and len(names) == 1 else None
            over = over_groups(evaluator, [groups[name] for name in names])
            rows.append(_row(scope, only, len(names), over))
    for name, chosen in groups.items():
        rows.append(_row("group", name, 1, (evaluator.aggregate(chosen), POOLED)))
    return [{"state": state} | row for row in rows]


def _row(scope: str, group: str | None, groups: int, taken: tuple[Metric, str]) -> dict[str, Any]:
    metric, over = taken
    return {"scope": scope, "group": group, "groups": groups, "over": over} | asdict(metric)


def over_groups(evaluator: Evaluator, groups: Sequence[Sequence[Record]]) -> tuple[Metric, str]:
    """The mean of the groups' values with its 95 % interval, and how it was taken."""
    sizes = Counter(len(group) for group in groups)
    if evaluator.additive or len(sizes) == 1:
        return evaluator.aggregate([record for group in groups for record in group]), POOLED
    return mean_of_groups([evaluator.aggregate(group) for group in groups]), MEAN


def mean_of_groups(metrics: Sequence[Metric]) -> Metric:
    """The unweighted mean of independent metrics; its interval by the method of the module's head.

    low = mean - sqrt(sum (value_g - low_g)^2) / G, and high likewise.
    """
    count = len(metrics)
    value = sum(metric.value for metric in metrics) / count
    below = math.hypot(*(metric.value - metric.low for metric in metrics)) / count
    above = math.hypot(*(metric.high - metric.value for metric in metrics)) / count
    n = sum(metric.n for metric in metrics)
    return replace(metrics[0], value=value, low=value - below, high=value + above, n=n)
