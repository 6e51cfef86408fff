"""Figure 2 in small: do the scores of a run's own edit predict what ablations do?"""

from __future__ import annotations

from cad.components import component_weights
from cad.concepts import Concept
from cad.edits import Edit, ScoredEdit
from cad.effects import EffectCorrelation, effect_correlation
from cad.errors import UserError
from cad.models.base import DiffusionModel


def check_effects(model: DiffusionModel, method: Edit, share: float) -> None:
    """Raise UserError for a method without scores, or an ablation of less than one weight."""
    method = _scored_edit(method)
    weights = component_weights(model, method.attribution.component)
    total = sum(weight.numel() for weight in weights.values())
    if round(share * total) < 1:
        raise UserError(
            f"effect.share={share} of the {total:,} weights of component="
            f"{method.attribution.component} is less than one: at least {1 / total:.2g} is needed"
        )


def correlate_effects(
    model: DiffusionModel, concept: Concept, method: Edit, *, count: int, share: float, seed: int
) -> EffectCorrelation:
    """Predicted against measured changes of the edit's own J over `count` random ablations.

    Each removes a random `share` of the component's weights; the scores are those that the edit was
    chosen from. Raises UserError for a method that has no scores.
    """
    method = _scored_edit(method)
    objective = method.objective(concept)
    scores = method.scored(model, objective).scores
    return effect_correlation(
        model, objective, method.attribution, count=count, share=share, seed=seed, scores=scores
    )


def _scored_edit(method: Edit) -> ScoredEdit:
    if not isinstance(method, ScoredEdit):
        raise UserError(f"effect.count: edit={method.name} makes no scores to check")
    return method
