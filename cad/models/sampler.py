"""One trajectory from noise to image, whichever of diffusers' schedulers takes its steps."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from cad.errors import UserError


class Sampler:
    """A diffusers scheduler, set up for one trajectory (multistep schedulers carry history).

    eta None is 1 where the scheduler has it, else 0. Raises UserError for steps < 1 or beyond the
    training timesteps, eta outside [0, 1], or eta > 0 for a scheduler without such a parameter.
    """

    def __init__(
        self, scheduler: Any, steps: int, device: torch.device, eta: float | None = 0.0
    ) -> None:
        self._takes = frozenset(inspect.signature(scheduler.step).parameters)
        self._scheduler = scheduler
        name, most = type(scheduler).__name__, scheduler.config.num_train_timesteps
        most_eta = 1.0 if "eta" in self._takes else 0.0
        self._eta = most_eta if eta is None else eta
        if not 0 <= self._eta <= most_eta:
            has = "takes 0 to 1" if most_eta else "has no eta. Use eta=0 or DDIM"
            raise UserError(f"eta={eta} is not allowed: {name} {has}.")
        if not 1 <= steps <= most:
            raise UserError(f"steps={steps} is not allowed; the model takes 1 to {most}.")
        self.training_timesteps = int(most)  # the network knows 0 to one less
        scheduler.set_timesteps(steps, device=device)
        first = scheduler.timesteps.max().item()
        # Leading spacing with an offset runs past the table's end; flows have no table, so no end.
        if hasattr(scheduler, "alphas_cumprod") and first > most - 1:
            raise UserError(
                f"steps={steps} is not allowed: {name} would start at timestep {first:g}, and the "
                f"model was trained on 0 to {most - 1}. Use fewer steps."
            )
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
        options: dict[str, Any] = {"eta": self._eta} if "eta" in self._takes else {}
        if self._eta > 0 and generators is not None and "variance_noise" in self._takes:
            # The scheduler itself would draw in the model's dtype, another number for each.
            options["variance_noise"] = draw(x_t.shape[1:], generators).to(x_t.device, x_t.dtype)
        elif "generator" in self._takes:
            options["generator"] = generators
        x: Tensor = self._scheduler.step(prediction, t, x_t, **options, return_dict=False)[0]
        return x


def draw(shape: Sequence[int], generators: Sequence[Generator]) -> Tensor:
    """Unit noise (N, *shape), float32 on the CPU: one image of each of N generators."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators])  # (N, *shape)
