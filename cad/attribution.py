"""Attribution scores of single weights (paper Eq. 3): alpha_i = w_i * dJ/dw_i.

The first-order estimate of how much of J is lost when w_i is set to zero. One backward per state;
only the chosen weights require gradients, each gradient is added up in float32 and freed as soon
as it is made, so memory stays near the weights plus one float32 tensor per chosen weight. Large
models go further: activations computed twice, and the sums kept on the CPU.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from cad.components import component_weights
from cad.errors import UserError
from cad.gradient_checkpointing import check_gradient_checkpointing, checkpointed_gradients
from cad.models.base import DiffusionModel
from cad.objectives import Objective
from cad.trajectories import NoisePlan

log = logging.getLogger(__name__)

PLACES = ("device", "cpu")
# Root mean square, within a factor of two, of the gradient that each backward starts from: in half
# precision larger ones overflow on their way and smaller ones vanish.
GRADIENT_RMS = 2.0**-4
MEMORY_ONLY = ("gradient_checkpointing", "sums_on")  # change memory and time, not the scores


@dataclass(frozen=True, kw_only=True)
class Attribution(NoisePlan):
    """The settings of an attribution: a group of components, and where J is estimated."""

    component: str = "ff"  # ff | attn1 | attn2 | residual
    gradient_checkpointing: bool = False  # less memory, more time
    sums_on: str = "device"  # where gradients are added up: "device" | "cpu", weight by weight

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sums_on not in PLACES:
            raise UserError(
                f"edit.attribution.sums_on={self.sums_on!r} is unknown; "
                f"allowed: {', '.join(PLACES)}."
            )

    def settings(self) -> dict[str, Any]:
        """What determines the scores; JSON-able."""
        return {key: value for key, value in asdict(self).items() if key not in MEMORY_ONLY}

    def place(self, model: DiffusionModel) -> torch.device:
        """Where the scores are."""
        return model.device if self.sums_on == "device" else torch.device("cpu")

    def scores(
        self, model: DiffusionModel, objective: Objective, gradient_rms: float = GRADIENT_RMS
    ) -> dict[str, Tensor]:
        """Attribution scores w * dJ/dw of the group's weights (Eq. 3).

        Returns {name: (out, in) float32} at `place`, a convolution as (out, in * kh * kw);
        positive promotes J. Leaves the model unchanged and the global random state untouched.
        Raises UserError for an empty group, for gradient checkpointing where there is none, as soon
        as J is not finite, and if not one weight has a gradient.
        """
        weights = component_weights(model, self.component)
        checkpointing = self.gradient_checkpointing
        check_gradient_checkpointing(
            model, checkpointing, "edit.attribution.gradient_checkpointing"
        )
        place = self.place(model)
        log.info(
            "attributing %s over %d %s weights of %s",
            objective.concept.name,
            sum(weight.numel() for weight in weights.values()),
            self.component,
            model.name,
        )
        with (
            summed_gradients(weights, place) as gradients,
            checkpointed_gradients(model.denoiser, checkpointing),
            torch.enable_grad(),
            logging_redirect_tqdm(),
        ):
            terms = objective.terms(model, self)
            for state, prediction in tqdm(terms, desc="attribution", unit="step", disable=None):
                term, gradient = term_gradient(objective, state.target, prediction)
                _check_finite_term(term, state.t, model)
                # Factors that would cost half precision digits wait for the float32 sums.
                scale = backward_scale(gradient, gradient_rms)
                gradients.factor = state.weight / scale
                prediction.backward((scale * gradient).to(prediction.dtype))
        self._check_some_gradient(gradients, model)
        scores = {
            name: eq3_score(
                weight.detach().to(place).float(), gradients[name] / self.samples
            ).flatten(1)
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


def term_gradient(
    objective: Objective, target: Tensor, prediction: Tensor
) -> tuple[Tensor, Tensor]:
    """A state's term of J, (), and its derivative by the prediction, (N, C, h, w); float32."""
    phi = prediction.detach().float().requires_grad_()
    term = objective.term(target, phi)
    (gradient,) = torch.autograd.grad(term, phi)
    return term.detach(), gradient


def backward_scale(gradient: Tensor, rms: float) -> float:
    """The power of two (no digit is lost) that brings the root mean square nearest to `rms`.

    gradient float32, finite; 1 where all of it is 0.
    """
    found = float(gradient.square().mean().sqrt())
    return 2.0 ** round(math.log2(rms / found)) if found > 0 else 1.0


def eq3_score(weight: Tensor, gradient: Tensor) -> Tensor:
    """Eq. 3 of the paper: w * dJ/dw, elementwise."""
    return weight * gradient


class GradientSums(dict[str, Tensor]):
    """{name: float32 sum}; each gradient is multiplied by the present `factor` when added."""

    factor = 1.0


@contextmanager
def summed_gradients(
    weights: Mapping[str, nn.Parameter], place: torch.device
) -> Iterator[GradientSums]:
    """Inside the block, every backward adds the weights' gradients to the yielded float32 sums.

    The sums lie at `place`, to which each gradient is brought as soon as it is made.

    The weights require gradients only inside; afterwards, also after an exception, they are as
    before: no hook, no `.grad`, `requires_grad` as it was.
    """
    required = {name: weight.requires_grad for name, weight in weights.items()}
    sums = GradientSums(
        {
            name: torch.zeros_like(weight, dtype=torch.float32, device=place)
            for name, weight in weights.items()
        }
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
            sums[name].add_(weight.grad.to(sums[name].device), alpha=sums.factor)  # in float32
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
