"""From noise to x_0: one sampler per trajectory, one random generator per image.

Classifier-free guidance (Ho & Salimans 2021): Phi(x_t, "") + g (Phi(x_t, c) - Phi(x_t, "")).
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from cad.errors import UserError
from cad.models.base import Conditioning, DiffusionModel


class Sampler:
    """A diffusers scheduler, set up for one trajectory (multistep schedulers carry history).

    eta None is 1 where the scheduler has it, else 0. Raises UserError for steps < 1 or beyond the
    training timesteps, eta outside [0, 1], or eta > 0 for a scheduler without such a parameter.
    """

    def __init__(
        self, scheduler: Any, steps: int, device: torch.device, eta: float | None = 0.0
    ) -> None:
        self._takes = frozenset(inspect.signature(scheduler.step).parameters)
        if eta is None:
            eta = 1.0 if "eta" in self._takes else 0.0
        _check_steps(steps, scheduler.config.num_train_timesteps)
        _check_eta(eta, type(scheduler).__name__, "eta" in self._takes)
        scheduler.set_timesteps(steps, device=device)
        _check_timesteps(steps, scheduler)
        self._scheduler = scheduler
        self._eta = eta
        # (T,), from noise to image; T is `steps`, or more where a scheduler warms up (PNDM).
        self.timesteps: Tensor = scheduler.timesteps
        # Flow-matching schedulers have neither attribute: x_T is unit noise, inputs are unscaled.
        self.init_sigma = float(getattr(scheduler, "init_noise_sigma", 1.0))
        self._scale = getattr(scheduler, "scale_model_input", None)

    def scale(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The network's input for x_t; (N, C, h, w) both."""
        return x_t if self._scale is None else self._scale(x_t, t)

    def step(
        self, prediction: Tensor, t: Tensor, x_t: Tensor, generators: list[Generator] | None
    ) -> Tensor:
        """x_{t-1} from the guided prediction at t; (N, C, h, w) all. Advances the generators.

        Raises ValueError if noise is to be drawn (eta > 0) and there are no generators for it.
        """
        if self._eta > 0 and generators is None:
            raise ValueError("a sampler with eta > 0 draws noise: it needs one generator per image")
        options: dict[str, Any] = {}
        if "eta" in self._takes:
            options["eta"] = self._eta
        if self._eta > 0 and generators is not None and "variance_noise" in self._takes:
            # The scheduler itself would draw in the model's dtype, another number for each.
            options["variance_noise"] = _draw(x_t.shape[1:], generators).to(x_t.device, x_t.dtype)
        elif "generator" in self._takes:
            options["generator"] = generators
        result = self._scheduler.step(prediction, t, x_t, **options, return_dict=False)
        x_next: Tensor = result[0]
        return x_next


def make_generators(seeds: Sequence[int], salt: int | str = 0) -> list[Generator]:
    """One CPU generator per image, so that an image does not depend on its batch or device.

    salt 0 is the seed itself; other salts give unrelated streams for the same seeds.
    """
    return [Generator().manual_seed(_salted(seed, salt)) for seed in seeds]


def draw_noise(
    model: DiffusionModel,
    generators: Sequence[Generator],
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Unit noise (N, C, h, w) on the model's device. Drawn in float32: no dtype changes a seed.

    For images of `size`, (height, width) in pixels, by default the model's own.
    """
    return _draw(model.latent_shape_at(size), generators).to(model.device, model.dtype)


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
        x_in = sampler.scale(x_t, t)
        if guidance == 1.0:
            prediction = model.predict(x_in, t, conditioning)
        else:
            phi_u, phi_c = model.predict(torch.cat([x_in, x_in]), t, both).chunk(2)
            prediction = guide(phi_u, phi_c, guidance)
        x_t = sampler.step(prediction, t, x_t, generators)
    return x_t


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

    For images of `size`, (height, width) in pixels, by default the model's own. conditioning
    (N, ...), unconditional (1, ...) or (N, ...), N seeds. An image depends on its own seed and
    prompt; across batch sizes it is equal up to float rounding, not bit for bit.
    Raises ValueError if prompts and seeds differ in number, UserError as `DiffusionModel.sampler`
    and `latent_shape_at`.
    """
    n = len(seeds)
    if len(conditioning) != n:
        raise ValueError(f"{len(conditioning)} prompts for {n} seeds")
    if len(unconditional) != n:
        unconditional = unconditional.expand(n)
    sampler = model.sampler(steps, kind, eta)
    generators = make_generators(seeds)
    every_step = len(sampler.timesteps)  # some schedulers visit more timesteps than they are asked
    return walk(model, sampler, generators, conditioning, unconditional, guidance, every_step, size)


def _draw(shape: Sequence[int], generators: Sequence[Generator]) -> Tensor:
    return torch.stack([torch.randn(shape, generator=g) for g in generators])  # (N, *shape)


def _salted(seed: int, salt: int | str) -> int:
    if salt == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{salt}:{seed}".encode()).digest()[:8]) >> 1


def _check_steps(steps: int, most: int) -> None:
    if not 1 <= steps <= most:
        raise UserError(f"steps={steps} is not allowed; the model takes 1 to {most}.")


def _check_timesteps(steps: int, scheduler: Any) -> None:
    """Leading spacing with an offset, for one, runs past the table's end where steps are many."""
    trained = len(getattr(scheduler, "alphas_cumprod", ()))  # flows have no table, so no end
    first = scheduler.timesteps.max().item()
    if trained and first > trained - 1:
        raise UserError(
            f"steps={steps} is not allowed: {type(scheduler).__name__} would start at timestep "
            f"{first:g}, and the model was trained on 0 to {trained - 1}. Use fewer steps."
        )


def _check_eta(eta: float, scheduler: str, has_eta: bool) -> None:
    if not 0.0 <= eta <= 1.0:
        raise UserError(f"eta={eta} is not allowed; it lies in [0, 1] (0: deterministic).")
    if eta > 0 and not has_eta:
        raise UserError(f"eta={eta} is not allowed: {scheduler} has no eta. Use eta=0 or DDIM.")
