"""From noise to x_0: one trajectory and one random generator per image.

Classifier-free guidance (Ho & Salimans 2021): Phi(x_t, "") + g (Phi(x_t, c) - Phi(x_t, "")).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from cad.models.base import DiffusionModel
from cad.models.conditioning import Conditioning
from cad.models.sampler import Sampler, draw


def make_generators(seeds: Sequence[int], salt: int | str = 0) -> list[Generator]:
    """One CPU generator per image, so that an image does not depend on its batch or device.

    salt 0 is the seed itself; other salts give unrelated streams for the same seeds.
    """
    if salt != 0:
        digests = [hashlib.sha256(f"{salt}:{seed}".encode()).digest() for seed in seeds]
        seeds = [int.from_bytes(digest[:8]) >> 1 for digest in digests]
    return [Generator().manual_seed(seed) for seed in seeds]


def draw_noise(
    model: DiffusionModel, generators: Sequence[Generator], size: tuple[int, int] | None = None
) -> Tensor:
    """Unit noise (N, C, h, w) as for `walk`, drawn in float32: no dtype changes a seed."""
    return draw(model.latent_shape_at(size), generators).to(model.device, model.dtype)


def draw_below(end: int, generators: Sequence[Generator]) -> Tensor:
    """One integer of 0 .. end - 1 from each generator; (N,) int64 on the CPU."""
    return torch.cat([torch.randint(end, (1,), generator=each) for each in generators])


def guide(unconditional: Tensor, conditional: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance: Phi_u + g (Phi_c - Phi_u)."""
    return unconditional + guidance * (conditional - unconditional)


@torch.no_grad()
def walk(
    model: DiffusionModel,
    sampler: Sampler,
    generators: list[Generator],
    conditioning: Conditioning,
    unconditional: Conditioning,
    guidance: float,
    steps: int,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """x_t (N, C, h, w) after the first `steps` guided steps from pure noise.

    For images of `size`, (height, width) in pixels, by default the model's own. conditioning and
    unconditional (N, ...). Both predictions are made in one batch; guidance 1 needs no
    unconditional one. Advances the generators.
    """
    x_t = draw_noise(model, generators, size) * sampler.init_sigma  # (N, C, h, w)
    both = Conditioning.cat([unconditional, conditioning])  # (2N, ...)
    for t in sampler.timesteps[:steps]:
        x_t = guided_step(model, sampler, x_t, t, both, guidance, generators)
    return x_t


def guided_step(
    model: DiffusionModel,
    sampler: Sampler,
    x_t: Tensor,
    t: Tensor,
    both: Conditioning,
    guidance: float,
    generators: list[Generator] | None,
) -> Tensor:
    """x_{t-1} (N, C, h, w) from x_t; `both` (2N, ...) are the unconditional and the prompts."""
    x_in = sampler.scale(x_t, t)
    if guidance == 1.0:
        return sampler.step(model.predict(x_in, t, both[len(x_t) :]), t, x_t, generators)
    phi_u, phi_c = model.predict(torch.cat([x_in, x_in]), t, both).chunk(2)
    return sampler.step(guide(phi_u, phi_c, guidance), t, x_t, generators)


def sample_latents(
    model: DiffusionModel,
    conditioning: Conditioning,
    unconditional: Conditioning,
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    kind: str = "default",
    eta: float = 0.0,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """x_0 latents (N, C, h, w), one per prompt and seed, without gradient.

    Sizes as in `walk`; unconditional may be (1, ...). An image depends on its own seed and prompt;
    across batch sizes it is equal up to float rounding, not bit for bit. Raises ValueError if
    prompts and seeds differ in number, UserError as `DiffusionModel.sampler`, `latent_shape_at`.
    """
    n = len(seeds)
    if len(conditioning) != n:
        raise ValueError(f"{len(conditioning)} prompts for {n} seeds")
    if len(unconditional) != n:
        unconditional = unconditional.expand(n)
    sampler = model.sampler(steps, kind, eta)
    generators = make_generators(seeds)
    steps = len(sampler.timesteps)  # some schedulers visit more timesteps than they are asked
    return walk(model, sampler, generators, conditioning, unconditional, guidance, steps, size)
