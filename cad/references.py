"""Where the reference latents of the amplify objective come from (paper Eq. 5, Algorithm 2).

Objects: a few real images per class, as latents in a file or as pictures in a folder. Explicit
content: images that the unedited model generates for the concept's own prompt. As released, images
are stretched to the model's square, and their latents are drawn from what the autoencoder finds
likely (not as released: its pixels are in [-1, 1] and generated images' latents are scaled).
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

from cad.checks import check, finite, flag, one_of, optional, seed, steps, whole
from cad.concepts import Concept
from cad.errors import UserError
from cad.files import file_digest
from cad.identity import tensors_digest
from cad.models.base import SAMPLERS, DiffusionModel
from cad.sampling import make_generators, walk

ENCODINGS = ("sample", "mode")  # of the autoencoder's distribution of latents
FITS = ("stretch", "crop")  # into a square: the whole picture, or its largest centred square
KEYS = "edit.references"  # where the configuration has these settings
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

    They are resized to the model's resolution. `verify` is for who runs the edit: refuse pictures
    that a classifier does not call by the concept's name.
    """

    path: Path
    count: int = 5  # per class; PROTOCOL: 5
    fit: str = "stretch"  # one of FITS
    encoding: str = "sample"  # one of ENCODINGS
    seed: int = 0  # of sampled latents
    verify: bool = True

    def __post_init__(self) -> None:
        check(self, KEYS, count=whole(1), fit=one_of(FITS), encoding=one_of(ENCODINGS))
        check(self, KEYS, seed=seed, verify=flag)

    def settings(self, concept: Concept) -> Mapping[str, Any]:
        hashes = [file_digest(path) for path in self._files(concept)]
        how = {"fit": self.fit, "encoding": self.encoding, "seed": self.seed}
        return {"source": "image_folder", "sha256": hashes, **how}

    def latents(self, model: DiffusionModel, concept: Concept) -> Tensor:
        pictures = list(self.pictures(concept, model.resolution).values())
        return _encode(model, torch.stack(pictures), self.encoding, self.seed)

    def pictures(self, concept: Concept, resolution: int) -> dict[Path, Tensor]:
        """The pictures as `read_image` has them. UserError if there are too few, or one is bad."""
        return {path: read_image(path, resolution, self.fit) for path in self._files(concept)}

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
    """Images that the unedited model draws for the concept's prompt, other ones for each `seed`.

    `encoding` None keeps the latents as they were drawn, instead of decoding and encoding them.
    """

    count: int = 50
    steps: int = 50
    guidance: float = 7.5
    seed: int = 0
    kind: str = "default"  # of `DiffusionModel.sampler`: "default" | "ddim"
    encoding: str | None = "sample"  # one of ENCODINGS
    batch_size: int = 5  # images at once; changes nothing but float rounding

    def __post_init__(self) -> None:
        check(self, KEYS, count=whole(1), steps=steps, guidance=finite, seed=seed)
        check(self, KEYS, encoding=optional(one_of(ENCODINGS)), batch_size=whole(1))
        check(self, KEYS, kind=one_of(SAMPLERS))

    def settings(self, concept: Concept) -> Mapping[str, Any]:
        return {"source": "generated", "prompt": concept.prompt, **asdict(self)}

    def latents(self, model: DiffusionModel, concept: Concept) -> Tensor:
        c, empty = model.encode_prompts([concept.prompt]), model.encode_prompts([""])
        found = []
        for start in range(0, self.count, self.batch_size):
            batch = range(start, min(start + self.batch_size, self.count))
            sampler = model.sampler(self.steps, self.kind)  # one trajectory each
            # A salt of its own for each seed: consecutive seeds would share all images but one.
            generators = make_generators(batch, salt=f"references-{self.seed}")
            prompts = c.expand(len(batch)), empty.expand(len(batch))
            steps = len(sampler.timesteps)
            x_0 = walk(model, sampler, generators, *prompts, self.guidance, steps)
            if self.encoding is not None:
                x_0 = _encode(model, model.decode_latents(x_0), self.encoding, self.seed, start)
            found.append(x_0)
        return torch.cat(found)


def _encode(
    model: DiffusionModel, images: Tensor, encoding: str, seed: int, start: int = 0
) -> Tensor:
    """The images (N, 3, H, W), numbers start .. start + N - 1 of theirs, as latents."""
    if encoding == "mode":
        return model.encode_images(images)
    numbers = range(start, start + len(images))
    return model.encode_images(images, make_generators(numbers, salt=f"references-vae-{seed}"))


def read_image(path: Path, resolution: int, fit: str) -> Tensor:
    """A picture as a square, as `fit` says, (3, resolution, resolution) float32 in [0, 1].

    Raises UserError for a file that is no picture.
    """
    try:
        with Image.open(path) as image:
            square = image.convert("RGB")
    except OSError as error:
        raise UserError(f"the reference picture {path} cannot be read: {error}.") from error
    if fit == "crop":
        side = min(square.size)
        left, top = (square.width - side) // 2, (square.height - side) // 2
        square = square.crop((left, top, left + side, top + side))
    square = square.resize((resolution, resolution), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(square))  # (H, W, 3) uint8
    return pixels.permute(2, 0, 1).float() / 255
