"""A learned mask, after Minimalist Concept Erasure (Zhang et al. 2025, arXiv 2507.13386).

Every component i has a gate m_i = sigmoid(l_i) that its weights are multiplied by. Adam minimises

    ||Phi_m(x_t, c, t) - Phi(x_t, c_b, t)||^2 / E + lambda ||Phi_m(x_t', k, t) - Phi(x_t', k, t)||^2
    / E + mu sum_i (1 - m_i) / n

at states x_t of the concept's trajectories and x_t' of kept prompts k; Phi is the unedited network,
E the mean of ||Phi(x_t, c, t) - Phi(x_t, c_b, t)||^2, n the number of components that may go. In
the end those with m_i < 1/2 are zeroed, the n with the smallest gates at most.

The start is CAD's: what its scores choose begins just below 1/2, all else near 1. Ours: the paper
has no scores, draws hard gates, and takes one loss on final images through all steps of sampling;
here it is of single predictions, as Eq. 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from baselines.training import with_weights
from cad.attribution import Scored
from cad.checks import check, not_negative, positive, texts, whole
from cad.components import component_weights
from cad.concepts import Concept, beside
from cad.edits import CADErase
from cad.errors import UserError
from cad.instrument import measure
from cad.models.base import DiffusionModel
from cad.models.conditioning import Conditioning
from cad.objectives import Objective
from cad.sampling import make_generators
from cad.trajectories import visits
from cad.units import find_units

UNITS = ("weight", "neuron")
OPEN, CHOSEN = 3.0, -0.1  # logits at the start: gates of 0.95 and 0.475


@dataclass(frozen=True)
class Wanted:
    """Batches of states (x_t, t) with the predictions that are wanted there, of one prompt."""

    c: Conditioning  # (1, ...)
    states: Sequence[tuple[Tensor, Tensor, Tensor]]


@dataclass(eq=False)
class LearnedMask(CADErase):
    """The method with its settings; UserError for a value that is not allowed."""

    name = "learned_mask"

    preserve: Sequence[str] = field(kw_only=True)  # k; those being edited are left out
    iterations: int = field(kw_only=True)  # of Adam
    lr: float = field(default=0.1, kw_only=True)
    preserve_scale: float = field(default=1.0, kw_only=True)  # lambda
    sparsity: float = field(default=0.1, kw_only=True)  # mu
    samples: int = field(default=2, kw_only=True)  # trajectories, otherwise as the attribution's

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "edit", preserve=texts, iterations=whole(1), lr=positive, samples=whole(1))
        check(self, "edit", preserve_scale=not_negative, sparsity=not_negative)
        if self.selection.unit not in UNITS:
            raise UserError(f"ratio.unit={self.selection.unit} has no gates: {', '.join(UNITS)}.")

    def settings(self, concepts: Sequence[Concept]) -> Mapping[str, Any]:
        names = ("iterations", "lr", "preserve_scale", "sparsity", "samples")
        own = {name: getattr(self, name) for name in names}
        return {**super().settings(concepts), **own, "preserve": self.kept(concepts)}

    def kept(self, concepts: Sequence[Concept]) -> list[str]:
        """The prompts to keep. UserError for none."""
        found = beside(self.preserve, concepts)
        if not found:
            raise UserError(f"edit.preserve={list(self.preserve)} keeps nothing: name prompts.")
        return found

    def scored(self, model: DiffusionModel, objective: Objective) -> Scored:
        """1/2 less the gates: positive is what goes."""
        kept = self.kept([objective.concept])
        model.check_prompts(kept)
        scored = super().scored(model, objective)
        weights = component_weights(model, self.attribution.component)
        with measure(model.device) as meter:
            units = find_units(model, weights, self.selection.unit)
            chosen = self.selection.indices(scored.scores, self.sign, units)
            logits = start_logits(weights, chosen, self.selection.unit == "neuron")
            erased = self._wanted(model, objective.concept.prompt, objective.concept.base_prompt)
            others = [self._wanted(model, prompt, prompt) for prompt in kept]
            self._learn(model, weights, logits, erased, others, max(1, _count(logits, below=0.0)))
            scores = {
                name: (0.5 - logit.detach().sigmoid()).expand(weights[name].flatten(1).shape)
                for name, logit in logits.items()
            }
        return Scored(scores, scored.cost + meter.cost)

    def _wanted(self, model: DiffusionModel, prompt: str, instead: str) -> Wanted:
        """The states of a prompt's trajectories, with the predictions for another one."""
        plan = replace(self.attribution, samples=self.samples)
        c, empty, b = model.encode_prompts([prompt, "", instead], apart=True).split()
        states = []
        with torch.no_grad():
            for at in visits(model, plan, c, empty):
                target = model.predict(at.x_t, at.t, b.expand(len(at.x_t)))
                states.append((at.x_t, at.t, target.float()))
        return Wanted(c, states)

    def _learn(
        self,
        model: DiffusionModel,
        weights: Mapping[str, Tensor],
        logits: Mapping[str, Tensor],
        erased: Wanted,
        others: Sequence[Wanted],
        count: int,
    ) -> None:
        """Moves the logits, in place."""

        def error(wanted: Wanted, number: int) -> Tensor:
            x_t, t, target = wanted.states[number]
            prediction = model.predict(x_t, t, wanted.c.expand(len(x_t)))
            return (prediction.float() - target).square().mean()

        with torch.no_grad():
            scale = sum(error(erased, i) for i in range(len(erased.states))) / len(erased.states)
        adam = torch.optim.Adam(logits.values(), lr=self.lr)
        (generator,) = make_generators([self.attribution.seed], salt=self.name)
        draws = [
            [int(torch.randint(end, (1,), generator=generator)) for end in ends]
            for ends in [(len(erased.states), len(others), len(erased.states))] * self.iterations
        ]
        with torch.enable_grad():
            for own, other, its in tqdm(draws, self.name, unit="step", disable=None):
                gates = {name: logit.sigmoid() for name, logit in logits.items()}
                gated = {name: gate_weight(weights[name], gate) for name, gate in gates.items()}
                gone = torch.stack([(1 - gate).sum() for gate in gates.values()]).sum()
                loss = with_weights(model.denoiser, gated, error, erased, own) / scale
                kept = with_weights(model.denoiser, gated, error, others[other], its) / scale
                adam.zero_grad()
                (loss + self.preserve_scale * kept + self.sparsity * gone / count).backward()
                adam.step()


def start_logits(
    weights: Mapping[str, Tensor], chosen: Mapping[str, Tensor], by_row: bool
) -> dict[str, Tensor]:
    """{name: (out, in), or (out, 1) if a row has one gate, float32}; `chosen` are flat indices."""
    logits = {}
    for name, weight in weights.items():
        flat = torch.full(weight.flatten(1).shape, OPEN, device=weight.device)
        flat.view(-1)[chosen.get(name, torch.empty(0, dtype=torch.long)).to(weight.device)] = CHOSEN
        logits[name] = (flat[:, :1].clone() if by_row else flat).requires_grad_()
    return logits


def gate_weight(weight: Tensor, gate: Tensor) -> Tensor:
    """The weight (out, in, ...) times its gates (out, in) or (out, 1), in its dtype."""
    return (weight.detach().flatten(1) * gate.to(weight.dtype)).view_as(weight)


def _count(logits: Mapping[str, Tensor], below: float) -> int:
    return sum(int((logit < below).sum()) for logit in logits.values())
