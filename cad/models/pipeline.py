"""What the adapters over diffusers' pipelines share: weights, texts, images, samplers, digests.

A family's adapter adds how its denoiser is conditioned and called, and its noise process.
"""

from __future__ import annotations

import json
import logging
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from cad.digests import parameter_digest, settings_digest
from cad.errors import UserError
from cad.models.base import (
    PUBLISHED,
    WEIGHTS,
    DiffusionModel,
    Origin,
    resolve_device,
    resolve_dtype,
)
from cad.models.hub import Located, Source
from cad.models.loading import load_pipeline
from cad.models.random_weights import random_pipeline
from cad.sampling import Sampler

log = logging.getLogger(__name__)

SAMPLERS = ("default", "ddim")
SPARE_ROWS = 127  # T5's word vectors are padded to a multiple of 128
SAVING_NOTES = ("architectures", "dtype", "transformers_version")


@dataclass(frozen=True)
class Loaded:
    """A pipeline, all parts on one device, and where its weights came from."""

    pipeline: Any
    origin: Origin
    located: Located | None = None  # the files; None for random weights


@dataclass(frozen=True)
class Weights:
    """Which weights a pipeline gets: those of `source`, or random ones of an architecture.

    weights "published" | "random", at full size | "random-small", at small widths. `without` names
    parts that are left out. Raises UserError for other values.
    """

    source: Source
    weights: str = PUBLISHED
    architecture: str | None = None  # only asked for by random weights: "sd14"
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise UserError(
                f"model.weights={self.weights!r} is unknown; allowed: {', '.join(WEIGHTS)}."
            )
        if self.weights != PUBLISHED and self.architecture is None:
            raise UserError(
                f"model.weights={self.weights} needs model.architecture, a published one: sd14."
            )

    def pipeline(
        self, pipeline_class: Any, name: str, dtype: torch.dtype, home: torch.device
    ) -> Loaded:
        """The pipeline of model `name` on the device `home`."""
        if self.weights == PUBLISHED:
            located = self.source.locate(self.without)
            variant = self.source.variant
            pipeline = load_pipeline(pipeline_class, located, variant, dtype, self.without)
            return Loaded(pipeline.to(home), located.origin or Origin(name, "local"), located)
        architecture = str(self.architecture)
        log.warning("model=%s has random weights: its images and metrics mean nothing", name)
        pipeline = random_pipeline(
            pipeline_class,
            architecture,
            dtype,
            without=self.without,
            small=self.weights == "random-small",
            device=home,
        )
        return Loaded(pipeline, Origin(architecture, self.weights))


@dataclass
class TextEncoder:
    """One of a pipeline's text encoders with its tokenizer."""

    suffix: str  # of its names in the pipeline: "", "_2" or "_3"
    tokenizer: Any
    network: Any
    max_tokens: int  # positions, with the tokens that start and end a text

    @classmethod
    def of(cls, pipeline: Any, suffix: str = "", max_tokens: int | None = None) -> Self:
        """As the pipeline has it; by default as many tokens as it has positions (CLIP)."""
        network = getattr(pipeline, f"text_encoder{suffix}").eval().requires_grad_(False)
        tokenizer = getattr(pipeline, f"tokenizer{suffix}")
        if max_tokens is None:
            max_tokens = int(network.config.max_position_embeddings)
        return cls(suffix, tokenizer, network, max_tokens)

    def count(self, prompt: str) -> int:
        """Tokens of a prompt, not cut, with those that start and end it."""
        return len(self.tokenizer(prompt, verbose=False).input_ids)

    def token_ids(self, prompts: Sequence[str]) -> Tensor:
        """(N, L) int64, each prompt padded or cut to L = max_tokens."""
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.max_tokens,
            truncation=True,
            return_tensors="pt",
        )
        ids: Tensor = tokens.input_ids
        return ids


@dataclass(frozen=True)
class Parts:
    """What a family's adapter takes from a pipeline, beside its image autoencoder."""

    denoiser: Any
    texts: tuple[TextEncoder, ...]
    first_order: Any  # the scheduler that the attribution walks along
    multiple: int  # latent sides must be divisible by it


class PipelineModel(DiffusionModel):
    """Adapter over the modules of a diffusers pipeline, in eval mode and without gradients.

    Text encoders and image autoencoder may live on another device than the denoiser: they are
    brought to it while they work (`visiting`).
    """

    pipeline_class: ClassVar[Any]
    _located: Located | None = None  # the files of weights that were loaded

    def __init__(
        self,
        name: str,
        pipeline: Any,
        resolution: int,
        origin: Origin | None = None,
    ) -> None:
        """Takes the modules of a `pipeline_class`.

        `origin` is for weights that were loaded from somewhere. Raises UserError for a resolution
        that the networks cannot divide, a foreign tokenizer, or what else `parts` refuses.
        """
        pipeline.set_progress_bar_config(disable=True)
        parts = self.parts(name, pipeline)
        self.texts = parts.texts
        self.vae = pipeline.vae.eval().requires_grad_(False)
        self._scheduler = pipeline.scheduler
        self._first_order = parts.first_order
        for text in self.texts:
            _check_tokenizer(name, text)
        self._pixels_per_latent = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self._divisor = self._pixels_per_latent * parts.multiple
        if resolution < self._divisor or resolution % self._divisor:
            raise UserError(
                f"model.resolution={resolution} does not fit model={name}: "
                f"it must be a multiple of {self._divisor}."
            )
        side = resolution // self._pixels_per_latent
        shape = (parts.denoiser.config.in_channels, side, side)
        super().__init__(name, parts.denoiser, resolution, shape, origin or Origin(name, "local"))

    @classmethod
    @abstractmethod
    def parts(cls, name: str, pipeline: Any) -> Parts:
        """The family's parts. Raises UserError for those of model `name` that it cannot work with.

        A pipeline's own configuration counts: what it predicts, which schedule it was trained with.
        """

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
    ) -> Self:
        """Loads a pipeline in diffusers' layout from where `source` says; safetensors only.

        device "auto" | "cpu" | "cuda" | ...; dtype "auto" | "float32" | "float16" | "bfloat16".
        weights "published" | "random" | "random-small": random ones are made of `architecture`, in
        place of what `source` names. offload: text encoders and image autoencoder wait in main
        memory and are on the device only while they work; the numbers are the same.
        Raises UserError as `Source.locate` and `Weights`, and for an unknown device or dtype or a
        folder that does not load. Switches off the loading bars of diffusers and transformers.
        """
        chosen = Weights(source, weights, architecture)
        return cls._load(name, chosen, resolution, device, dtype, offload)

    @classmethod
    def _load(
        cls,
        name: str,
        weights: Weights,
        resolution: int,
        device: str | torch.device,
        dtype: str | torch.dtype,
        offload: bool,
    ) -> Self:
        device = resolve_device(device)
        home = torch.device("cpu") if offload else device
        dtype = resolve_dtype(dtype, device)
        loaded = weights.pipeline(cls.pipeline_class, name, dtype, home)
        model = cls(name, loaded.pipeline, resolution, loaded.origin)
        model.denoiser.to(device)
        model._located = loaded.located
        return model

    @property
    def tokenizer(self) -> Any:
        """Of the first text encoder."""
        return self.texts[0].tokenizer

    @property
    def text_encoder(self) -> Any:
        """The first text encoder's network."""
        return self.texts[0].network

    @property
    def max_tokens(self) -> int:
        """Positions of the first text encoder, with the start and end tokens."""
        return self.texts[0].max_tokens

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
        return settings_digest(self._surroundings())

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
            for prompt in prompts:
                length = text.count(prompt)
                if length > text.max_tokens:
                    raise UserError(
                        f"the prompt {prompt!r} has {length} tokens; the text encoder of "
                        f"model={self.name} takes {text.max_tokens}, with start and end. Shorten "
                        "it (for a concept: concept.prompt and concept.base_prompt)."
                    )

    @contextmanager
    def encoding(self) -> Iterator[None]:
        with ExitStack() as stack:
            for text in self.texts:
                stack.enter_context(visiting(text.network, self.device))
            yield

    def last_tokens(self, prompts: Sequence[str]) -> list[int]:
        self.check_prompts(prompts)
        return [self.texts[0].count(prompt) - 2 for prompt in prompts]

    def _encoded(self, text: TextEncoder, prompts: Sequence[str], *, hidden: bool = False) -> Any:
        """A text encoder's output for N prompts; with those of all its layers if `hidden`."""
        ids = text.token_ids(prompts).to(self.device)  # (N, L)
        with visiting(text.network, self.device):
            return text.network(ids, output_hidden_states=hidden)

    def sampler(self, steps: int, kind: str = "default", eta: float | None = 0.0) -> Sampler:
        if kind not in SAMPLERS:
            raise UserError(
                f"sampler.kind={kind!r} is unknown for model={self.name}; "
                f"allowed: {', '.join(SAMPLERS)}."
            )
        template = self._first_order if kind == "ddim" else self._scheduler
        return Sampler(type(template).from_config(template.config), steps, self.device, eta)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        config = self.vae.config
        pixels = 2 * images.to(self.device, self.vae.dtype) - 1  # (N, 3, H, W) in [-1, 1]
        with visiting(self.vae, self.device):
            latents: Tensor = self.vae.encode(pixels).latent_dist.mode()  # (N, C, h, w)
        return ((latents - _shift(config)) * float(config.scaling_factor)).to(self.dtype)

    @torch.no_grad()
    def decode_latents(self, x_0: Tensor) -> Tensor:
        config = self.vae.config
        latents = x_0.to(self.vae.dtype) / config.scaling_factor + _shift(config)
        with visiting(self.vae, self.device):
            pixels: Tensor = self.vae.decode(latents, return_dict=False)[0]  # (N, 3, H, W)
        return (pixels.float() / 2 + 0.5).clamp(0, 1)  # from [-1, 1]


@contextmanager
def visiting(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The module is on the device inside the block; afterwards it is as it was, where it was.

    What it leaves at home stays there, so nothing is copied back.
    """
    tensors = [*module.parameters(), *module.buffers()]
    home = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device)
        yield
    finally:
        for tensor, data in zip(tensors, home, strict=True):
            tensor.data = data


def _shift(config: Any) -> float:
    """What is subtracted from latents before they are scaled; only SD 3 has it."""
    return float(config.shift_factor or 0.0)


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
