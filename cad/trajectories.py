"""Where the erase objective is evaluated: the states x_t that sampling a concept passes.

`released` is the authors' estimator: for every timestep t fresh noise, and the steps up to and with
t's own, so that t meets latents one step cleaner than it says, at the end the image itself.
`restart` does the same, but stops before t's step, at the x_t that t belongs to.
`shared` walks once and passes every x_t on its way; the conditional prediction that guides the
sampler is the very one that the objective differentiates. Its x_t are correlated, which noise at
every step (eta = 1) and several samples make up for at a fraction of the cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cad.checks import check, finite, one_of, optional, seed, share, steps, whole
from cad.models.base import DiffusionModel
from cad.models.conditioning import Conditioning
from cad.sampling import draw_noise, guide, make_generators, walk

TRAJECTORIES = ("shared", "restart", "released")
KEYS = "edit.attribution"  # where the configuration has these settings


@dataclass(frozen=True, kw_only=True)
class NoisePlan:
    """At which states, reached from which noise, the objective J is estimated.

    Raises UserError for values out of range. Batching changes nothing but float rounding: each
    sample has its own generator.
    """

    steps: int = 50  # DDIM timesteps; PROTOCOL: 50
    samples: int = 16  # trajectories, or noises per reference image; J is their mean
    guidance: float = 3.0  # classifier-free guidance on the way to x_t
    eta: float | None = 1.0  # fresh noise per DDIM step, 0 to 1; None: 1 if the sampler can, else 0
    trajectory: str = "shared"  # one of TRAJECTORIES
    seed: int = 0
    batch_size: int = 16  # samples evaluated at once

    def __post_init__(self) -> None:
        check(self, KEYS, steps=steps, samples=whole(1), batch_size=whole(1), guidance=finite)
        check(self, KEYS, eta=optional(share), trajectory=one_of(TRAJECTORIES), seed=seed)

    def batches(self, total: int) -> list[range]:
        """0 .. total - 1 in batches of at most `batch_size`."""
        starts = range(0, total, self.batch_size)
        return [range(start, min(start + self.batch_size, total)) for start in starts]


@dataclass(frozen=True)
class Visit:
    """A state on the way, with both predictions there; all (N, C, h, w) but t ()."""

    x_t: Tensor  # as the network takes it
    t: Tensor
    unconditional: Tensor  # Phi(x_t, "", t), without gradient
    conditional: Tensor  # Phi(x_t, c, t), with its graph if gradients are enabled


def visits(
    model: DiffusionModel, plan: NoisePlan, c: Conditioning, unconditional: Conditioning
) -> Iterator[Visit]:
    """All states of the plan: `steps` per batch of samples, in the order they are reached.

    c and unconditional (1, ...). The caller's gradient mode decides whether predictions carry
    their graph; take what is needed from one visit before asking for the next.
    """
    walked = _shared if plan.trajectory == "shared" else _restarted
    for samples in plan.batches(plan.samples):
        prompts = c.expand(len(samples)), unconditional.expand(len(samples))
        yield from walked(model, plan, samples, *prompts)


def _shared(
    model: DiffusionModel, plan: NoisePlan, samples: range, c: Conditioning, empty: Conditioning
) -> Iterator[Visit]:
    sampler = model.sampler(plan.steps, "ddim", plan.eta)
    generators = make_generators(samples, salt=f"attribution-{plan.seed}")
    x_t = draw_noise(model, generators) * sampler.init_sigma  # (N, C, h, w)
    for t in sampler.timesteps:
        visit = _visit(model, sampler.scale(x_t, t), t, c, empty)
        yield visit
        guided = guide(visit.unconditional, visit.conditional.detach(), plan.guidance)
        x_t = sampler.step(guided, t, x_t, generators)


def _restarted(
    model: DiffusionModel, plan: NoisePlan, samples: range, c: Conditioning, empty: Conditioning
) -> Iterator[Visit]:
    beyond = 1 if plan.trajectory == "released" else 0  # steps past the one before t's
    for index in range(plan.steps):
        sampler = model.sampler(plan.steps, "ddim", plan.eta)
        generators = make_generators(samples, salt=f"attribution-{plan.seed}-{index}")
        x_t = walk(model, sampler, generators, c, empty, plan.guidance, steps=index + beyond)
        t = sampler.timesteps[index]
        yield _visit(model, sampler.scale(x_t, t), t, c, empty)


def _visit(
    model: DiffusionModel, x_t: Tensor, t: Tensor, c: Conditioning, empty: Conditioning
) -> Visit:
    with torch.no_grad():
        phi_u = model.predict(x_t, t, empty)
    return Visit(x_t, t, phi_u, model.predict(x_t, t, c))
