"""The base of the adapters over diffusers' pipelines: texts, images, samplers, digests."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from cad.checks import one_of
from cad.errors import UserError
from cad.identity import digest, parameter_digest
from cad.models.base import SAMPLERS, DiffusionModel, Origin
from cad.models.conditioning import TextEncoder, TokenSpace, visiting
from cad.models.hub import Located
from cad.models.sampler import Sampler, draw

SPARE_ROWS = 127  # T5's word vectors are padded to a multiple of 128
SAVING_NOTES = ("architectures", "dtype", "transformers_version")


class PipelineModel(DiffusionModel):
    """Adapter over the modules of a diffusers pipeline, in eval mode and without gradients.

    A family adds how its denoiser is conditioned and called, and its noise process. Text encoders
    and image autoencoder may live on another device than the denoiser: they visit it to work.
    """

    pipeline_class: ClassVar[Any]
    denoiser_name: ClassVar[str]  # in the pipeline
    text_suffixes: ClassVar[tuple[str, ...]]  # of the pipeline's text encoders
    t5_parts: ClassVar[tuple[str, ...]] = ()  # of the pipeline, which can do without them

    def __init__(
        self, name: str, pipeline: Any, resolution: int, located: Located | None = None
    ) -> None:
        """Takes the modules of a `pipeline_class`, whose weights were `located` somewhere.

        Raises UserError for a resolution that the networks cannot divide, a foreign tokenizer, or a
        scheduler that `first_order` refuses.
        """
        self._located = located
        self._scheduler = pipeline.scheduler
        self._first_order = self.first_order(name, pipeline.scheduler)
        self.texts = [
            TextEncoder(name, pipeline, suffix)
            for suffix in self.text_suffixes
            if getattr(pipeline, f"text_encoder{suffix}") is not None
        ]
        for text in self.texts:
            _check_tokenizer(name, text)
        self.vae = pipeline.vae.eval().requires_grad_(False)
        # Subtracted from latents before they are scaled; only SD 3 has one.
        self._shift = float(self.vae.config.shift_factor or 0.0)
        self._pixels_per_latent = pixels_per_latent(self.vae)
        denoiser = getattr(pipeline, self.denoiser_name)
        config, side = denoiser.config, resolution // self._pixels_per_latent
        multiple = config.get("patch_size") or 2 ** (len(config.block_out_channels) - 1)
        self._divisor = self._pixels_per_latent * multiple
        shape = (config.in_channels, side, side)
        origin = (located and located.origin) or Origin(name, "local")
        super().__init__(name, denoiser, resolution, shape, origin)
        self.latent_shape_at((resolution, resolution))  # only to hear its complaint

    @classmethod
    @abstractmethod
    def first_order(cls, name: str, scheduler: Any) -> Any:
        """The scheduler that the attribution walks along, with the noise process of the pipeline's.

        Raises UserError for one of model `name` that the adapter cannot work with.
        """

    @classmethod
    def default_resolution(cls, pipeline: Any) -> int:
        """The pixels per side of the images that a pipeline makes unless it is told otherwise."""
        denoiser = getattr(pipeline, cls.denoiser_name)
        return int(denoiser.config.sample_size) * pixels_per_latent(pipeline.vae)

    @property
    def tokenizer(self) -> Any:
        """The first text encoder's tokenizer."""
        return self.texts[0].tokenizer

    @property
    def text_encoder(self) -> Any:
        """The first text encoder's network."""
        return self.texts[0].network

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

    def file_digests(self) -> dict[str, str]:
        return {} if self._located is None else self._located.file_digests()

    def surroundings_digest(self) -> str:
        return digest(self._surroundings())

    def _surroundings(self) -> dict[str, Any]:
        """All that an image depends on besides the denoiser's weights; JSON-able."""
        settings = {
            "denoiser": _public(self.denoiser.config),  # heads and norms change no weight's shape
            "vae": [parameter_digest(self.vae), _public(self.vae.config)],
            "scheduler": [type(self._scheduler).__name__, _public(self._scheduler.config)],
        }
        for text in self.texts:
            config = _public(text.network.config.to_dict())
            settings[f"text_encoder{text.suffix}"] = [parameter_digest(text.network), config]
            settings[f"tokenizer{text.suffix}"] = _describe_tokenizer(text.tokenizer)
        return settings

    def check_prompts(self, prompts: Sequence[str]) -> None:
        for text in self.texts:
            text.check(prompts)

    @contextmanager
    def encoding(self) -> Iterator[None]:
        with ExitStack() as stack:
            for text in self.texts:
                stack.enter_context(visiting(text.network, self.device))
            yield

    def last_tokens(self, prompts: Sequence[str]) -> list[int]:
        self.check_prompts(prompts)
        return [self.texts[0].count(prompt) - 2 for prompt in prompts]

    def token_space(self) -> TokenSpace:
        """Raises UserError for a model with several, which cut or embed a prompt differently."""
        if len(self.texts) > 1:
            raise UserError(
                f"model={self.name} reads a prompt through {len(self.texts)} text encoders: "
                "attacks on tokens are made for models with one, such as model=sd14 or sd21."
            )
        return TokenSpace(self.texts[0], self.device)

    def sampler(self, steps: int, kind: str = "default", eta: float | None = 0.0) -> Sampler:
        if kind not in SAMPLERS:
            one_of(SAMPLERS)("sampler.kind", kind)
        template = self._first_order if kind == "ddim" else self._scheduler
        return Sampler(type(template).from_config(template.config), steps, self.device, eta)

    @torch.no_grad()
    def encode_images(
        self, images: Tensor, generators: Sequence[Generator] | None = None
    ) -> Tensor:
        pixels = 2 * images.to(self.device, self.vae.dtype) - 1  # (N, 3, H, W) in [-1, 1]
        with visiting(self.vae, self.device):
            found = self.vae.encode(pixels).latent_dist
        latents: Tensor = found.mode()  # (N, C, h, w)
        if generators is not None:
            latents = latents + found.std * draw(latents.shape[1:], generators).to(latents)
        return ((latents - self._shift) * float(self.vae.config.scaling_factor)).to(self.dtype)

    @torch.no_grad()
    def decode_latents(self, x_0: Tensor) -> Tensor:
        latents = x_0.to(self.vae.dtype) / self.vae.config.scaling_factor + self._shift
        with visiting(self.vae, x_0.device):
            pixels: Tensor = self.vae.decode(latents, return_dict=False)[0]  # (N, 3, H, W)
        return (pixels.float() / 2 + 0.5).clamp(0, 1)  # from [-1, 1]


def pixels_per_latent(vae: Any) -> int:
    """How many pixels of a side one latent stands for: each level but the last halves it."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def _check_tokenizer(name: str, text: TextEncoder) -> None:
    # A missing tokenizer folder does not fail to load: it gives an almost empty tokenizer.
    tokens, rows = len(text.tokenizer), text.network.config.vocab_size
    spare = SPARE_ROWS if text.network.config.model_type == "t5" else 0
    if not rows - spare <= tokens <= rows:
        raise UserError(
            f"the tokenizer of model={name} has {tokens} tokens and its text encoder {rows}: "
            "the tokenizer's files are missing or belong to another model. Fetch the weights again."
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
