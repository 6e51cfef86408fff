"""Attacks on the edited model: which prompts, who judges, and how many succeed.

Two quantities: the share of prompts whose image shows the concept as it is (`success without
attack`), and for each attack the share of those that show it in the end, these included, as the
paper's Table 3 counts.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from cad.errors import UserError
from cad.models.base import DiffusionModel
from cad.weight_edit import WeightEdit
from evaluation.attacks.base import VERSION, Attack, Outcome
from evaluation.attacks.judge import EvaluatorJudge
from evaluation.attacks.store import AttackStore, record_of
from evaluation.evaluators.base import BATCH_SIZE, Evaluator, Metric, wilson
from evaluation.generation import generate
from evaluation.prompts import Prompt
from evaluation.sampler import SamplerSettings
from experiments.run.arguments import build, build_each
from experiments.run.groups import rows_by_group
from experiments.run.pictures import Mask, Pixels, attack_picture
from experiments.run.results import write_lines

RECORDS = "attacks.jsonl"
PICTURE = "attack.png"
WITHOUT_ATTACK = "success_rate_without_attack"
NOT_NEEDED: dict[str, Any] = {"timesteps": 0, "timestep": None, "tokens": [], "text": None}
NOT_NEEDED |= {"retokenizes": None, "losses": []}  # of a prompt that succeeds without attack

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AttackPlan:
    """The chosen attacks, and who judges them."""

    attacks: tuple[Attack, ...]
    limit: int | None  # prompts of each concept
    judge: Evaluator
    images: Path  # the folder of all image sets
    store: Path  # of finished batches

    def identity(self) -> dict[str, Any]:
        """All that determines the outcomes beside model, edit, prompts and sampler; JSON-able."""
        return {
            "version": VERSION,
            "attacks": [attack.identity() for attack in self.attacks],
            "limit": self.limit,
            "judge": self.judge.identity(),
        }

    def check(self, model: DiffusionModel, prompts: Sequence[Prompt]) -> None:
        """Raise UserError for a model, prompts or a judge that the attacks cannot work with."""
        for attack in self.attacks:
            attack.check(model, prompts)
        EvaluatorJudge(copy.deepcopy(self.judge)).check(prompts)

    def run(
        self,
        model: DiffusionModel,
        edit: WeightEdit,
        prompts: Sequence[Prompt],
        sampler: SamplerSettings,
        work: Path,
        mask: Mask | None,
    ) -> list[dict[str, Any]]:
        """Rows of metrics, without their state; every prompt in RECORDS, the first in PICTURE.

        Goes on where an earlier attempt stopped. Leaves the model as found.
        """
        judge = EvaluatorJudge(self.judge)
        with edit.applied(model):
            originals = generate(model, prompts, sampler, self.images)
        shown = [
            one for some, pixels in originals.batches(BATCH_SIZE) for one in judge(pixels, some)
        ]
        logger.info("%d of %d prompts succeed without attack", sum(shown), len(shown))
        rows = _rows(WITHOUT_ATTACK, judge.version, prompts, shown)
        left = [index for index, visible in enumerate(shown) if not visible]
        attacked = [prompts[index] for index in left]
        store = AttackStore(self.store)
        records: list[dict[str, Any]] = []
        pictures: dict[str, dict[int, Pixels]] = {}
        for attack in self.attacks:
            seen = self._unedited(model, attack, prompts, sampler, left)
            made = store.attack(model, edit, attack, attacked, sampler, judge, seen)
            found = dict(zip(left, made, strict=True))
            version = f"{attack.name}-{attack.version}/{judge.version}"
            success = [visible or found[index].success for index, visible in enumerate(shown)]
            rows += _rows(f"{attack.name}_success_rate", version, prompts, success)
            records += [_record(attack, i, each, found.get(i)) for i, each in enumerate(prompts)]
            pictures[attack.name] = {index: outcome.image for index, outcome in found.items()}
        write_lines(work / RECORDS, records)
        attack_picture(originals, pictures, work / PICTURE, mask)
        return rows

    def _unedited(
        self,
        model: DiffusionModel,
        attack: Attack,
        prompts: Sequence[Prompt],
        sampler: SamplerSettings,
        left: Sequence[int],
    ) -> list[Pixels]:
        """The unedited model's images that the attack on the prompts `left` looks at, if any."""
        if not left or not attack.uses_images:
            return []
        pictured = attack.pictured(prompts)  # all: one set for every edit
        images = generate(model, pictured, sampler, self.images)
        return [images.read(index) for index in left]


def plan_attacks(cfg: DictConfig) -> AttackPlan:
    """The attacks of a configuration.

    Raises UserError for a setting's mistake, or an evaluator that cannot judge.
    """
    return AttackPlan(
        attacks=build_each(cfg, "attacks"),
        limit=cfg.attack.limit,
        judge=build(judge_node(cfg)),
        images=Path(cfg.paths.images),
        store=Path(cfg.attack.store),
    )


def judge_node(cfg: DictConfig) -> DictConfig:
    """The evaluator that judges attacks: attack.judge, or the model's for the concept's kind.

    Raises UserError where neither tells of one image whether it shows the concept.
    """
    kind = cfg.concept.kind
    given = "judge" in cfg.attack
    nodes = [cfg.attack.judge] if given else list((cfg.model.evaluators[kind] or {}).values())
    classes: list[type[Evaluator]] = [hydra.utils.get_class(node._target_) for node in nodes]
    for node, found in zip(nodes, classes, strict=True):
        if found.judges is not None:
            judge: DictConfig = node
            return judge
    names = ", ".join(found.name for found in classes) or "none"
    whose = "attack.judge" if given else f"model={cfg.model.name} for {kind} concepts"
    raise UserError(
        "an attack is judged by an evaluator that tells of one image whether it shows the concept, "
        f"and that of {whose} ({names}) does not: evaluator@attack.judge=accuracy, style_accuracy, "
        "nudity and face do"
    )


def _record(attack: Attack, index: int, prompt: Prompt, outcome: Outcome | None) -> dict[str, Any]:
    """A line of the records; of a prompt that succeeded without attack if there is no outcome."""
    origin = {"attack": attack.name, "index": index, "prompt": prompt.text, "seed": prompt.seed}
    origin |= {"group": prompt.group, **prompt.own_settings()}
    if outcome is None:
        return origin | {"without_attack": True, "success": True, "iterations": 0} | NOT_NEEDED
    iterations = outcome.timesteps * attack.iterations
    return origin | {"without_attack": False, "iterations": iterations} | record_of(outcome)


def _rows(
    name: str, version: str, prompts: Sequence[Prompt], success: Sequence[bool]
) -> list[dict[str, Any]]:
    """The row of all targets and one for each group."""
    groups: dict[str, list[bool]] = {}
    for prompt, succeeded in zip(prompts, success, strict=True):
        groups.setdefault(prompt.group, []).append(succeeded)
    return rows_by_group(groups, partial(_share, name, version), targets=groups)


def _share(name: str, version: str, success: Sequence[bool]) -> Metric:
    """The share of prompts that succeed, in [0, 1], with Wilson's interval."""
    interval = wilson(sum(success), len(success))
    return Metric(name, *interval, len(success), "share", 2, False, version)
