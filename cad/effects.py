"""Does the attribution tell the truth? Predicted against measured changes of J (Figure 2).

The x_t and the targets are recorded once from the unedited model; J is then evaluated on
them with edited weights. So prediction and measurement differ by nothing but the higher orders in
the weights: on a J that is linear in them they are equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from cad.attribution import Attribution, attribute
from cad.components import component_weights
from cad.concepts import Concept
from cad.edits import ScoredEdit
from cad.errors import UserError
from cad.models.base import DiffusionModel
from cad.objectives import Objective
from cad.trajectories import NoisePlan
from cad.weight_edit import WeightEdit, Zero

Array = NDArray[np.float64]


class RecordedObjective:
    """J at fixed noise: x_t and targets are those that the unedited model reached and made."""

    @torch.no_grad()
    def __init__(self, model: DiffusionModel, objective: Objective, plan: NoisePlan) -> None:
        """Walks the plan once. An `Attribution` is a plan, so its very own x_t are recorded."""
        self._objective = objective
        self._conditioning = objective.conditioning(model)  # c, (1, ...)
        self._comparisons = [at for at, _ in objective.terms(model, plan)[1]]
        self._samples = plan.samples
        self.unedited = self.value(model)  # J of the unedited model

    @torch.no_grad()
    def value(self, model: DiffusionModel) -> float:
        """J of the model as it is now, at the recorded x_t."""
        total = 0.0  # a Python float, so that many small terms do not drown
        for at in self._comparisons:
            prediction = model.predict(at.x_t, at.t, self._conditioning.expand(len(at.x_t)))
            total += at.weight * float(self._objective.term(at.target, prediction))
        return total / self._samples


def predict_effect(
    scores: Mapping[str, Tensor], indices: Mapping[str, Tensor], factor: float = 0.0
) -> float:
    """First-order change of J if the weights at flat `indices` are multiplied by `factor`.

    (factor - 1) * sum of scores, from Eq. 3; negative where J falls.
    """
    total = sum(
        float(scores[name].flatten()[flat.to(scores[name].device).long()].double().sum())
        for name, flat in indices.items()
    )
    return (factor - 1.0) * total


def measure_effect(model: DiffusionModel, recorded: RecordedObjective, edit: WeightEdit) -> float:
    """J(edited) - J(unedited) at the recorded x_t. Leaves the model bit for bit as it was."""
    with edit.applied(model):
        return recorded.value(model) - recorded.unedited


@dataclass(frozen=True, eq=False)
class EffectCorrelation:
    """Predicted and measured changes of J of random ablations, (count,) each."""

    predicted: Array
    measured: Array
    pearson_r: float


def effect_correlation(
    model: DiffusionModel,
    objective: Objective,
    attribution: Attribution,
    *,
    count: int,
    share: float,
    seed: int,
    scores: Mapping[str, Tensor] | None = None,
) -> EffectCorrelation:
    """Figure 2: removes a random `share` of the group's weights, `count` times independently.

    `scores` are those of this attribution, where they are at hand. Deterministic for `seed`.
    Raises UserError as `ablation_size`.
    """
    weights = component_weights(model, attribution.component)
    size = ablation_size(weights, count, share)
    if scores is None:
        scores = attribution.scores(model, objective)
    recorded = RecordedObjective(model, objective, attribution)
    provenance = {"model": model.provenance()}
    generator = np.random.default_rng(seed)
    predicted, measured = np.empty(count), np.empty(count)  # (count,)
    for i in tqdm(range(count), desc="ablations", disable=None):
        indices = random_components(weights, size, generator)
        edit = WeightEdit({name: Zero(flat) for name, flat in indices.items()}, provenance)
        predicted[i] = predict_effect(scores, indices)
        measured[i] = measure_effect(model, recorded, edit)
    return EffectCorrelation(predicted, measured, pearson_r(predicted, measured))


@dataclass(frozen=True)
class ChosenEffect:
    """What an edit's own choice of weights does to J, beside what its scores say."""

    unedited: float  # J of the unedited model
    predicted: float  # change of J
    measured: float  # change of J
    overlap: float  # of the choice with those of other seeds' scores: intersection by union


def chosen_effect(
    model: DiffusionModel, method: ScoredEdit, concept: Concept, edit: WeightEdit, seeds: int
) -> ChosenEffect:
    """Means over so many further seeds, none of whose noise the edit's scores have seen.

    Predicted: the first order, from Eq. 3's scores of the concept, whatever the method chooses by.
    Raises UserError for an edit that does more than zeroing or multiplying weights.
    """
    indices = {name: each.tensor for name, each in edit.changes.items() if each.indexed}
    if len(indices) < len(edit.changes):
        raise UserError(
            f"effect.seeds={seeds}: edit={method.name} replaces weights, and scores predict what "
            "zeroing them does. Use effect.seeds=0, or no compensation."
        )
    (factor,) = {each.factor or 0.0 for each in edit.changes.values()} or {0.0}
    objective = method.objective(concept)
    own, found = method.attribution, []
    scores = attribute(model, objective, own, method.store).scores
    predicted = predict_effect(scores, indices, factor)
    for seed in tqdm(range(own.seed + 1, own.seed + 1 + seeds), desc="seeds", disable=None):
        plan = replace(own, seed=seed)
        recorded = RecordedObjective(model, objective, plan)
        other = replace(method, attribution=plan).make(model, [concept]).changes
        shared = overlap(indices, {name: each.tensor for name, each in other.items()})
        found.append((recorded.unedited, measure_effect(model, recorded, edit), shared))
    unedited, measured, shared = np.mean(found, axis=0).tolist()
    return ChosenEffect(unedited, predicted, measured, shared)


def overlap(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Jaccard's index of two choices {name: distinct flat indices}: intersection by union."""
    both = sum(
        int(torch.isin(first[name], second[name]).sum()) for name in first.keys() & second.keys()
    )
    sizes = sum(len(each) for chosen in (first, second) for each in chosen.values())
    return both / (sizes - both) if sizes else 1.0


def random_components(
    weights: Mapping[str, Tensor], size: int, generator: np.random.Generator
) -> dict[str, Tensor]:
    """`size` distinct components, uniform over all weights; {name: flat indices, ascending}."""
    ends = np.cumsum([weight.numel() for weight in weights.values()])
    chosen = np.sort(generator.choice(ends[-1], size, replace=False, shuffle=False))  # (size,)
    pieces = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
    return {
        name: torch.from_numpy(piece - (end - weights[name].numel()))
        for name, piece, end in zip(weights, pieces, ends, strict=True)
        if len(piece)
    }


def pearson_r(x: Array, y: Array) -> float:
    """Pearson's correlation of two samples (n,), in [-1, 1]. ValueError for a constant one."""
    dx, dy = x - x.mean(), y - y.mean()
    scale = np.sqrt((dx @ dx) * (dy @ dy))
    if scale == 0.0:
        raise ValueError("the correlation with a constant is undefined")
    return float(np.clip(dx @ dy / scale, -1.0, 1.0))


def ablation_size(weights: Mapping[str, Tensor], count: int, share: float) -> int:
    """How many weights an ablation removes. UserError for count < 2 or a share with no weight."""
    if count < 2:
        raise UserError(f"effect.count={count}: a correlation needs at least 2 ablations.")
    if not 0.0 < share < 1.0:
        raise UserError(f"effect.share={share} is not allowed; a share lies in (0, 1).")
    total = sum(weight.numel() for weight in weights.values())
    size = round(share * total)
    if size == 0:
        raise UserError(f"effect.share={share} of {total} weights is less than one weight.")
    return size
