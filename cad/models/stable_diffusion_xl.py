"""Stable Diffusion XL: SD's noise process and UNet with two text encoders and more to go by.

As in `StableDiffusionXLPipeline`, called with a prompt alone, the empty prompt of guidance and
Eq. 4 is zeros where the pipeline's configuration says `force_zeros_for_empty_prompt` (the published
one does), and every image is said to have been of the size that it is made in, never cropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from cad.models.conditioning import Conditioning
from cad.models.hub import Located
from cad.models.stable_diffusion import StableDiffusionModel


class StableDiffusionXLModel(StableDiffusionModel):
    """Adapter over a `StableDiffusionXLPipeline`.

    Its conditioning is "states", (N, L, D_1 + D_2), the last hidden states but one of both text
    encoders side by side, and "pooled", (N, P), the second's embedding of the whole text. Both
    tokenizers cut a text alike, so a position means the same token in both halves.
    """

    pipeline_class = StableDiffusionXLPipeline
    text_suffixes = ("", "_2")

    def __init__(
        self, name: str, pipeline: Any, resolution: int, located: Located | None = None
    ) -> None:
        """As for Stable Diffusion. A float16 image autoencoder that overflows becomes float32."""
        super().__init__(name, pipeline, resolution, located)
        self._zeros_for_empty = bool(pipeline.config.force_zeros_for_empty_prompt)
        if self.vae.dtype == torch.float16 and self.vae.config.force_upcast:
            self.vae.to(torch.float32)
        self.vae.enable_slicing()  # one image at a time: at 1024 pixels each takes gigabytes

    def _surroundings(self) -> dict[str, Any]:
        return super()._surroundings() | {"force_zeros_for_empty_prompt": self._zeros_for_empty}

    def encode_prompts(
        self, prompts: Sequence[str], *, truncate: bool = False, apart: bool = False
    ) -> Conditioning:
        """As every model's; a text of spaces is encoded, not the empty one."""
        how = {"truncate": truncate, "apart": apart}
        encoded = [text.encode(prompts, self.device, -2, **how).tensors for text in self.texts]
        states = torch.cat([each["states"] for each in encoded], dim=-1)  # (N, L, D)
        pooled = encoded[-1]["pooled"]  # (N, P)
        if self._zeros_for_empty:
            empty = [i for i, prompt in enumerate(prompts) if prompt == ""]
            states[empty], pooled[empty] = 0.0, 0.0
        return Conditioning({"states": states, "pooled": pooled})

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = (self._pixels_per_latent * side for side in x_t.shape[2:])
        # Original size, top left corner of the crop, size to be made.
        size = torch.tensor([height, width, 0, 0, height, width], device=x_t.device)
        added = {
            "text_embeds": conditioning.tensors["pooled"],  # (N, P)
            "time_ids": size.to(x_t.dtype).expand(len(x_t), -1),  # (N, 6)
        }
        phi: Tensor = self.denoiser(
            x_t,
            t,
            encoder_hidden_states=conditioning.tensors["states"],
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return phi
