"""Where the reference latents of the amplify objective come from (paper Eq. 5, Algorithm 2).

Objects: a few real images per class, as latents in a file or as pictures in a folder. Explicit
content: images that the unedited model generates for the concept's own prompt.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cad.concepts import Concept
from cad.digests import tensors_digest
from cad.errors import UserError
from cad.files import file_digest
from cad.models.base import DiffusionModel
from cad.sampling import make_generators, walk

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class References(ABC):
    """Latents x_0 of images that show a concept. UserError if there are none for it."""

    @abstractmethod
    def settings(self, concept: Concept) -> Mapping[str, Any]:
        """All that determines the latents, beside the model; JSON-able, and cheap to ask for."""

    @abstractmethod
    def latents(self, model: DiffusionModel, concept: Concept) -> Tensor:
        """Scaled latents (R, C, h, w) on the model's device, in its dtype."""


@dataclass(frozen=True)
class LatentFile(References):
    """A safetensors file with scaled latents (R, C, h, w) under each concept's name."""

    path: Path

    def settings(self, concept: Concept) -> Mapping[str, Any]:
        digest = tensors_digest([(concept.name, self._read(concept))])
        return {"source": "latent_file", "sha256": digest}

    def latents(self, model: DiffusionModel, concept: Concept) -> Tensor:
        latents = self._read(concept)
        if latents.shape[1:] != model.latent_shape:
            raise UserError(
                f"the latents of {concept.name} in {self.path} are {tuple(latents.shape[1:])}, "
                f"model={model.name} takes {model.latent_shape}: they belong to another model."
            )
        return latents.to(model.device, model.dtype)

    def _read(self, concept: Concept) -> Tensor:
        try:
            found = load_file(self.path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"edit.references.path={self.path} cannot be read: {error}.") from error
        if concept.name not in found:
            raise UserError(
                f"concept={concept.name} has no reference latents in {self.path}; "
                f"there are: {', '.join(sorted(found))}."
            )
        return found[concept.name]


@dataclass(frozen=True)
class ImageFolder(References):
    """The first `count` pictures, by name, of the folder `path`/NAME-OF-CONCEPT.

    The largest centred square is resized to the model's resolution. `verify` is for who runs the
    edit: refuse pictures that a classifier does not call by the concept's name.
    """

    path: Path
    count: int = 5  # per class; PROTOCOL: 5
    verify: bool = True

    def settings(self, concept: Concept) -> Mapping[str, Any]:
        hashes = [file_digest(path) for path in self._files(concept)]
        return {"source": "image_folder", "sha256": hashes}

    def latents(self, model: DiffusionModel, concept: Concept) -> Tensor:
        pictures = list(self.pictures(concept, model.resolution).values())
        return model.encode_images(torch.stack(pictures))

    def pictures(self, concept: Concept, resolution: int) -> dict[Path, Tensor]:
        """The pictures as `read_image` has them. UserError if there are too few, or one is bad."""
        return {path: read_image(path, resolution) for path in self._files(concept)}

    def _files(self, concept: Concept) -> list[Path]:
        folder = Path(self.path) / concept.name
        files = sorted(p for p in folder.glob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if len(files) < self.count:
            raise UserError(
                f"concept={concept.name} needs {self.count} photographs of it in {folder} "
                f"({', '.join(IMAGE_SUFFIXES)}); there are {len(files)}. Put them there, or name "
                f"the folder that has {concept.name}/ with model.references.object.path=DIR; the "
                "paper took images of ImageNet that its classifier gets right."
            )
        return files[: self.count]


@dataclass(frozen=True)
class GeneratedImages(References):
    """Images that the unedited model draws for the concept's prompt, other ones for each `seed`."""

    count: int = 5
    steps: int = 50
    guidance: float = 7.5
    seed: int = 0
    kind: str = "default"  # of `DiffusionModel.sampler`: "default" | "ddim"

    def settings(self, concept: Concept) -> Mapping[str, Any]:
        return {"source": "generated", "prompt": concept.prompt, **asdict(self)}

    def latents(self, model: DiffusionModel, concept: Concept) -> Tensor:
        c = model.encode_prompts([concept.prompt]).expand(self.count)
        empty = model.encode_prompts([""]).expand(self.count)
        sampler = model.sampler(self.steps, self.kind)
        # A salt of its own for each seed: consecutive seeds would share all images but one.
        generators = make_generators(range(self.count), salt=f"references-{self.seed}")
        return walk(model, sampler, generators, c, empty, self.guidance, len(sampler.timesteps))


def read_image(path: Path, resolution: int) -> Tensor:
    """A picture's largest centred square, (3, resolution, resolution) float32 in [0, 1].

    Raises UserError for a file that is no picture.
    """
    try:
        with Image.open(path) as image:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = image.convert("RGB").crop((left, top, left + side, top + side))
    except OSError as error:
        raise UserError(f"the reference picture {path} cannot be read: {error}.") from error
    square = square.resize((resolution, resolution), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(square))  # (H, W, 3) uint8
    return pixels.permute(2, 0, 1).float() / 255
