"""Figure 2 in small: do the scores of a run's own edit predict what ablations do?"""

from __future__ import annotations

from cad.components import component_weights
from cad.concepts import Concept
from cad.edits import CADAmplify, CADErase, CADRescale, Edit
from cad.effects import EffectCorrelation, effect_correlation
from cad.errors import UserError
from cad.models.base import DiffusionModel

SCORED = (CADErase, CADAmplify, CADRescale)  # the edits that choose by attribution scores


def check_effects(model: DiffusionModel, method: Edit, share: float) -> None:
    """Raise UserError for a method without scores, or an ablation of less than one weight."""
    if not isinstance(method, SCORED):
        raise UserError(f"effect.count: edit={method.name} makes no scores to check")
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
    if not isinstance(method, SCORED):
        raise UserError(f"effect.count={count}: edit={method.name} makes no scores to check")
    objective = method.objective(concept)
    scores = None
    if method.store is not None:
        scores = method.store.scored(model, objective, method.attribution).scores
    return effect_correlation(
        model, objective, method.attribution, count=count, share=share, seed=seed, scores=scores
    )
