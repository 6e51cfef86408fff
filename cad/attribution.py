"""Attribution scores of single weights (paper Eq. 3): alpha_i = w_i * dJ/dw_i.

The first-order estimate of how much of J is lost when w_i is set to zero. One backward per state;
only the chosen weights require gradients, each gradient is added up in float32 and freed as soon
as it is made, so memory stays near the weights plus one float32 tensor per chosen weight.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from cad.components import component_weights
from cad.errors import UserError
from cad.models.base import DiffusionModel
from cad.objectives import Objective
from cad.trajectories import NoisePlan

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Attribution(NoisePlan):
    """The settings of an attribution: a group of components, and where J is estimated."""

    component: str = "ff"  # ff | attn1 | attn2 | residual

    def scores(self, model: DiffusionModel, objective: Objective) -> dict[str, Tensor]:
        """Attribution scores w * dJ/dw of the group's weights (Eq. 3).

        Returns {name: (out, in) float32} on the model's device, a convolution flattened to
        (out, in * kh * kw); positive promotes J. Leaves the model unchanged and the global random
        state untouched. Raises UserError for an empty group, as soon as J is not finite, and if not
        one weight has a gradient.
        """
        weights = component_weights(model, self.component)
        log.info(
            "attributing %s over %d %s weights of %s",
            objective.concept.name,
            sum(weight.numel() for weight in weights.values()),
            self.component,
            model.name,
        )
        with (
            summed_gradients(weights) as gradients,
            torch.enable_grad(),
            logging_redirect_tqdm(),
        ):
            terms = objective.terms(model, self)
            for state, prediction in tqdm(terms, desc="attribution", unit="step", disable=None):
                # Factors that would cost half precision digits wait for the float32 sums.
                scale = objective.backward_scale(prediction.shape)
                gradients.factor = state.weight / scale
                term = objective.term(state.target, prediction)
                _check_finite_term(term, state.t, model)
                torch.autograd.backward(scale * term)
        self._check_some_gradient(gradients, model)
        scores = {
            name: eq3_score(weight.detach().float(), gradients[name] / self.samples).flatten(1)
            for name, weight in weights.items()
        }
        _check_finite_scores(scores, model)
        return scores

    def _check_some_gradient(self, gradients: Mapping[str, Tensor], model: DiffusionModel) -> None:
        if not any(gradient.any() for gradient in gradients.values()):
            raise UserError(
                f"all gradients of component={self.component} of model={model.name} are exactly 0: "
                f"they underflow in dtype={model.dtype} (use dtype=float32 or bfloat16), or the "
                "concept's prompt has no influence on the prediction."
            )


def eq3_score(weight: Tensor, gradient: Tensor) -> Tensor:
    """Eq. 3 of the paper: w * dJ/dw, elementwise."""
    return weight * gradient


class GradientSums(dict[str, Tensor]):
    """{name: float32 sum}; each gradient is multiplied by the present `factor` when added."""

    factor = 1.0


@contextmanager
def summed_gradients(weights: Mapping[str, nn.Parameter]) -> Iterator[GradientSums]:
    """Inside the block, every backward adds the weights' gradients to the yielded float32 sums.

    The weights require gradients only inside; afterwards, also after an exception, they are as
    before: no hook, no `.grad`, `requires_grad` as it was.
    """
    required = {name: weight.requires_grad for name, weight in weights.items()}
    sums = GradientSums(
        {name: torch.zeros_like(w, dtype=torch.float32) for name, w in weights.items()}
    )
    hooks = []
    try:
        for name, weight in weights.items():
            weight.requires_grad_(True)
            hook = _add_and_free(sums, name)
            hooks.append(weight.register_post_accumulate_grad_hook(hook))
        yield sums
    finally:
        for handle in hooks:
            handle.remove()
        for name, weight in weights.items():
            weight.requires_grad_(required[name])
            weight.grad = None


def _add_and_free(sums: GradientSums, name: str) -> Callable[[Tensor], None]:
    def add_and_free(weight: Tensor) -> None:
        if weight.grad is not None:
            sums[name].add_(weight.grad, alpha=sums.factor)  # in float32
            weight.grad = None

    return add_and_free


def _check_finite_term(term: Tensor, t: Tensor, model: DiffusionModel) -> None:
    if not torch.isfinite(term):
        raise UserError(
            f"the objective is {term.item()} at timestep {t.item():g}: model={model.name} "
            f"overflows in dtype={model.dtype}. Use dtype=float32 or bfloat16; check the weights."
        )


def _check_finite_scores(scores: Mapping[str, Tensor], model: DiffusionModel) -> None:
    bad = [name for name, score in scores.items() if not torch.isfinite(score).all()]
    if bad:
        raise UserError(
            f"the scores of {len(bad)} weights of model={model.name} are NaN or infinite (first: "
            f"{bad[0]}): gradients overflow in dtype={model.dtype}. Use dtype=float32 or bfloat16."
        )
