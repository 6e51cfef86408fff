"""Where the erase objective is evaluated: the states x_t that sampling a concept passes.

`released` is the authors' estimator: for every timestep t fresh noise, and the steps up to and with
t's own, so that t meets latents one step cleaner than it says, at the end the image itself.
`restart` does the same, but stops before t's step, at the x_t that t belongs to.
`shared` walks once and passes every x_t on its way; the conditional prediction that guides the
sampler is the very one that the objective differentiates. Its x_t are correlated, which noise at
every step (eta = 1) and several samples make up for at a fraction of the cost.

A plan may be restricted to a stage of the way: of its timesteps the first, second or last third.
States and noise stay what they are, so J, and the scores, of all are the sum of the stages'.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cad.checks import check, finite, one_of, optional, seed, share, steps, whole
from cad.errors import UserError
from cad.models.base import DiffusionModel
from cad.models.conditioning import Conditioning
from cad.sampling import draw_noise, guide, make_generators, walk

TRAJECTORIES = ("shared", "restart", "released")
ALL = "all"
STAGES = ("early", "middle", "late")  # from noise to image
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
    stage: str = ALL  # which timesteps count: ALL, or those of one of STAGES
    seed: int = 0
    batch_size: int = 16  # samples evaluated at once

    def __post_init__(self) -> None:
        check(self, KEYS, steps=steps, samples=whole(1), batch_size=whole(1), guidance=finite)
        check(self, KEYS, eta=optional(share), trajectory=one_of(TRAJECTORIES), seed=seed)
        check(self, KEYS, stage=one_of((ALL, *STAGES)))
        if self.stage != ALL and self.steps < len(STAGES):
            raise UserError(
                f"{KEYS}.steps={self.steps} is not allowed with {KEYS}.stage={self.stage}: stages "
                "are thirds of the steps."
            )

    def counted(self) -> range:
        """Which of the timesteps have a term in J, by their number from noise to image."""
        if self.stage == ALL:
            return range(self.steps)
        third = STAGES.index(self.stage)
        return range(third * self.steps // 3, (third + 1) * self.steps // 3)

    def count(self, total: int) -> int:
        """How many terms J has over so many samples: one for each batch at each timestep."""
        return len(self.counted()) * len(self.batches(total))

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
    """All states of the plan: those `counted` of each batch of samples, in the order of the way.

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
    counted = plan.counted()
    sampler = model.sampler(plan.steps, "ddim", plan.eta)
    generators = make_generators(samples, salt=f"attribution-{plan.seed}")
    x_t = draw_noise(model, generators) * sampler.init_sigma  # (N, C, h, w)
    for index, t in enumerate(sampler.timesteps[: counted.stop]):
        with torch.set_grad_enabled(torch.is_grad_enabled() and index in counted):
            visit = _visit(model, sampler.scale(x_t, t), t, c, empty)
        if index in counted:
            yield visit
        guided = guide(visit.unconditional, visit.conditional.detach(), plan.guidance)
        x_t = sampler.step(guided, t, x_t, generators)


def _restarted(
    model: DiffusionModel, plan: NoisePlan, samples: range, c: Conditioning, empty: Conditioning
) -> Iterator[Visit]:
    beyond = 1 if plan.trajectory == "released" else 0  # steps past the one before t's
    for index in plan.counted():
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
