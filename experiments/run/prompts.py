"""Which prompts an experiment draws: the sets that are needed, and what is taken of them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence

from omegaconf import DictConfig

from cad.errors import UserError
from evaluation.evaluators.base import GENERAL, Evaluator
from evaluation.prompts import Prompt, PromptSet, build_prompts
from experiments.run.configuration import adding, build

ATTACKED = "attacked"

Prompts = dict[str, tuple[Prompt, ...]]
"""By their use: those that evaluators measure (CONCEPT, GENERAL), and those that are ATTACKED."""

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
        node = cfg.model.prompts.general if use == GENERAL else cfg.prompts
        if node is None:
            key = GENERAL if use == GENERAL else cfg.concept.kind
            raise UserError(
                f"{reason} prompts, and model={cfg.model.name} has none for concept="
                f"{','.join(cfg.concepts)}: choose prompts=NAME, or set model.prompts.{key}"
            )
        needed[use] = build(node)
    return needed


def read_prompts(cfg: DictConfig, prompt_sets: Mapping[str, PromptSet]) -> Prompts:
    """The sets' prompts up to the limits; files are downloaded the first time.

    Raises UserError where a target is not among the groups of prompts for concepts.
    """
    targets = [concept.name for concept in cfg.concepts.values()]
    found = {}
    for use, prompt_set in prompt_sets.items():
        prompts = build_prompts(prompt_set)
        groups = dict.fromkeys(prompt.group for prompt in prompts)
        for concept in cfg.concepts.values():
            if use != GENERAL and concept.name not in groups:
                raise UserError(
                    f"concept={concept.name} has no images in the prompts {prompt_set.name}, whose "
                    f"groups are: {', '.join(groups)}. Choose a concept among them, or other "
                    f"prompts, such as {adding(concept)}"
                )
        found[use] = take_in_turn(prompts, targets, cfg.limit)
        if use == ATTACKED:
            found[use] = take_of_targets(found[use], targets, cfg.attack.limit)
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


def take_of_targets(
    prompts: Sequence[Prompt], targets: Collection[str], limit: int | None
) -> tuple[Prompt, ...]:
    """The targets' prompts, in their order; at most `limit` of each target."""
    taken = dict.fromkeys(targets, 0)
    chosen = []
    for prompt in prompts:
        if prompt.group in taken and (limit is None or taken[prompt.group] < limit):
            taken[prompt.group] += 1
            chosen.append(prompt)
    return tuple(chosen)
