"""A diffusion model and an objective that are linear in the weights: first order is exact there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from cad.models.base import DiffusionModel, Origin
from cad.models.conditioning import Conditioning
from cad.models.sampler import Sampler
from cad.objectives import Comparison, Objective, Terms
from cad.trajectories import NoisePlan

SHAPE = (1, 2, 2)


class LinearToyModel(DiffusionModel):
    """Phi(x_t, c, t) = W (x_t + c), with small integers as weights: all sums are exact."""

    components: Mapping[str, str] = {"ff": r"^weight$", "attn1": r"^no_such_weight$"}
    prediction_type = "epsilon"

    def __init__(self) -> None:
        denoiser = nn.Linear(4, 4, bias=False)
        rows = [[1, -2, 3, 0], [2, 1, -1, 4], [-3, 2, 1, 1], [1, 0, 5, 2]]
        denoiser.weight.data = torch.tensor(rows, dtype=torch.float32)
        super().__init__("toy", denoiser, 2, SHAPE, Origin("toy", "local"))

    def surroundings_digest(self) -> str:
        return "none"

    def check_prompts(self, prompts: Sequence[str]) -> None:
        pass

    def encode_prompts(
        self, prompts: Sequence[str], *, truncate: bool = False, apart: bool = False
    ) -> Conditioning:
        lengths = torch.tensor([[float(len(prompt))] for prompt in prompts])
        return Conditioning({"c": lengths.expand(-1, 4)})

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self.denoiser(x_t.flatten(1) + conditioning.tensors["c"]).reshape(x_t.shape)

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return x_0 + noise

    def sampler(self, steps: int, kind: str = "default", eta: float | None = 0.0) -> Sampler:
        return Sampler(DDIMScheduler(clip_sample=False), steps, self.device, eta)

    def encode_images(self, images: Tensor) -> Tensor:
        return images.mean(dim=1, keepdim=True)

    def decode_latents(self, x_0: Tensor) -> Tensor:
        return x_0.expand(-1, 3, -1, -1)


class LinearObjective(Objective):
    """J = sum over two integer states of <target, Phi(x_t, c, t)>."""

    name = "linear"

    def settings(self) -> Mapping[str, Any]:
        return {"objective": self.name}

    def terms(self, model: DiffusionModel, plan: NoisePlan) -> tuple[int, Terms]:
        return 2, self._terms(model, plan)

    def _terms(self, model: DiffusionModel, plan: NoisePlan) -> Terms:
        c = self.conditioning(model).expand(plan.samples)
        for i in range(2):
            x_t = torch.arange(4.0 * plan.samples).reshape(-1, *SHAPE) - i
            at = Comparison(x_t, torch.tensor(i), target=2 * x_t - 5)
            yield at, model.predict(x_t, at.t, c)

    @staticmethod
    def term(target: Tensor, prediction: Tensor) -> Tensor:
        return (target * prediction).sum()
