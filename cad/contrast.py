"""Contrastive CAD (not in the paper): what promotes a concept, less what preserved concepts need.

CAD ranks by S_c alone, so weights that other concepts share fall with the concept. Here every
concept's scores are brought to one scale, their positive sum Z(S) = sum max(S, 0), and what the
preserved concepts k lose with a weight is taken off:

    S = S_c / Z(S_c) - lambda * mean over k of P(S_k) / Z(S_k),

with P(S) = max(S, 0), the estimated loss of k where it is one, or |S|, any change of k. Of S the
usual top is zeroed. Amplifying zeroes what suppresses: there S_c is -S of Eq. 5, and the preserved
concepts count as before. Their scores are Eq. 4's, from prompts alone, so those of every erased
concept that lie in the store serve here too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from cad.attribution import Scored, is_stored
from cad.checks import check, not_negative, one_of, texts
from cad.compensation import Compensation
from cad.components import component_weights
from cad.concepts import Concept, beside, of_prompt
from cad.edits import CADAmplify, CADErase, ScoredEdit
from cad.errors import UserError
from cad.identity import answer
from cad.instrument import Cost, measure
from cad.models.base import DiffusionModel
from cad.objectives import WEIGHTINGS, EraseObjective
from cad.weight_edit import Change

PENALTIES = ("positive", "absolute")
OVER = ("mean", "max")

log = logging.getLogger(__name__)


@dataclass(eq=False, kw_only=True)
class Contrastive(ScoredEdit):
    """Ranks by the contrast with what is preserved. UserError for a value that is not allowed."""

    preserve: Sequence[str]  # c of Eq. 4 of each concept to keep; those being edited are left out
    preserve_scale: float = 1.0  # lambda; 0: the concept's own scores
    penalty: str = "positive"  # P: "positive" | "absolute"
    over: str = "mean"  # the preserved concepts: "mean" | "max"
    weighting: str = "model"  # of the timesteps in every J (`Objective`)
    compensation: Compensation = field(default_factory=Compensation)  # for the chosen weights

    def __post_init__(self) -> None:
        check(self, "edit", preserve=texts, preserve_scale=not_negative, over=one_of(OVER))
        check(self, "edit", penalty=one_of(PENALTIES), weighting=one_of(WEIGHTINGS))

    def settings(self, concepts: Sequence[Concept]) -> Mapping[str, Any]:
        return {
            **super().settings(concepts),
            "preserve": [dict(each.settings()) for each in self.preserved(concepts)],
            "preserve_scale": self.preserve_scale,
            "penalty": self.penalty,
            "over": self.over,
            "compensation": answer(self.compensation) if self.compensation.samples else None,
        }

    def preserved(self, concepts: Sequence[Concept]) -> list[EraseObjective]:
        """Eq. 4 of each concept to keep when these are edited, each once. UserError for none."""
        kept = beside(self.preserve, concepts)
        if not kept:
            raise UserError(
                f"edit.preserve={list(self.preserve)} keeps nothing beside what is edited: name "
                "prompts of other concepts, or use edit=erase."
            )
        return [EraseObjective(of_prompt(c), self.weighting) for c in kept]

    def rankings(self, model: DiffusionModel, concepts: Sequence[Concept]) -> Iterator[Scored]:
        kept = self.preserved(concepts)
        model.check_prompts([each.concept.prompt for each in kept])
        if self.compensation.samples:
            self.compensation.check(component_weights(model, self.attribution.component))
        penalty, cost = self._penalty(model, kept)
        for scored in super().rankings(model, concepts):
            with measure(model.device) as subtracting:
                subtract(scored.scores, penalty, self.preserve_scale, self.sign)
            yield replace(scored, cost=cost + scored.cost + subtracting.cost)
            cost = Cost()  # counts once

    def changes(
        self, model: DiffusionModel, concepts: Sequence[Concept], chosen: Mapping[str, Tensor]
    ) -> dict[str, Change]:
        if not self.compensation.samples:
            return super().changes(model, concepts, chosen)
        preserved = [each.concept.prompt for each in self.preserved(concepts)]
        edited = [each.prompt for each in concepts]
        return self.compensation.changes(model, chosen, preserved, edited, self.attribution)

    def _penalty(
        self, model: DiffusionModel, kept: Sequence[EraseObjective]
    ) -> tuple[dict[str, Tensor], Cost]:
        """Mean or maximum of P(S_k) / Z(S_k), one concept's scores in memory at a time."""
        total: dict[str, Tensor] = {}
        cost = Cost()
        if self.preserve_scale == 0:
            return total, cost
        given = (self.attribution, self.store)
        todo = sum(not is_stored(model, each, *given) for each in kept)
        log.info("%s: preserves %d concepts, %d still to be scored", self.name, len(kept), todo)
        with logging_redirect_tqdm():
            for objective in tqdm(kept, "preserved", unit="concept", disable=None):
                scored = self.scored(model, objective)
                with measure(model.device) as adding:
                    accumulate(total, scored.scores, self.penalty, self.over)
                cost += scored.cost + adding.cost
                del scored
        if self.over == "mean":
            for each in total.values():
                each /= len(kept)
        return total, cost


@dataclass(eq=False)
class CADContrast(Contrastive, CADErase):
    """Erases: zeroes what promotes the concept more than the preserved ones."""

    name = "contrast"


@dataclass(eq=False)
class CADContrastAmplify(Contrastive, CADAmplify):
    """Amplifies: zeroes what suppresses the concept and the preserved ones need little."""

    name = "contrast_amplify"


def accumulate(
    total: dict[str, Tensor], scores: Mapping[str, Tensor], penalty: str, over: str
) -> None:
    """Adds P(S_k) / Z(S_k) of one concept to the sums, or maxima, so far; {name: (out, in)}.

    Writes to `total` alone. UserError, as `positive_sum`.
    """
    scale = 1 / positive_sum(scores)
    for name, score in scores.items():
        found = (score.clamp(min=0) if penalty == "positive" else score.abs()).mul_(scale)
        if name not in total:
            total[name] = found
        elif over == "mean":
            total[name] += found
        else:
            torch.maximum(total[name], found, out=total[name])


def subtract(
    scores: Mapping[str, Tensor], penalty: Mapping[str, Tensor], scale: float, sign: int
) -> None:
    """Makes of S_c, in place, the module's S times `sign`: +1 chooses its largest, -1 its smallest.

    Without a penalty the scores are only brought to their scale. UserError, as `positive_sum`.
    """
    own = 1 / positive_sum(scores, sign)
    for name, score in scores.items():
        score.mul_(own)
        if penalty:
            score.sub_(penalty[name], alpha=sign * scale)


def positive_sum(scores: Mapping[str, Tensor], sign: int = 1) -> float:
    """Z: the sum of all positive scores, times `sign`. UserError where there is none."""
    parts = ((sign * each).clamp(min=0).sum(dtype=torch.float64) for each in scores.values())
    total = float(sum(parts))
    if total == 0:
        raise UserError("not one score has the sign that is looked for: nothing can be ranked.")
    return total
