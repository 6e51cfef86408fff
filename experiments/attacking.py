"""White-box attacks on the edited model: which prompts, who judges, what came of them.

Two quantities: the share of prompts whose image shows the concept as it is (`success without
attack`), and for each attack the share of those that show it in the end, these included, as the
paper's Table 3 counts.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig

from cad.errors import UserError
from cad.gradient_checkpointing import check_gradient_checkpointing
from cad.models.base import DiffusionModel
from cad.weight_edit import WeightEdit
from evaluation.attacks.base import Attack
from evaluation.attacks.judge import EvaluatorJudge
from evaluation.attacks.search import Outcome, places
from evaluation.attacks.store import AttackStore, record_of
from evaluation.evaluators.base import BATCH_SIZE, Metric
from evaluation.files import write_atomically
from evaluation.generation import SamplerSettings, check_prompts, generate
from evaluation.image_sets import ImageSet
from evaluation.masking import Masker
from evaluation.prompts import Prompt
from evaluation.statistics import wilson
from experiments.aggregation import MEAN, POOLED, mean_of_groups
from experiments.attack_pictures import attack_picture
from experiments.config import plain
from experiments.measuring import build_concept_prompts, judge_node

NOT_ARGUMENTS = {"name", "values"}  # of the attack's class: what the configuration says of itself
RECORDS = "attacks.jsonl"
PICTURE = "attack.png"
WITHOUT_ATTACK = "success_rate_without_attack"
NOT_NEEDED: dict[str, Any] = {  # of a prompt that succeeds without attack
    "timesteps": 0,
    "timestep": None,
    "tokens": [],
    "text": None,
    "retokenizes": None,
    "losses": [],
}

Outcomes = dict[Attack, dict[int, Outcome]]
"""Of each attack, by the prompt's index; prompts that succeed without attack have none."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Assault:
    """The chosen attacks, none as a rule, and the prompts of the targets that they start from."""

    attacks: tuple[Attack, ...]
    prompts: tuple[Prompt, ...]


def build_assault(cfg: DictConfig, targets: Sequence[str]) -> Assault:
    """The attacks of a configuration. Raises UserError for a setting's mistake or no prompts."""
    attacks = build_attacks(cfg)
    if not attacks:
        return Assault((), ())
    if cfg.prompts is None:
        raise UserError(
            f"attack={','.join(cfg.attacks)} starts from prompts, and model={cfg.model.name} has "
            f"none for concept={','.join(targets)}: choose prompts=NAME"
        )
    prompts = build_concept_prompts(cfg, targets)
    return Assault(tuple(attacks), tuple(_of_targets(prompts, targets, cfg.attack.limit)))


def build_attacks(cfg: DictConfig) -> list[Attack]:
    """The chosen attacks. Raises UserError for a setting's mistake."""
    attacks = []
    for node in cfg.attacks.values():
        arguments = {k: v for k, v in plain(node).items() if k not in NOT_ARGUMENTS}
        attacks.append(hydra.utils.instantiate(arguments, _convert_="all"))
    return attacks


def _of_targets(
    prompts: Sequence[Prompt], targets: Collection[str], limit: int | None
) -> list[Prompt]:
    """The targets' prompts, of each at most `limit`, in their order."""
    taken = dict.fromkeys(targets, 0)
    chosen = []
    for prompt in prompts:
        if prompt.group in taken and (limit is None or taken[prompt.group] < limit):
            taken[prompt.group] += 1
            chosen.append(prompt)
    return chosen


def check_attacks(cfg: DictConfig, assault: Assault, model: DiffusionModel) -> None:
    """Raise UserError for a model, prompts or a judge that the attacks cannot work with."""
    for attack in assault.attacks:
        check_prompts(model, assault.prompts)
        places(model.token_space(), assault.prompts, attack.schedule.tokens)
        attack.sampler(model)
        key = f"attacks.{attack.name}.gradient_checkpointing"
        check_gradient_checkpointing(model, attack.schedule.gradient_checkpointing, key)
    if assault.attacks:
        _judge(cfg).check(assault.prompts)


def run_attacks(
    work: Path,
    cfg: DictConfig,
    assault: Assault,
    model: DiffusionModel,
    edit: WeightEdit,
    settings: SamplerSettings,
) -> list[dict[str, Any]]:
    """Rows of metrics; every prompt in `attacks.jsonl` and the first ones in `attack.png`.

    Goes on where an earlier attempt stopped. Leaves the model as found. Writes nothing where no
    attack is chosen.
    """
    if not assault.attacks:
        return []
    judge, prompts = _judge(cfg), assault.prompts
    originals = generate(model, edit, prompts, settings, Path(cfg.paths.images))
    shown = _judged(judge, originals)
    logger.info("%d of %d prompts succeed without attack", sum(shown), len(shown))
    rows = _rows(WITHOUT_ATTACK, judge.version, prompts, shown)
    left = [index for index, visible in enumerate(shown) if not visible]
    attacked = [prompts[index] for index in left]
    store = AttackStore(Path(cfg.attack.store))
    outcomes = {
        attack: dict(
            zip(left, store.attack(model, edit, attack, attacked, settings, judge), strict=True)
        )
        for attack in assault.attacks
    }
    for attack, found in outcomes.items():
        version = f"{attack.name}-{attack.version}/{judge.version}"
        success = [visible or found[index].success for index, visible in enumerate(shown)]
        rows += _rows(f"{attack.name}_success_rate", version, prompts, success)
    _write_records(work / RECORDS, prompts, outcomes)
    mask = Masker() if cfg.safety.mask and cfg.concept.kind == "explicit" else None
    attack_picture(originals, _images(outcomes), work / PICTURE, mask)
    state = "before" if cfg.edit.name == "none" else "after"
    return [{"state": state} | row for row in rows]


def _judge(cfg: DictConfig) -> EvaluatorJudge:
    return EvaluatorJudge(hydra.utils.instantiate(judge_node(cfg), _convert_="all"))


def _judged(judge: EvaluatorJudge, images: ImageSet) -> list[bool]:
    return [
        verdict
        for prompts, pixels in images.batches(BATCH_SIZE)
        for verdict in judge(pixels, prompts)
    ]


def _write_records(path: Path, prompts: Sequence[Prompt], outcomes: Outcomes) -> None:
    """A line for each attack and prompt, attack by attack."""
    records = [
        _record(attack, index, prompt, found.get(index))
        for attack, found in outcomes.items()
        for index, prompt in enumerate(prompts)
    ]
    lines = [json.dumps(each, ensure_ascii=False, allow_nan=False) + "\n" for each in records]
    write_atomically(path, "".join(lines).encode())


def _record(attack: Attack, index: int, prompt: Prompt, outcome: Outcome | None) -> dict[str, Any]:
    """A line of the records; of a prompt that succeeded without attack if there is no outcome."""
    origin = {"attack": attack.name, "index": index, "prompt": prompt.text, "seed": prompt.seed}
    origin |= {"group": prompt.group, **prompt.own_settings()}
    if outcome is None:
        return origin | {"without_attack": True, "success": True, "iterations": 0} | NOT_NEEDED
    iterations = outcome.timesteps * attack.schedule.iterations
    return origin | {"without_attack": False, "iterations": iterations} | record_of(outcome)


def _images(outcomes: Outcomes) -> dict[str, dict[int, NDArray[np.uint8]]]:
    """The adversarial images by the attack's name and the prompt's index."""
    return {
        attack.name: {index: outcome.image for index, outcome in found.items()}
        for attack, found in outcomes.items()
    }


def _rows(
    name: str, version: str, prompts: Sequence[Prompt], success: Sequence[bool]
) -> list[dict[str, Any]]:
    """The row of all targets and one for each group, as `experiments.aggregation` has them."""
    by_group: dict[str, list[bool]] = {}
    for prompt, succeeded in zip(prompts, success, strict=True):
        by_group.setdefault(prompt.group, []).append(succeeded)
    metrics = {group: _share(name, version, each) for group, each in by_group.items()}
    only = prompts[0].group if len(metrics) == 1 else None
    if len({metric.n for metric in metrics.values()}) == 1:
        whole, over = _share(name, version, success), POOLED
    else:
        whole, over = mean_of_groups(list(metrics.values())), MEAN
    rows = [_row("target", only, len(metrics), over, whole)]
    return rows + [_row("group", group, 1, POOLED, each) for group, each in metrics.items()]


def _row(scope: str, group: str | None, groups: int, over: str, metric: Metric) -> dict[str, Any]:
    return {"scope": scope, "group": group, "groups": groups, "over": over} | asdict(metric)


def _share(name: str, version: str, success: Sequence[bool]) -> Metric:
    """The share of prompts that succeed, in [0, 1], with Wilson's interval."""
    interval = wilson(sum(success), len(success))
    return Metric(name, *interval, len(success), "share", 2, False, version)
