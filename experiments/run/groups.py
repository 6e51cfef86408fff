"""The groups of a run's prompts: which prompts are drawn, and the aggregates over their images.

Prompts are taken from the groups in turn. Aggregates are over the targets' images, the others' and
each group's. "The others", and several targets together, are the mean of their groups' values, as
in the paper's tables. Where all groups have the same number of images that is the aggregate of all
these images at once, which has the evaluator's own interval. Where they have not (`limit` cut the
last round), the mean is taken, and its interval is put together from the groups' intervals: Zou,
Huang and Zhang, "A note on confidence interval estimation for a linear function of binomial
proportions" (2009). A metric that is a total is the total over all their images.

Metrics of general captions are over all of them at once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from cad.errors import UserError
from evaluation.evaluators.base import GENERAL, Evaluator, Metric, Record, score_image_set
from evaluation.image_sets import ImageSet
from evaluation.prompts import Prompt, PromptSet, build_prompts
from experiments.run.arguments import build
from experiments.run.configuration import adding

ATTACKED = "attacked"
POOLED = "all images"  # the aggregate of all images at once
MEAN = "mean of groups"

T = TypeVar("T")
Prompts = dict[str, tuple[Prompt, ...]]
"""By their use: those that evaluators measure (CONCEPT, GENERAL), and those that are ATTACKED."""

Images = dict[str, dict[str, ImageSet]]
"""By what is measured (CONCEPT, GENERAL) and state ("before", "after")."""

logger = logging.getLogger(__name__)


def needed_prompts(cfg: DictConfig, evaluators: Sequence[Evaluator]) -> dict[str, PromptSet]:
    """The prompt sets by their use, not yet read. UserError where the model has none.

    General captions are the model's (`model.prompts.general`); with none to measure, none are made.
    """
    uses = {each.measures: f"evaluator={each.name} measures {each.measures}" for each in evaluators}
    if cfg.attacks:
        uses[ATTACKED] = f"attack={','.join(cfg.attacks)} starts from"
    elif not uses:
        logger.warning(
            "no evaluator is chosen, or model=%s has none for %s concepts: the edit is made and "
            "saved, nothing is measured",
            cfg.model.name,
            cfg.concept.kind,
        )
    needed = {}
    for use, reason in uses.items():
        place = f"model.prompts.{GENERAL}" if use == GENERAL else "prompts"
        node = OmegaConf.select(cfg, place)
        if node is None:
            key = GENERAL if use == GENERAL else cfg.concept.kind
            raise UserError(
                f"{reason} prompts, and model={cfg.model.name} has none for concept="
                f"{','.join(cfg.concepts)}: choose prompts=NAME, or set model.prompts.{key}"
            )
        needed[use] = build(node, place=place)
    return needed


def read_prompts(cfg: DictConfig, prompt_sets: Mapping[str, PromptSet]) -> Prompts:
    """The sets' prompts up to the limits; files are downloaded the first time.

    Raises UserError where a target is not among the groups of prompts for concepts.
    """
    targets = [concept.name for concept in cfg.concepts.values()]
    found = {}
    for use, prompt_set in prompt_sets.items():
        prompts: Sequence[Prompt] = build_prompts(prompt_set)
        groups = dict.fromkeys(prompt.group for prompt in prompts)
        for concept in cfg.concepts.values():
            if use != GENERAL and concept.name not in groups:
                raise UserError(
                    f"concept={concept.name} has no images in the prompts {prompt_set.name}, whose "
                    f"groups are: {', '.join(groups)}. Choose a concept among them, or other "
                    f"prompts, such as {adding(concept)}"
                )
        if use != GENERAL:
            prompts = take_of_each(prompts, targets, None, cfg.others_per_class)
        found[use] = take_in_turn(prompts, targets, cfg.limit)
        if use == ATTACKED:
            found[use] = take_of_each(found[use], targets, cfg.attack.limit, 0)
    return found


def take_in_turn(
    prompts: Sequence[Prompt], targets: Collection[str], limit: int | None
) -> tuple[Prompt, ...]:
    """At most `limit` prompts, in their order: group by group in turn, the targets' first."""
    if limit is None:
        return tuple(prompts)
    seen: dict[str, int] = {}
    ranks: list[tuple[int, bool, int]] = []
    for index, prompt in enumerate(prompts):
        seen[prompt.group] = seen.get(prompt.group, 0) + 1
        ranks.append((seen[prompt.group], prompt.group not in targets, index))
    return tuple(prompts[index] for index in sorted(index for *_, index in sorted(ranks)[:limit]))


def take_of_each(
    prompts: Sequence[Prompt], targets: Collection[str], of_target: int | None, of_other: int | None
) -> tuple[Prompt, ...]:
    """At most so many prompts of each target and of each other group, in their order."""
    taken: dict[str, int] = {}
    chosen = []
    for prompt in prompts:
        most, count = of_target if prompt.group in targets else of_other, taken.get(prompt.group, 0)
        if most is None or count < most:
            taken[prompt.group] = count + 1
            chosen.append(prompt)
    return tuple(chosen)


def evaluate(
    evaluators: Sequence[Evaluator], images: Images, targets: Collection[str]
) -> tuple[list[Record], list[dict[str, Any]]]:
    """Per-image records, and the rows of `aggregate`.

    Paired evaluators measure what the edit changed, so they have nothing to say before it.
    """
    records: list[Record] = []
    rows: list[dict[str, Any]] = []
    for evaluator in evaluators:
        sets = images[evaluator.measures]
        for state, judged in sets.items():
            if evaluator.paired and state == "before":
                continue
            logger.info("measuring %s %s the edit", evaluator.name, state)
            references = sets["before"] if evaluator.paired else None
            scored = list(score_image_set(evaluator, judged, references))
            origin = {"state": state, "metric": evaluator.name, "images": judged.folder.name}
            records += [origin | record for record in scored]
            rows += aggregate(evaluator, scored, targets, state)
    return records, rows


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
        rows = [_row("general", None, len(groups), POOLED, evaluator.aggregate(records))]
    else:
        rows = rows_by_group(groups, evaluator.aggregate, targets, evaluator.additive)
    return [{"state": state} | row for row in rows]


def rows_by_group(
    groups: Mapping[str, Sequence[T]],
    measure: Callable[[Sequence[T]], Metric],
    targets: Collection[str],
    additive: bool = False,
) -> list[dict[str, Any]]:
    """The rows of `aggregate` for the targets, the others and each group, without their state."""
    single = {name: measure(group) for name, group in groups.items()}
    rows = []
    for scope, is_target in (("target", True), ("others", False)):
        names = [name for name in groups if (name in targets) == is_target]
        if not names:
            continue
        over = POOLED if additive or len({len(groups[name]) for name in names}) == 1 else MEAN
        if len(names) == 1:
            metric = single[names[0]]
        elif over == POOLED:
            metric = measure([each for name in names for each in groups[name]])
        else:
            metric = mean_of_groups([single[name] for name in names])
        only = names[0] if is_target and len(names) == 1 else None
        rows.append(_row(scope, only, len(names), over, metric))
    return rows + [_row("group", name, 1, POOLED, metric) for name, metric in single.items()]


def _row(scope: str, group: str | None, groups: int, over: str, metric: Metric) -> dict[str, Any]:
    return {"scope": scope, "group": group, "groups": groups, "over": over} | asdict(metric)


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
