"""Where the reference latents of the amplify objective come from (paper Eq. 5, Algorithm 2).

Objects: a few real images per class, as latents in a file or as pictures in a folder. Explicit
content: images that the unedited model generates for the concept's own prompt.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cad.concepts import Concept
from cad.digests import tensors_digest
from cad.errors import UserError
from cad.models.base import DiffusionModel
from cad.sampling import make_generators, walk

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class References(ABC):
    """Latents x_0 of images that show a concept."""

    @abstractmethod
    def describe(self, concept: Concept) -> Mapping[str, Any]:
        """What determines the latents, beside the model; JSON-able, and cheap to ask for.

        Raises UserError if there are no references for the concept.
        """

    @abstractmethod
    def latents(self, model: DiffusionModel, concept: Concept) -> Tensor:
        """Scaled latents (R, C, h, w) on the model's device, in its dtype. UserError as above."""


@dataclass(frozen=True)
class LatentFile(References):
    """A safetensors file with scaled latents (R, C, h, w) under each concept's name."""

    path: Path

    def describe(self, concept: Concept) -> Mapping[str, Any]:
        latents = self._read(concept)
        return {"source": "latent_file", "sha256": tensors_digest([(concept.name, latents)])}

    def latents(self, model: DiffusionModel, concept: Concept) -> Tensor:
        latents = self._read(concept)
        if latents.shape[1:] != model.latent_shape:
            raise UserError(
                f"the latents of {concept.name} in {self.path} are {tuple(latents.shape[1:])}, "
                f"model={model.name} takes {model.latent_shape}: they belong to another model."
            )
        return latents.to(model.device, model.dtype)

    def _read(self, concept: Concept) -> Tensor:
        path = Path(self.path)
        if not path.is_file():
            raise UserError(
                f"edit.references.path={path} is not there; it holds reference latents."
            )
        try:
            with safe_open(path, framework="pt") as file:
                names = sorted(file.keys())
                if concept.name not in names:
                    raise UserError(
                        f"concept={concept.name} has no reference latents in {path}; "
                        f"there are: {', '.join(names)}."
                    )
                latents: Tensor = file.get_tensor(concept.name)
                return latents
        except SafetensorError as error:
            raise UserError(f"edit.references.path={path} cannot be read: {error}.") from error


@dataclass(frozen=True)
class ImageFolder(References):
    """The first `count` pictures, by name, of the folder `path`/NAME-OF-CONCEPT.

    The largest centred square is resized to the model's resolution.
    """

    path: Path
    count: int = 5  # per class; PROTOCOL: 5

    def describe(self, concept: Concept) -> Mapping[str, Any]:
        hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in self._files(concept)]
        return {"source": "image_folder", "sha256": hashes}

    def latents(self, model: DiffusionModel, concept: Concept) -> Tensor:
        images = [read_image(path, model.resolution) for path in self._files(concept)]
        return model.encode_images(torch.stack(images))

    def _files(self, concept: Concept) -> list[Path]:
        folder = Path(self.path) / concept.name
        files = sorted(p for p in folder.glob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if len(files) < self.count:
            raise UserError(
                f"concept={concept.name} needs {self.count} reference pictures in {folder} "
                f"({', '.join(IMAGE_SUFFIXES)}); there are {len(files)}."
            )
        return files[: self.count]


@dataclass(frozen=True)
class GeneratedImages(References):
    """What the unedited model draws for the concept's prompt; another `seed`, other images."""

    count: int = 5
    steps: int = 50
    guidance: float = 7.5
    seed: int = 0
    kind: str = "default"  # of `DiffusionModel.sampler`: "default" | "ddim"

    def describe(self, concept: Concept) -> Mapping[str, Any]:
        return {"source": "generated", "prompt": concept.prompt, **asdict(self)}

    def latents(self, model: DiffusionModel, concept: Concept) -> Tensor:
        c = model.encode_prompts([concept.prompt]).expand(self.count)
        unconditional = model.encode_prompts([""]).expand(self.count)
        sampler = model.sampler(self.steps, self.kind)
        # A salt of its own for each seed: consecutive seeds would share all images but one.
        generators = make_generators(range(self.count), salt=f"references-{self.seed}")
        every_step = len(sampler.timesteps)
        return walk(model, sampler, generators, c, unconditional, self.guidance, every_step)


def read_image(path: Path, resolution: int) -> Tensor:
    """A picture's largest centred square, (3, resolution, resolution) float32 in [0, 1]."""
    with Image.open(path) as image:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.convert("RGB").crop((left, top, left + side, top + side))
    square = square.resize((resolution, resolution), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(square))  # (H, W, 3) uint8
    return pixels.permute(2, 0, 1).float() / 255
