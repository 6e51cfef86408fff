"""Stable Diffusion 3 and 3.5: three text encoders and a transformer that matches a flow.

The flow goes on straight lines, x_t = (1 - sigma) x_0 + sigma * noise with sigma = t / 1000, and
Phi predicts its velocity noise - x_0 (Esser et al. 2024, arXiv 2403.03206).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from torch import Tensor

from cad.components import JOINT_COMPONENTS, NO_JOINT_COMPONENTS
from cad.errors import UserError
from cad.models.base import PUBLISHED, Conditioning, Origin
from cad.models.hub import Source
from cad.models.pipeline import Parts, PipelineModel, TextEncoder, Weights
from cad.token_space import TokenSpace

T5_PARTS = ("text_encoder_3", "tokenizer_3")
T5_TOKENS = 256  # the pipeline's default


class StableDiffusion3Model(PipelineModel):
    """Adapter over a `StableDiffusion3Pipeline`.

    Its conditioning is "states", (N, 77 + 256, D): first the last hidden states but one of both
    CLIPs side by side, filled up with zeros to D, then those of T5, zeros where it is left out; and
    "pooled", (N, P_1 + P_2), the CLIPs' embeddings of the whole text.
    """

    pipeline_class = StableDiffusion3Pipeline
    components = JOINT_COMPONENTS
    no_components = NO_JOINT_COMPONENTS

    def __init__(
        self,
        name: str,
        pipeline: Any,
        resolution: int,
        origin: Origin | None = None,
    ) -> None:
        """As `PipelineModel`. UserError also for a resolution beyond the positions it knows."""
        super().__init__(name, pipeline, resolution, origin)
        config = pipeline.transformer.config
        self._width = int(config.joint_attention_dim)  # D
        self._largest = config.pos_embed_max_size * config.patch_size * self._pixels_per_latent
        self.latent_shape_at((resolution, resolution))  # only to hear its complaint
        self.vae.enable_slicing()  # one image at a time: at 1024 pixels each takes gigabytes

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        source: Source,
        resolution: int,
        device: str | torch.device,
        dtype: str | torch.dtype,
        weights: str = PUBLISHED,
        architecture: str | None = None,
        offload: bool = False,
        t5: bool = True,
    ) -> Self:
        """As `PipelineModel.from_pretrained`. t5 False neither loads nor fetches T5's weights."""
        chosen = Weights(source, weights, architecture, () if t5 else T5_PARTS)
        return cls._load(name, chosen, resolution, device, dtype, offload)

    @classmethod
    def parts(cls, name: str, pipeline: Any) -> Parts:
        _check_scheduler(name, pipeline.scheduler)
        texts = [TextEncoder.of(pipeline), TextEncoder.of(pipeline, "_2")]
        if pipeline.text_encoder_3 is not None:
            texts.append(TextEncoder.of(pipeline, "_3", T5_TOKENS))
        return Parts(
            denoiser=pipeline.transformer,
            texts=tuple(texts),
            first_order=FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config),
            multiple=pipeline.transformer.config.patch_size,
        )

    @property
    def prediction_type(self) -> str:
        return "flow"

    def latent_shape_at(self, size: tuple[int, int] | None) -> tuple[int, int, int]:
        shape = super().latent_shape_at(size)
        if size is not None and max(size) > self._largest:
            raise UserError(
                f"model={self.name} cannot make images of {size[0]} x {size[1]} pixels (height x "
                f"width): it knows positions up to {self._largest}."
            )
        return shape

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], *, truncate: bool = False) -> Conditioning:
        if not truncate:
            self.check_prompts(prompts)
        clips = [self._encoded(text, prompts, hidden=True) for text in self.texts[:2]]
        states = torch.cat([clip.hidden_states[-2] for clip in clips], dim=-1)  # (N, 77, D_1 + D_2)
        states = F.pad(states, (0, self._width - states.shape[-1]))  # (N, 77, D)
        states = torch.cat([states, self._t5_states(prompts, states)], dim=1)  # (N, 333, D)
        pooled = torch.cat([clip.text_embeds for clip in clips], dim=-1)  # (N, P_1 + P_2)
        return Conditioning({"states": states, "pooled": pooled})

    def _t5_states(self, prompts: Sequence[str], like: Tensor) -> Tensor:
        """(N, 256, D), of the dtype and on the device of another tensor; zeros without T5."""
        if len(self.texts) == 2:
            return like.new_zeros(len(prompts), T5_TOKENS, self._width)
        states: Tensor = self._encoded(self.texts[2], prompts).last_hidden_state
        return states.to(like.dtype)

    def last_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Raises UserError: a prompt ends at one position for the CLIPs and at another for T5."""
        raise UserError(
            f"model={self.name} reads a prompt through CLIP and through T5, which cut it into "
            "different tokens: there is no one position at which it ends."
        )

    def token_space(self) -> TokenSpace:
        """Raises UserError: a prompt is other tokens for the CLIPs than for T5."""
        raise UserError(
            f"model={self.name} reads a prompt through two CLIPs and T5, which cut it into "
            "different tokens: attacks on tokens are made for models with one text encoder, such "
            "as model=sd14 or sd21."
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


def _check_scheduler(name: str, scheduler: Any) -> None:
    if scheduler.config.get("use_dynamic_shifting"):
        raise UserError(
            f"the scheduler of model={name} shifts its timesteps by the image's size "
            "(use_dynamic_shifting), which this adapter does not do; SD 3.5 was published without."
        )
