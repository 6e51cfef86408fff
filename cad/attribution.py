"""Attribution scores of single weights (paper Eq. 3): alpha_i = w_i * dJ/dw_i.

The first-order estimate of how much of J is lost when w_i is set to zero. One backward per state;
only the chosen weights require gradients, each gradient is added up in float32 and freed as soon
as it is made, so memory stays near the weights plus one float32 tensor per chosen weight.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from cad.checks import check, flag, one_of
from cad.components import component_weights
from cad.errors import UserError
from cad.identity import Identified, describe_runtime, immaterial
from cad.instrument import Cost, measure
from cad.models.base import DiffusionModel, check_gradient_checkpointing, checkpointed_gradients
from cad.objectives import Objective
from cad.store import Notes, Store, read_tensors, write_tensors
from cad.trajectories import KEYS, NoisePlan

log = logging.getLogger(__name__)

FORMAT = "cad-scores/1"
PLACES = ("device", "cpu")
# Root mean square, within a factor of two, of the gradient that each backward starts from: in half
# precision larger ones overflow on their way and smaller ones vanish.
GRADIENT_RMS = 2.0**-4


@dataclass(frozen=True, kw_only=True)
class Attribution(NoisePlan, Identified):
    """The settings of an attribution: a group of components, and where J is estimated."""

    version: ClassVar[int] = 2  # of the scores

    component: str = "ff"  # ff | attn1 | attn2 | residual
    gradient_checkpointing: bool = immaterial(False)  # less memory, more time
    # Where gradients are added up, weight by weight: "device" | "cpu" (less memory, more time).
    sums_on: str = immaterial("device")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, KEYS, gradient_checkpointing=flag, sums_on=one_of(PLACES))

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
        as J is not finite, for gradients that are not, and if not one weight has a gradient.
        """
        weights = component_weights(model, self.component)
        checkpointing = self.gradient_checkpointing
        check_gradient_checkpointing(model, checkpointing, f"{KEYS}.gradient_checkpointing")
        concept, size = objective.concept.name, sum(weight.numel() for weight in weights.values())
        log.info("attributing %s over %d weights (%s)", concept, size, self.component)
        with (
            summed_gradients(weights, self.place(model)) as gradients,
            checkpointed_gradients(model.denoiser, checkpointing),
            torch.enable_grad(),
            logging_redirect_tqdm(),
        ):
            count, terms = objective.terms(model, self)
            for at, prediction in tqdm(terms, "attribution", count, unit="step", disable=None):
                term, gradient = term_gradient(objective, at.target, prediction)
                if not term.isfinite():
                    value = f"the objective is {term.item()} at timestep {at.t.item():g}"
                    raise overflow(model, value)
                # Factors that would cost half precision digits wait for the float32 sums.
                scale = backward_scale(gradient, gradient_rms)
                gradients.factor = at.weight / scale
                prediction.backward((scale * gradient).to(prediction.dtype))
        self._check_gradients(gradients, model)
        return {
            name: eq3_score(weight.detach().to(sums).flatten(1), sums.flatten(1) / self.samples)
            for (name, weight), sums in zip(weights.items(), gradients.values(), strict=True)
        }

    def _check_gradients(self, gradients: Mapping[str, Tensor], model: DiffusionModel) -> None:
        if not any(gradient.any() for gradient in gradients.values()):
            raise UserError(
                f"all gradients of component={self.component} of model={model.name} are exactly 0: "
                f"they underflow in dtype={model.dtype} (use dtype=float32 or bfloat16), or the "
                "concept's prompt has no influence on the prediction."
            )
        bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
        if bad:
            who = f"{len(bad)} weights of model={model.name}"
            raise overflow(model, f"the gradients of {who} are NaN or infinite (first: {bad[0]})")


@dataclass(frozen=True)
class Scored:
    """Scores {name: (out, in) float32}, and what computing them took, then or now."""

    scores: dict[str, Tensor]
    cost: Cost


def attribute(
    model: DiffusionModel,
    objective: Objective,
    attribution: Attribution,
    store: Store | None = None,
) -> Scored:
    """Attribution scores, with their cost: from the store, or computed and, if there is one, kept.

    A sweep over ratios so costs one attribution: the key has neither ratio nor selection.
    `cost.cached` tells which. Raises what `Attribution.scores` and `Store.get_or_make` raise.
    """

    def compute() -> Scored:
        with measure(model.device) as meter:
            scores = attribution.scores(model, objective)
        return Scored(scores, meter.cost)

    if store is None:
        return compute()
    key = _key(model, objective, attribution)
    scored, _ = store.get_or_make(key, "the scores", _read, compute, _write)
    place = attribution.place(model)
    return replace(scored, scores={name: each.to(place) for name, each in scored.scores.items()})


def is_stored(
    model: DiffusionModel, objective: Objective, attribution: Attribution, store: Store | None
) -> bool:
    """Whether `attribute` need not compute these scores."""
    return store is not None and store.path(_key(model, objective, attribution)).exists()


def stored_scores(provenance: Mapping[str, Any], store: Store) -> dict[str, Tensor]:
    """The scores that an edit was made of, by its provenance, of its first concept; on the CPU.

    Raises UserError where the store does not have them.
    """
    told = provenance["settings"]
    attribution = dict(told["attribution"])
    key = {
        "version": attribution.pop("version"),
        "model": provenance["model"],
        "objective": told["objectives"][0],
        "attribution": attribution,
        **{name: provenance[name] for name in describe_runtime("cpu")},
    }
    path = store.path(key)
    if not path.exists():
        raise UserError(f"the scores {path} of an edit are gone: make the edit's run again.")
    return read_tensors(path, FORMAT)[1]


def _key(
    model: DiffusionModel, objective: Objective, attribution: Attribution
) -> dict[str, object]:
    return {
        "version": attribution.version,
        "model": model.provenance(),
        "objective": objective.settings(),
        "attribution": attribution.settings(),
        **describe_runtime(model.device),
    }


def _read(path: Path, notes: Notes) -> Scored:
    _, scores = read_tensors(path, FORMAT)
    return Scored(scores, replace(Cost(**notes["cost"]), cached=True))


def _write(path: Path, scored: Scored) -> Notes:
    write_tensors(path, scored.scores, {}, FORMAT)
    return {"cost": asdict(scored.cost)}


def term_gradient(
    objective: Objective, target: Tensor, prediction: Tensor
) -> tuple[Tensor, Tensor]:
    """A term of J, (), and its derivative by the prediction, (N, C, h, w); float32 both."""
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

    The sums lie at `place`, to which each gradient is brought as soon as it is made. The weights
    require gradients only inside; afterwards, also after an exception, they are as before: no hook,
    no `.grad`, `requires_grad` as it was.
    """
    required = {name: weight.requires_grad for name, weight in weights.items()}
    sums = GradientSums()
    hooks = []

    def add_and_free(name: str, weight: Tensor) -> None:
        if weight.grad is not None:
            sums[name].add_(weight.grad.to(place), alpha=sums.factor)  # in float32
            weight.grad = None

    try:
        for name, weight in weights.items():
            sums[name] = torch.zeros_like(weight, dtype=torch.float32, device=place)
            weight.requires_grad_(True)
            hook = partial(add_and_free, name)
            hooks.append(weight.register_post_accumulate_grad_hook(hook))
        yield sums
    finally:
        for handle in hooks:
            handle.remove()
        for name, weight in weights.items():
            weight.requires_grad_(required[name])
            weight.grad = None


def overflow(model: DiffusionModel, found: str) -> UserError:
    """The error for something that was found not to be finite."""
    return UserError(
        f"{found}: model={model.name} overflows in dtype={model.dtype}. Use dtype=float32 or "
        "bfloat16; check the weights."
    )
