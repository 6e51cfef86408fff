"""What a configuration has measured: its prompts and its evaluators, before any work is done."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

import hydra
from omegaconf import DictConfig

from cad.concepts import Concept
from cad.errors import UserError
from cad.models.base import DiffusionModel
from evaluation.evaluators.base import CONCEPT, GENERAL, Evaluator
from evaluation.prompts import Prompt, build_prompts

logger = logging.getLogger(__name__)


def build_needed_prompts(cfg: DictConfig, concepts: Sequence[Concept]) -> dict[str, list[Prompt]]:
    """The prompts that the chosen evaluators measure. UserError where the model has none of them.

    General captions are the model's (`model.prompts.general`); with none to measure, none are made.
    """
    targets = [concept.name for concept in concepts]
    kind = concepts[0].kind
    sources = {CONCEPT: cfg.prompts, GENERAL: cfg.model.prompts.general}
    found = {}
    for node in evaluator_nodes(cfg):
        evaluator = class_of(node)
        measured = evaluator.measures
        if sources[measured] is None:
            raise UserError(
                f"evaluator={evaluator.name} measures {measured} prompts, and model="
                f"{cfg.model.name} has none for concept={','.join(targets)}: choose prompts=NAME, "
                f"or set model.prompts.{GENERAL if measured == GENERAL else kind}"
            )
        if measured == CONCEPT and measured not in found:
            found[measured] = build_concept_prompts(cfg, targets)
        elif measured not in found:
            general = build_prompts(hydra.utils.instantiate(sources[measured], _convert_="all"))
            found[measured] = take_in_turn(general, targets, cfg.limit)
    if not found and not cfg.attacks:
        logger.warning(
            "no evaluator is chosen, or model=%s has none for %s concepts: the edit is made and "
            "saved, nothing is measured",
            cfg.model.name,
            kind,
        )
    return found


def build_concept_prompts(cfg: DictConfig, targets: Sequence[str]) -> list[Prompt]:
    """The chosen prompts up to the limit. UserError where a target is not among their groups."""
    prompt_set = hydra.utils.instantiate(cfg.prompts, _convert_="all")
    prompts = build_prompts(prompt_set)
    _check_targets(prompts, targets, prompt_set.name)
    return take_in_turn(prompts, targets, cfg.limit)


def _check_targets(prompts: Sequence[Prompt], targets: Sequence[str], set_name: str) -> None:
    groups = dict.fromkeys(prompt.group for prompt in prompts)
    missing = [target for target in targets if target not in groups]
    if missing:
        raise UserError(
            f"concept={','.join(missing)} has no images in the prompts {set_name}, whose groups "
            f"are: {', '.join(groups)}. Choose a concept among them, or other prompts "
            "(prompts=NAME)"
        )


def take_in_turn(
    prompts: Sequence[Prompt], targets: Collection[str], limit: int | None
) -> list[Prompt]:
    """At most `limit` prompts, in their order: group by group in turn, the targets' first."""
    if limit is None:
        return list(prompts)
    seen: dict[str, int] = {}
    ranks: list[tuple[int, bool, int]] = []
    for index, prompt in enumerate(prompts):
        seen[prompt.group] = seen.get(prompt.group, 0) + 1
        ranks.append((seen[prompt.group], prompt.group not in targets, index))
    return [prompts[index] for index in sorted(index for *_, index in sorted(ranks)[:limit])]


def build_evaluators(cfg: DictConfig, built: Sequence[Evaluator] = ()) -> list[Evaluator]:
    """The chosen evaluators with their weights loaded; none where nothing is measured.

    Those `built` before are taken as they are.
    """
    by_class = {type(evaluator): evaluator for evaluator in built}
    return [
        by_class.get(class_of(node)) or hydra.utils.instantiate(node, _convert_="all")
        for node in evaluator_nodes(cfg)
    ]


def build_watchers(cfg: DictConfig, model: DiffusionModel) -> list[Evaluator]:
    """Evaluators that look at images while the GPU makes more; none where a CPU makes them.

    There both would share the cores, and neither would be done sooner.
    """
    if model.device.type == "cpu":
        return []
    return [
        hydra.utils.instantiate(node, _convert_="all")
        for node in evaluator_nodes(cfg)
        if class_of(node).foresees
    ]


def class_of(node: DictConfig) -> type[Evaluator]:
    """The class that an evaluator's node asks for."""
    found: type[Evaluator] = hydra.utils.get_class(node._target_)
    return found


def evaluator_nodes(cfg: DictConfig) -> list[DictConfig]:
    """The nodes of the chosen evaluators."""
    return [] if not cfg.evaluator else [node for node in cfg.evaluator.values() if node]


def judge_node(cfg: DictConfig) -> DictConfig:
    """Of the evaluator that judges attacks: attack.judge, or the model's for the concept's kind.

    Raises UserError where neither tells of one image whether it shows the concept.
    """
    kind = cfg.concept.kind
    given = "judge" in cfg.attack
    nodes = {cfg.attack.judge._target_: cfg.attack.judge} if given else cfg.model.evaluators[kind]
    for node in (nodes or {}).values():
        if class_of(node).judges is not None:
            found: DictConfig = node
            return found
    names = ", ".join(class_of(node).name for node in (nodes or {}).values()) or "none"
    whose = "attack.judge" if given else f"model={cfg.model.name} for {kind} concepts"
    raise UserError(
        "an attack is judged by an evaluator that tells of one image whether it shows the concept, "
        f"and that of {whose} ({names}) does not: evaluator@attack.judge=accuracy, style_accuracy, "
        "nudity and face do"
    )
