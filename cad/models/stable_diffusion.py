"""Stable Diffusion 1.x and 2.x, and the miniature: one CLIP text encoder and a UNet.

Phi predicts the noise (epsilon; SD 1.x), the velocity v = alpha_t * epsilon - sigma_t * x_0
(SD 2.1) or the clean latent x_0 ("sample"; the miniature), with alpha_t^2 = alpha_bar_t.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from cad.components import UNET_COMPONENTS, UNET_TEXT_PROJECTIONS
from cad.errors import UserError
from cad.models.conditioning import Conditioning
from cad.models.pipeline import PipelineModel

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class StableDiffusionModel(PipelineModel):
    """Adapter over a `StableDiffusionPipeline`. Its conditioning is "states", (N, L, D)."""

    pipeline_class = StableDiffusionPipeline
    components = UNET_COMPONENTS
    text_projections = UNET_TEXT_PROJECTIONS
    denoiser_name = "unet"
    text_suffixes: ClassVar[tuple[str, ...]] = ("",)

    @classmethod
    def first_order(cls, name: str, scheduler: Any) -> Any:
        # DDIM's default clips x_0 to [-1, 1], which is meant for pixels: latents are not bounded.
        ddim = DDIMScheduler.from_config(scheduler.config, clip_sample=False)
        predicts = ddim.config.prediction_type
        if predicts not in PREDICTION_TYPES:
            known = ", ".join(PREDICTION_TYPES)
            raise UserError(f"model={name} predicts {predicts!r}; known are {known}.")
        return ddim

    @property
    def _ddim(self) -> Any:
        return self._first_order

    @cached_property
    def prediction_type(self) -> str:
        return str(self._ddim.config.prediction_type)

    def encode_prompts(
        self, prompts: Sequence[str], *, truncate: bool = False, apart: bool = False
    ) -> Conditioning:
        (text,) = self.texts
        return text.encode(prompts, self.device, truncate=truncate, apart=apart)

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        states = conditioning.tensors["states"]
        phi: Tensor = self.denoiser(x_t, t, encoder_hidden_states=states, return_dict=False)[0]
        return phi

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x_0
        # In float32, because the scheduler takes alpha_bar_t into the dtype of its arguments.
        velocity: Tensor = self._ddim.get_velocity(x_0.float(), noise.float(), t.expand(len(x_0)))
        return velocity.to(x_0.dtype)

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        x_t: Tensor = self._ddim.add_noise(x_0.float(), noise.float(), t.expand(len(x_0)))
        return x_t.to(x_0.dtype)  # in float32 until here, as in `target`

    def epsilon_weight(self, t: Tensor) -> float:
        """1 for epsilon, alpha_bar_t for v, alpha_bar_t / (1 - alpha_bar_t) for the clean latent.

        From x_t = alpha_t x_0 + sigma_t eps and v = alpha_t eps - sigma_t x_0, with alpha_t^2 +
        sigma_t^2 = 1, follows eps = alpha_t v + sigma_t x_t. Two predictions at one x_t thus differ
        by eps_c - eps_b = alpha_t (v_c - v_b), and || . ||^2 by alpha_t^2 = alpha_bar_t. Likewise
        eps = (x_t - alpha_t x_0) / sigma_t, and || . ||^2 by (alpha_t / sigma_t)^2.
        """
        if self.prediction_type == "epsilon":
            return 1.0
        alpha_bar = float(self._ddim.alphas_cumprod[int(t)])
        return alpha_bar / (1 - alpha_bar) if self.prediction_type == "sample" else alpha_bar
