"""From prompts to pixels: a set's fixed batches, each sampled by the model as it is given.

Batches are a fixed partition of the set: images of one size and guidance, in their order, are cut
into pieces of `batch_size`, and a batch with anything missing is sampled whole. So an interrupted
and resumed set, or one that several machines sampled, has the bytes of one that was made at once,
on the same kind of machine and number of threads. Every image has its own random generator and
every prompt is encoded by itself; in another batch (another order, batch size or length of set) an
image still differs in the last bits of its floats, because matrix products of other shapes add in
another order: on a CPU in float32, batches of 7 instead of 20 moved 0.009 % of the values by one
grey level and none by more, one thread instead of two 0.024 %.

A batch that does not fit into the GPU's memory, and all later ones of that call, are sampled in
halves, or halves of these. The key stays what it is, but images have the bytes of smaller batches:
where bytes matter, set `batch_size` to what the warning says.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cad.checks import check, finite, one_of, share, steps, whole
from cad.errors import UserError
from cad.identity import Identified
from cad.models.base import SAMPLERS, DiffusionModel
from cad.models.conditioning import Conditioning
from cad.sampling import sample_latents
from evaluation.pixels import Pixels
from evaluation.prompts import Prompt

Finite = NDArray[np.bool_]
"""Which of N images have finite values only, (N,)."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SamplerSettings(Identified):
    """How images are sampled: `steps` of the scheduler `kind`, classifier-free `guidance` scale.

    `kind` is one of `DiffusionModel.sampler`'s: "default" (the pipeline's own) or "ddim".
    `batch_size` is the partition of the set, and so part of its key. `eta`, 0 to 1, is fresh noise
    at every step, of kind "ddim": a way round what an edit does to the usual trajectory.
    """

    version: ClassVar[int] = 2  # of image sets: their pixels and their records

    steps: int
    guidance: float
    kind: str
    batch_size: int
    eta: float = 0.0

    def __post_init__(self) -> None:
        check(self, "model.sampler", steps=steps, guidance=finite, batch_size=whole(1))
        check(self, "model.sampler", kind=one_of(SAMPLERS), eta=share)

    def settings(self) -> dict[str, Any]:
        """All, but no eta of 0, so that sets keep the keys that they had without it."""
        found = super().settings()
        return found if self.eta else {key: found[key] for key in found if key != "eta"}


@dataclass(frozen=True)
class Batch:
    """Images that are sampled together: their places in the set, and what they have in common."""

    indices: tuple[int, ...]
    prompts: tuple[Prompt, ...]  # of these indices
    guidance: float
    size: tuple[int, int] | None  # height, width in pixels; None: the model's own


Sampled = tuple[Batch, Pixels, Finite]
"""A batch, its images, and which of them have finite values only; others are black there."""


class Engine:
    """Samples batches, in this process; subclasses elsewhere, to the same bytes on alike machines.

    Its `with` block spans the sets of a run: what an engine starts, it keeps until the block ends.
    """

    def sampled(
        self, model: DiffusionModel, settings: SamplerSettings, batches: Sequence[Batch]
    ) -> Iterator[Sampled]:
        """Every batch with its images under `model` as it is, edits included; in any order."""
        return sample_batches(model, settings, batches)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return None


def plan_batches(
    model: DiffusionModel, prompts: Sequence[Prompt], settings: SamplerSettings
) -> list[Batch]:
    """The set's fixed partition, in the order of the batches' first images."""
    alike: dict[tuple[tuple[int, int] | None, float], list[int]] = {}
    own = (model.resolution, model.resolution)
    for index, prompt in enumerate(prompts):
        size = None if prompt.size == own else prompt.size
        guidance = settings.guidance if prompt.guidance is None else prompt.guidance
        alike.setdefault((size, guidance), []).append(index)
    batches = []
    for (size, guidance), indices in alike.items():
        for start in range(0, len(indices), settings.batch_size):
            piece = tuple(indices[start : start + settings.batch_size])
            batches.append(Batch(piece, tuple(prompts[i] for i in piece), guidance, size))
    return sorted(batches, key=lambda batch: batch.indices[0])


def sample_batches(
    model: DiffusionModel, settings: SamplerSettings, batches: Sequence[Batch]
) -> Iterator[Sampled]:
    """Each batch with its images, in order; every distinct prompt is encoded once.

    Raises UserError if a single image does not fit into the GPU's memory.
    """
    unconditional = model.encode_prompts([""])
    most, encoded = settings.batch_size, _encoded(model, batches, model.device)
    for batch, conditioning in zip(batches, encoded, strict=True):
        pieces: list[tuple[Pixels, Finite]] = []
        start = 0
        while start < len(batch.prompts):
            part = slice(start, min(start + most, len(batch.prompts)))
            given = conditioning[part], unconditional
            sampled = _try_to_sample(model, settings, batch, part, *given)
            if sampled is None:
                most = _half(part.stop - part.start, model, batch)
            else:
                pieces.append(sampled)
                start = part.stop
        pixels, finite = zip(*pieces, strict=True)
        yield batch, np.concatenate(pixels), np.concatenate(finite)


def _encoded(
    model: DiffusionModel, batches: Sequence[Batch], device: torch.device
) -> Iterator[Conditioning]:
    """The batches' conditionings, on the device. A prompt is encoded once, and by itself.

    What later batches need waits in main memory. Prompts are cut to what the encoder takes:
    `check_prompts` has refused those that may not be.
    """
    last_use = {prompt.text: i for i, batch in enumerate(batches) for prompt in batch.prompts}
    known: dict[str, Conditioning] = {}
    for i, batch in enumerate(batches):
        texts = [prompt.text for prompt in batch.prompts]
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            encoded = model.encode_prompts(new, truncate=True, apart=True).to("cpu")
            known |= dict(zip(new, encoded.split(), strict=True))
        yield Conditioning.cat([known[text] for text in texts]).to(device)
        known = {text: kept for text, kept in known.items() if last_use[text] > i}


@torch.no_grad()
def _try_to_sample(
    model: DiffusionModel,
    settings: SamplerSettings,
    batch: Batch,
    part: slice,
    conditioning: Conditioning,
    unconditional: Conditioning,
) -> tuple[Pixels, Finite] | None:
    """A part of the batch, or None if it does not fit; leaving the handler frees the tensors."""
    try:
        x_0 = sample_latents(
            model,
            conditioning,
            unconditional,
            [prompt.seed for prompt in batch.prompts[part]],
            steps=settings.steps,
            guidance=batch.guidance,
            kind=settings.kind,
            eta=settings.eta,
            size=batch.size,
        )  # (N, C, h, w)
        return to_pixels(model.decode_latents(x_0))
    except torch.OutOfMemoryError:
        return None


def _half(tried: int, model: DiffusionModel, batch: Batch) -> int:
    """How many images to try where `tried` did not fit. UserError if that was one."""
    if tried == 1:
        height, width = batch.size or 2 * (model.resolution,)
        raise UserError(
            f"the GPU's memory does not hold one image of model={model.name} at {height} x {width} "
            "pixels: free it of other work, take dtype=float16, or a smaller model"
        )
    half = (tried + 1) // 2
    torch.cuda.empty_cache()  # in one piece again
    logger.warning(
        f"{tried} images at once do not fit into the GPU's memory; going on with {half}. "
        f"model.sampler.batch_size={half} would have it so from the start"
    )
    return half


def to_pixels(images: Tensor) -> tuple[Pixels, Finite]:
    """Float (N, 3, H, W) to uint8 (N, H, W, 3), NaNs black; and which images are finite, (N,)."""
    finite = images.isfinite()  # (N, 3, H, W)
    images = torch.where(finite, images, torch.zeros_like(images))
    scaled = images.clamp(0, 1).mul(255).round().to(torch.uint8)  # (N, 3, H, W)
    pixels = scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return pixels, finite.flatten(1).all(dim=1).cpu().numpy()
