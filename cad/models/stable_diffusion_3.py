"""Stable Diffusion 3 and 3.5: three text encoders and a transformer that matches a flow.

The flow goes on straight lines, x_t = (1 - sigma) x_0 + sigma * noise with sigma = t / 1000, and
Phi predicts its velocity noise - x_0 (Esser et al. 2024, arXiv 2403.03206).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from torch import Tensor

from cad.components import JOINT_COMPONENTS, NO_JOINT_COMPONENTS
from cad.errors import UserError
from cad.models.conditioning import T5_TOKENS, Conditioning
from cad.models.hub import Located
from cad.models.pipeline import PipelineModel

T5_PARTS = ("text_encoder_3", "tokenizer_3")


class StableDiffusion3Model(PipelineModel):
    """Adapter over a `StableDiffusion3Pipeline`.

    Its conditioning is "states", (N, 77 + 256, D): first the last hidden states but one of both
    CLIPs side by side, filled up with zeros to D, then those of T5, zeros where it is left out; and
    "pooled", (N, P_1 + P_2), the CLIPs' embeddings of the whole text.
    """

    pipeline_class = StableDiffusion3Pipeline
    components = JOINT_COMPONENTS
    no_components = NO_JOINT_COMPONENTS
    prediction_type = "flow"
    denoiser_name = "transformer"
    text_suffixes = ("", "_2", "_3")
    t5_parts = T5_PARTS

    def __init__(
        self, name: str, pipeline: Any, resolution: int, located: Located | None = None
    ) -> None:
        """As `PipelineModel`. UserError also for a resolution beyond the positions it knows."""
        super().__init__(name, pipeline, resolution, located)
        self._width = int(pipeline.transformer.config.joint_attention_dim)  # D
        self.vae.enable_slicing()  # one image at a time: at 1024 pixels each takes gigabytes

    @classmethod
    def first_order(cls, name: str, scheduler: Any) -> Any:
        if scheduler.config.get("use_dynamic_shifting"):
            raise UserError(
                f"the scheduler of model={name} shifts its timesteps by the image's size "
                "(use_dynamic_shifting), which this adapter does not do; SD 3.5 was published "
                "without."
            )
        return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)

    def latent_shape_at(self, size: tuple[int, int] | None) -> tuple[int, int, int]:
        shape = super().latent_shape_at(size)
        config: Any = self.denoiser.config
        largest = config.pos_embed_max_size * config.patch_size * self._pixels_per_latent
        if size is not None and max(size) > largest:
            raise UserError(
                f"model={self.name} cannot make images of {size[0]} x {size[1]} pixels (height x "
                f"width): it knows positions up to {largest}."
            )
        return shape

    def encode_prompts(
        self, prompts: Sequence[str], *, truncate: bool = False, apart: bool = False
    ) -> Conditioning:
        how = {"truncate": truncate, "apart": apart}
        clips = [text.encode(prompts, self.device, -2, **how).tensors for text in self.texts[:2]]
        states = torch.cat([clip["states"] for clip in clips], dim=-1)  # (N, 77, D_1 + D_2)
        states = F.pad(states, (0, self._width - states.shape[-1]))  # (N, 77, D)
        t5 = states.new_zeros(len(prompts), T5_TOKENS, self._width)  # (N, 256, D)
        if len(self.texts) == 3:
            t5 = self.texts[2].encode(prompts, self.device, **how).tensors["states"]
        states = torch.cat([states, t5.to(states.dtype)], dim=1)  # (N, 333, D)
        pooled = torch.cat([clip["pooled"] for clip in clips], dim=-1)  # (N, P_1 + P_2)
        return Conditioning({"states": states, "pooled": pooled})

    def last_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Raises UserError: a prompt ends at one position for the CLIPs and at another for T5."""
        raise UserError(
            f"model={self.name} reads a prompt through CLIP and through T5, which cut it into "
            "different tokens: there is no one position at which it ends."
        )

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        phi: Tensor = self.denoiser(
            hidden_states=x_t,
            encoder_hidden_states=conditioning.tensors["states"],
            pooled_projections=conditioning.tensors["pooled"],
            timestep=t.expand(len(x_t)),  # (N,)
            return_dict=False,
        )[0]
        return phi

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return (noise.float() - x_0.float()).to(x_0.dtype)

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        sigma = self._sigma(t).to(x_0.device).reshape(-1, 1, 1, 1)  # (1 or N, 1, 1, 1)
        x_t = (1 - sigma) * x_0.float() + sigma * noise.float()
        return x_t.to(x_0.dtype)

    def epsilon_weight(self, t: Tensor) -> float:
        """(1 - sigma)^2.

        From x_t = (1 - sigma) x_0 + sigma eps and v = eps - x_0 follows eps = x_t + (1 - sigma) v.
        Two predictions at one x_t thus differ by eps_c - eps_b = (1 - sigma) (v_c - v_b), and
        || . ||^2 by (1 - sigma)^2: nothing at t = 1000, where x_t is the noise.
        """
        return (1.0 - float(self._sigma(t))) ** 2

    def _sigma(self, t: Tensor) -> Tensor:
        return t.float() / int(self._first_order.config.num_train_timesteps)
