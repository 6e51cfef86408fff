"""Stable Diffusion 1.x and 2.x, and the miniature: one CLIP text encoder and a UNet.

Phi predicts the noise (epsilon; SD 1.x) or the velocity v = alpha_t * epsilon - sigma_t * x_0
(SD 2.1, the miniature), with alpha_t^2 = alpha_bar_t. Between them the objective of Eq. 4 only
weighs the timesteps differently: see `epsilon_weight`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
import transformers
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from cad.components import UNET_COMPONENTS
from cad.digests import parameter_digest, settings_digest
from cad.errors import UserError
from cad.models.base import (
    Conditioning,
    DiffusionModel,
    Origin,
    resolve_device,
    resolve_dtype,
)
from cad.models.hub import Source
from cad.sampling import Sampler

PREDICTION_TYPES = ("epsilon", "v_prediction")
SAMPLERS = ("default", "ddim")
SAVING_NOTES = ("architectures", "dtype", "transformers_version")


class StableDiffusionModel(DiffusionModel):
    """Adapter over a `StableDiffusionPipeline`. Its conditioning is "states", (N, L, D)."""

    components = UNET_COMPONENTS

    def __init__(
        self,
        name: str,
        pipeline: Any,
        resolution: int,
        origin: Origin | None = None,
    ) -> None:
        """Takes a `StableDiffusionPipeline`'s modules, in eval mode and without gradients.

        `origin` is for weights that were loaded from somewhere. Raises UserError for a resolution
        that the networks cannot divide, an unknown parameterisation, or a foreign tokenizer.
        """
        pipeline.set_progress_bar_config(disable=True)
        self.tokenizer = pipeline.tokenizer
        self.text_encoder = pipeline.text_encoder.eval().requires_grad_(False)
        self.vae = pipeline.vae.eval().requires_grad_(False)
        self._scheduler = pipeline.scheduler
        # DDIM's default clips x_0 to [-1, 1], which is meant for pixels: latents are not bounded.
        self._ddim = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
        _check_tokenizer(name, len(self.tokenizer), self.text_encoder.config.vocab_size)
        _check_prediction_type(name, self.prediction_type)
        self._pixels_per_latent = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
        self._divisor = self._pixels_per_latent * 2 ** (
            len(pipeline.unet.config.block_out_channels) - 1
        )
        if resolution < self._divisor or resolution % self._divisor:
            raise UserError(
                f"model.resolution={resolution} does not fit model={name}: "
                f"it must be a multiple of {self._divisor}."
            )
        side = resolution // self._pixels_per_latent
        shape = (pipeline.unet.config.in_channels, side, side)
        super().__init__(name, pipeline.unet, resolution, shape, origin or Origin(name, "local"))

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        source: Source,
        resolution: int,
        device: str | torch.device,
        dtype: str | torch.dtype,
    ) -> Self:
        """Loads a pipeline in diffusers' layout from where `source` says; safetensors only.

        device "auto" | "cpu" | "cuda" | ...; dtype "auto" | "float32" | "float16" | "bfloat16".
        Raises UserError as `Source.locate`, and for an unknown device or dtype or a folder that
        does not load. Switches off the loading bars of diffusers and transformers.
        """
        device = resolve_device(device)
        dtype = resolve_dtype(dtype, device)
        folder = source.locate()
        pipeline = load_pipeline(folder, source.variant, dtype).to(device)
        revision = folder.name if source.repo else "local"  # a snapshot is named by its commit
        return cls(name, pipeline, resolution, Origin(source.repo or name, revision))

    @property
    def prediction_type(self) -> str:
        return str(self._ddim.config.prediction_type)

    @property
    def max_tokens(self) -> int:
        """Positions of the text encoder, with the start and end tokens."""
        return int(self.text_encoder.config.max_position_embeddings)

    def latent_shape_at(self, size: tuple[int, int] | None) -> tuple[int, int, int]:
        if size is None:
            return self.latent_shape
        if any(side < self._divisor or side % self._divisor for side in size):
            raise UserError(
                f"model={self.name} cannot make images of {size[0]} x {size[1]} pixels (height x "
                f"width): both must be multiples of {self._divisor}."
            )
        height, width = (side // self._pixels_per_latent for side in size)
        return self.latent_shape[0], height, width

    def surroundings_digest(self) -> str:
        text_config = self.text_encoder.config.to_dict()
        settings = {
            "denoiser": _public(self.denoiser.config),  # heads and norms change no weight's shape
            "text_encoder": [parameter_digest(self.text_encoder), _public(text_config)],
            "vae": [parameter_digest(self.vae), _public(self.vae.config)],
            "tokenizer": _describe_tokenizer(self.tokenizer),
            "scheduler": [type(self._scheduler).__name__, _public(self._scheduler.config)],
        }
        return settings_digest(settings)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], *, truncate: bool = False) -> Conditioning:
        if not truncate:
            self.check_prompts(prompts)
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.max_tokens,
            truncation=True,
            return_tensors="pt",
        )
        ids = tokens.input_ids.to(self.device)  # (N, L)
        return Conditioning({"states": self.text_encoder(ids).last_hidden_state})  # (N, L, D)

    def last_tokens(self, prompts: Sequence[str]) -> list[int]:
        self.check_prompts(prompts)
        return [len(self.tokenizer(prompt, verbose=False).input_ids) - 2 for prompt in prompts]

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        states = conditioning.tensors["states"]
        phi: Tensor = self.denoiser(x_t, t, encoder_hidden_states=states, return_dict=False)[0]
        return phi

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise
        # In float32, because the scheduler takes alpha_bar_t into the dtype of its arguments.
        velocity: Tensor = self._ddim.get_velocity(x_0.float(), noise.float(), t.expand(len(x_0)))
        return velocity.to(x_0.dtype)

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        x_t: Tensor = self._ddim.add_noise(x_0.float(), noise.float(), t.expand(len(x_0)))
        return x_t.to(x_0.dtype)  # in float32 until here, as in `target`

    def epsilon_weight(self, t: Tensor) -> float:
        """alpha_bar_t for v, 1 for epsilon.

        From x_t = alpha_t x_0 + sigma_t eps and v = alpha_t eps - sigma_t x_0, with alpha_t^2 +
        sigma_t^2 = 1, follows eps = alpha_t v + sigma_t x_t. Two predictions at one x_t thus differ
        by eps_c - eps_b = alpha_t (v_c - v_b), and || . ||^2 by alpha_t^2 = alpha_bar_t.
        """
        if self.prediction_type == "epsilon":
            return 1.0
        return float(self._ddim.alphas_cumprod[int(t)])

    def sampler(self, steps: int, kind: str = "default", eta: float | None = 0.0) -> Sampler:
        if kind not in SAMPLERS:
            raise UserError(
                f"sampler.kind={kind!r} is unknown for model={self.name}; "
                f"allowed: {', '.join(SAMPLERS)}."
            )
        template = self._ddim if kind == "ddim" else self._scheduler
        return Sampler(type(template).from_config(template.config), steps, self.device, eta)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        pixels = 2 * images.to(self.device, self.vae.dtype) - 1  # (N, 3, H, W) in [-1, 1]
        latents: Tensor = self.vae.encode(pixels).latent_dist.mode()  # (N, C, h, w)
        return (latents * float(self.vae.config.scaling_factor)).to(self.dtype)

    @torch.no_grad()
    def decode_latents(self, x_0: Tensor) -> Tensor:
        latents = x_0.to(self.vae.dtype) / self.vae.config.scaling_factor
        pixels: Tensor = self.vae.decode(latents, return_dict=False)[0]  # (N, 3, H, W) in [-1, 1]
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            length = len(self.tokenizer(prompt, verbose=False).input_ids)
            if length > self.max_tokens:
                raise UserError(
                    f"the prompt {prompt!r} has {length} tokens; the text encoder of "
                    f"model={self.name} takes {self.max_tokens}, with start and end. Shorten it "
                    "(for a concept: concept.prompt and concept.base_prompt)."
                )


def load_pipeline(folder: Path, variant: str | None, dtype: torch.dtype) -> Any:
    """A `StableDiffusionPipeline` in diffusers' layout, safetensors only; UserError if it fails.

    Switches off the loading bars of diffusers and transformers.
    """
    # Typed Any, as its parts are registered at run time.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        return StableDiffusionPipeline.from_pretrained(
            str(folder),
            variant=variant,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"the pipeline in {folder} does not load: {error}") from error


def _check_tokenizer(name: str, tokens: int, expected: int) -> None:
    # A missing tokenizer folder does not fail to load: it gives an almost empty tokenizer.
    if tokens != expected:
        raise UserError(
            f"the tokenizer of model={name} has {tokens} tokens and its text encoder {expected}: "
            "the tokenizer's files are missing or belong to another model. Fetch the weights again."
        )


def _check_prediction_type(name: str, prediction_type: str) -> None:
    if prediction_type not in PREDICTION_TYPES:
        raise UserError(
            f"model={name} predicts {prediction_type!r}; "
            f"this adapter knows {', '.join(PREDICTION_TYPES)}."
        )


def _public(config: Any) -> dict[str, Any]:
    """A configuration without its library's notes on where, when and how it was saved."""
    return {
        key: value for key, value in config.items() if key[0] != "_" and key not in SAVING_NOTES
    }


def _describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Vocabulary, merges, normalisation, special tokens; not what a call sets and leaves behind."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = ("added_tokens", "model", "normalizer", "pre_tokenizer", "post_processor")
    return {"pad_token": tokenizer.pad_token} | {part: backend[part] for part in parts}
