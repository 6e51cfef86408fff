"""The interface every diffusion model is used through; a new family is one class.

Phi is the network in its own parameterisation, as in the paper: epsilon, v, the clean latent or a
flow's velocity.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Generator, Tensor, nn

from cad.checks import one_of
from cad.errors import UserError
from cad.identity import parameter_digest, tensors_digest
from cad.models.conditioning import Conditioning, TokenSpace
from cad.models.sampler import Sampler

PUBLISHED = "published"
RANDOM = ("random", "random-small")  # at full size, at small widths
WEIGHTS = (PUBLISHED, *RANDOM)
SAMPLERS = ("default", "ddim")  # kinds of `DiffusionModel.sampler`
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Origin:
    """Where weights came from: a hub id (or the model's name) and a revision (or "local")."""

    id: str
    revision: str


class DiffusionModel(ABC):
    """A text-to-image latent diffusion model: Phi(x_t, c, t) with everything around it.

    The constructor puts `denoiser` into eval mode and switches gradients off for all its
    parameters; whoever needs gradients asks for them and gives them back (`cad.attribution`).
    """

    # Group name -> regular expression over the denoiser's parameter names (cad.components).
    components: Mapping[str, str]
    # Group name -> why the family has no such group.
    no_components: Mapping[str, str] = {}
    # Regular expression of the key and value projections that read the prompt, in cross-attention;
    # None for a family without.
    text_projections: str | None = None
    # What is applied to the weights at present, innermost last: see `WeightEdit.applied`.
    edits: tuple[Any, ...] = ()

    def __init__(
        self,
        name: str,
        denoiser: nn.Module,
        resolution: int,
        latent_shape: tuple[int, int, int],
        origin: Origin,
    ) -> None:
        self.name = name
        self.denoiser = denoiser.eval().requires_grad_(False)
        self.resolution = resolution  # pixels per side
        self.latent_shape = latent_shape  # (C, h, w)
        self.origin = origin

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.denoiser.parameters()).dtype

    def latent_shape_at(self, size: tuple[int, int] | None) -> tuple[int, int, int]:
        """(C, h, w) of images of `size`, (height, width) in pixels; None is the model's own.

        Raises UserError for a size that the model cannot draw.
        """
        if size is None or size == (self.resolution, self.resolution):
            return self.latent_shape
        raise UserError(
            f"model={self.name} makes images of {self.resolution} x {self.resolution} pixels only, "
            f"not of {size[0]} x {size[1]} (height x width)."
        )

    def provenance(self) -> dict[str, Any]:
        """All that identifies the model in keys and results; JSON-able, the same on every machine.

        `fingerprint` is the SHA-256 of the denoiser's parameters as loaded, `pipeline` that of what
        surrounds them (configuration, text encoder, image autoencoder, scheduler).
        """
        return {
            "id": self.origin.id,
            "revision": self.origin.revision,
            "class": type(self).__name__,
            "prediction_type": self.prediction_type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "resolution": self.resolution,
            "latent_shape": list(self.latent_shape),
            **self.digests,
        }

    def file_digests(self) -> dict[str, str]:
        """SHA-256 of the files that the weights were read from; none if there were none."""
        return {}

    @cached_property
    def digests(self) -> dict[str, str]:
        """`provenance`'s, computed once: inside `WeightEdit.applied` they are the unedited model's.

        Whoever changes weights for good deletes them, and they are computed again.
        """
        pipeline = self.surroundings_digest()
        return {"fingerprint": parameter_digest(self.denoiser), "pipeline": pipeline}

    def rounded_fingerprint(self, dtype: str) -> str:
        """The `fingerprint` of the same weights, loaded as another dtype; computed every time."""
        named = self.denoiser.named_parameters()
        return tensors_digest((name, weight.to(DTYPES[dtype])) for name, weight in named)

    @property
    @abstractmethod
    def prediction_type(self) -> str:
        """The parameterisation of Phi: "epsilon", "v_prediction", "sample" (x_0) or "flow"."""

    @abstractmethod
    def surroundings_digest(self) -> str:
        """SHA-256 of everything but the denoiser's weights that an image depends on."""

    @abstractmethod
    def check_prompts(self, prompts: Sequence[str]) -> None:
        """UserError if a prompt is longer than the encoder takes. Runs no network."""

    @abstractmethod
    def encode_prompts(
        self, prompts: Sequence[str], *, truncate: bool = False, apart: bool = False
    ) -> Conditioning:
        """Text conditioning of N prompts, without gradient.

        They are encoded at once, or each by itself if `apart`: then no other moves its bits. Raises
        UserError if a prompt is longer than the encoder takes, unless `truncate`.
        """

    def encoding(self) -> AbstractContextManager[None]:
        """A block with many calls of `encode_prompts`: what they work with stays on the device."""
        return nullcontext()

    def last_tokens(self, prompts: Sequence[str]) -> list[int]:
        """The position of each prompt's last token in what `encode_prompts` gives.

        It is 0, the start token, for an empty prompt. Raises UserError for a prompt that is too
        long, and for a model whose conditioning has no such positions, or several.
        """
        raise UserError(f"model={self.name} does not say at which position a prompt ends.")

    def token_space(self) -> TokenSpace:
        """The tokens of the text encoder, for attacks on them.

        Raises UserError for a model whose conditioning is not the states of one encoder.
        """
        raise UserError(f"model={self.name} has no text encoder whose tokens can be attacked.")

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Phi(x_t, c, t), in the model's own parameterisation.

        x_t (N, C, h, w), as scaled by `Sampler.scale`; t () or (N,); returns (N, C, h, w).
        Differentiable in the weights, in x_t and in the conditioning, if gradients are enabled.
        """

    @abstractmethod
    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What Phi(x_t, c, t) is trained to predict: epsilon, v, x_0, or the flow's velocity.

        x_0 and noise (N, C, h, w), t () or (N,); returns (N, C, h, w).
        """

    @abstractmethod
    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of the forward process. Shapes as in `target`."""

    def epsilon_weight(self, t: Tensor) -> float:
        """The factor that turns a squared difference of predictions at (x_t, t) into one of noises.

        Raises UserError for a parameterisation that the adapter knows no noise for.
        """
        if self.prediction_type != "epsilon":
            raise UserError(
                f"edit.weighting=epsilon is not allowed for model={self.name}, which predicts "
                f"{self.prediction_type!r}; use edit.weighting=model."
            )
        return 1.0

    @abstractmethod
    def sampler(self, steps: int, kind: str = "default", eta: float | None = 0.0) -> Sampler:
        """A fresh sampler for one trajectory.

        kind: "default", the one that the weights were published with, or "ddim", the family's
        first-order sampler that the attribution walks along (DDIM; Euler for flows). eta: fresh
        noise per step, 0 (none) to 1 (as much as ancestral sampling); None is 1 for a sampler that
        has it, else 0. Raises UserError for what the family or `Sampler` does not have.
        """

    @abstractmethod
    def encode_images(
        self, images: Tensor, generators: Sequence[Generator] | None = None
    ) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] -> scaled latents x_0 (N, C, h, w).

        The most likely ones; with N generators, drawn from the autoencoder's distribution.
        """

    @abstractmethod
    def decode_latents(self, x_0: Tensor) -> Tensor:
        """Scaled latents (N, C, h, w) -> images (N, 3, H, W), float32 in [0, 1], same device."""


def check_gradient_checkpointing(model: DiffusionModel, wanted: bool, key: str) -> None:
    """UserError if it is wanted and the denoiser cannot do it; `key` is its configuration key."""
    if wanted and not getattr(model.denoiser, "_supports_gradient_checkpointing", False):
        raise UserError(
            f"{key}=true is not allowed for model={model.name}: "
            f"{type(model.denoiser).__name__} does not support it."
        )


@contextmanager
def checkpointed_gradients(denoiser: Any, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing inside the block, if it is wanted; afterwards as it was.

    It takes less memory for the same gradients: the backward computes activations again.
    """
    if not wanted or denoiser.is_gradient_checkpointing:
        yield
        return
    denoiser.enable_gradient_checkpointing()
    try:
        yield
    finally:
        denoiser.disable_gradient_checkpointing()


def resolve_device(device: str | torch.device, key: str = "device") -> torch.device:
    """The device to work on; "auto" is the GPU if there is one, the CPU otherwise.

    Raises UserError, which names the key, for a device that is unknown or not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", str(device)):
        raise UserError(f"{key}={str(device)!r} is unknown; allowed: auto, cpu, cuda, cuda:0, ...")
    resolved = torch.device(device)
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"{key}={device!r} is not there: PyTorch sees {torch.cuda.device_count()} CUDA "
            f"devices. Use {key}=cpu or {key}=auto."
        )
    return resolved


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The weights' type; "auto" is float16 on a GPU, float32 on a CPU. UserError if unknown."""
    if dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return DTYPES[one_of(("auto", *DTYPES))("dtype", dtype)]
