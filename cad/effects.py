"""Does the attribution tell the truth? Predicted against measured changes of J (Figure 2).

The states x_t and the targets are recorded once from the unedited model; J is then evaluated on
them with edited weights. So prediction and measurement differ by nothing but the higher orders in
the weights: on a J that is linear in them they are equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from cad.attribution import Attribution
from cad.components import component_weights
from cad.errors import UserError
from cad.models.base import Conditioning, DiffusionModel
from cad.objectives import Objective, State
from cad.trajectories import NoisePlan
from cad.weight_edit import WeightEdit, Zero

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RecordedObjective:
    """J at fixed noise: its states and targets, as the unedited model reached and made them."""

    objective: Objective
    conditioning: Conditioning  # c, (1, ...)
    states: list[State]
    samples: int
    unedited: float  # J of the unedited model

    @classmethod
    def record(cls, model: DiffusionModel, objective: Objective, plan: NoisePlan) -> Self:
        """Walks the plan once. An `Attribution` is a plan, so its very own states are recorded."""
        with torch.no_grad():
            states = [state for state, _ in objective.terms(model, plan)]
        c = objective.conditioning(model)
        unedited = _value(model, objective, c, states, plan.samples)
        return cls(objective, c, states, plan.samples, unedited)

    def value(self, model: DiffusionModel) -> float:
        """J of the model as it is now, at the recorded states."""
        return _value(model, self.objective, self.conditioning, self.states, self.samples)


def predict_effect(
    scores: Mapping[str, Tensor], indices: Mapping[str, Tensor], factor: float = 0.0
) -> float:
    """First-order change of J if the weights at flat `indices` are multiplied by `factor`.

    (factor - 1) * sum of scores, from Eq. 3; the default factor 0 removes the components. In units
    of J; negative where J falls.
    """
    total = sum(
        float(scores[name].flatten()[flat.to(scores[name].device).long()].double().sum())
        for name, flat in indices.items()
    )
    return (factor - 1.0) * total


def measure_effect(model: DiffusionModel, recorded: RecordedObjective, edit: WeightEdit) -> float:
    """J(edited) - J(unedited) at the recorded states. Leaves the model bit for bit as it was."""
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
    Raises UserError for fewer than 2 ablations or a share outside (0, 1) or below one weight.
    """
    weights = component_weights(model, attribution.component)
    size = _ablation_size(weights, count, share)
    if scores is None:
        scores = attribution.scores(model, objective)
    recorded = RecordedObjective.record(model, objective, attribution)
    provenance = {"model": model.provenance()}
    generator = np.random.default_rng(seed)
    predicted, measured = np.empty(count), np.empty(count)  # (count,)
    for i in tqdm(range(count), desc="ablations", disable=None):
        indices = random_components(weights, size, generator)
        edit = WeightEdit({name: Zero(flat) for name, flat in indices.items()}, provenance)
        predicted[i] = predict_effect(scores, indices)
        measured[i] = measure_effect(model, recorded, edit)
    return EffectCorrelation(predicted, measured, pearson_r(predicted, measured))


def random_components(
    weights: Mapping[str, Tensor], size: int, generator: np.random.Generator
) -> dict[str, Tensor]:
    """`size` distinct components, uniform over all weights; {name: flat indices, ascending}."""
    counts = [weight.numel() for weight in weights.values()]
    chosen = generator.choice(sum(counts), size, replace=False, shuffle=False)  # (size,)
    bounds = np.cumsum(counts)[:-1]
    chosen.sort()
    parts = np.split(chosen, np.searchsorted(chosen, bounds))
    starts = np.concatenate([[0], bounds])
    return {
        name: torch.from_numpy(part - start)
        for name, part, start in zip(weights, parts, starts, strict=True)
        if len(part)
    }


def pearson_r(x: Array, y: Array) -> float:
    """Pearson's correlation of two samples (n,), in [-1, 1].

    Raises ValueError for unequal lengths, n < 2, or a sample without variance.
    """
    if x.shape != y.shape or x.ndim != 1 or len(x) < 2:
        raise ValueError(f"two samples of one length >= 2 are needed, got {x.shape}, {y.shape}")
    dx, dy = x - x.mean(), y - y.mean()
    scale = np.sqrt((dx @ dx) * (dy @ dy))
    if scale == 0.0:
        raise ValueError("the correlation with a constant is undefined")
    return float(np.clip(dx @ dy / scale, -1.0, 1.0))


@torch.no_grad()
def _value(
    model: DiffusionModel,
    objective: Objective,
    c: Conditioning,
    states: list[State],
    samples: int,
) -> float:
    total = 0.0  # a Python float, so that many small terms do not drown
    for state in states:
        prediction = model.predict(state.x_t, state.t, c.expand(len(state.x_t)))
        total += state.weight * float(objective.term(state.target, prediction))
    return total / samples


def _ablation_size(weights: Mapping[str, Tensor], count: int, share: float) -> int:
    if count < 2:
        raise UserError(f"effect.count={count}: a correlation needs at least 2 ablations.")
    if not 0.0 < share < 1.0:
        raise UserError(f"effect.share={share} is not allowed; a share lies in (0, 1).")
    total = sum(weight.numel() for weight in weights.values())
    size = round(share * total)
    if size == 0:
        raise UserError(f"effect.share={share} of {total} weights is less than one weight.")
    return size
