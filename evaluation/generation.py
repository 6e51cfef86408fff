"""Fills image sets: prompts x seeds under an edited model, resumable, never twice.

A set's key is the hash of everything that determines its pixels: the model as loaded, the edit,
each prompt's text and seed in order, the sampler's settings, the kind of device, and the versions
of this module and of the libraries that compute and encode.

Batches are a fixed partition of the set: images of one size and guidance, in their order, are cut
into pieces of `batch_size`, and a batch with anything missing is sampled whole. So an interrupted
and resumed set, or one made of shards, has the bytes of one that was made at once, on the same
machine and number of threads. Every image has its own random generator and every prompt is encoded
by itself; in another batch (another order, batch size or length of set) an image still differs in
the last bits of its floats, because matrix products of other shapes add in another order. Measured
on a CPU in float32, 20 images of 64 x 64 pixels from an untrained pipeline of 64 and 128 channels,
8 steps: batches of 7 instead of 20 moved 0.009 % of the values by one grey level and none by more,
another order within the same batch none; one thread instead of two (3 steps, 4 images) 0.024 % by
one level. Half precision and GPUs were not measured.

A batch that does not fit into the GPU's memory is sampled in halves, or halves of these, and so are
all later ones of that call. The set and its key stay what they are, but from there on images have
the bytes of smaller batches, in which they differ as above, and of which a later run may not need
the same: where bytes matter, set `batch_size` to what the warning says.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from cad.errors import UserError
from cad.models.base import Conditioning, DiffusionModel
from cad.runtime import describe_runtime
from cad.sampling import sample_latents
from cad.weight_edit import WeightEdit
from evaluation.files import write_atomically
from evaluation.image_sets import (
    WHOLE,
    ImageSet,
    Shard,
    join_shards,
    locked,
    verify,
    write_records,
)
from evaluation.image_writer import ImageWriter
from evaluation.prompt_encoding import PromptEncoder, report_cut
from evaluation.prompts import Prompt

VERSION = 2  # raise it when the images or records of equal settings change
SET_FILE = "set.json"
KEY_LENGTH = 20  # hexadecimal digits of the SHA-256, in folder names

Sampled = tuple[NDArray[np.uint8], NDArray[np.bool_]]
"""Images, (N, H, W, 3) RGB, and which of them have finite values only, (N,)."""

Watcher = Callable[[NDArray[np.uint8]], None]
"""Is shown images as they are made, uint8 (N, H, W, 3) RGB."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SamplerSettings:
    """How images are sampled: `steps` of the scheduler `kind`, classifier-free `guidance` scale.

    `kind` is one of `DiffusionModel.sampler`'s: "default" (the pipeline's own) or "ddim".
    `batch_size` is the partition of the set, and so part of its key.
    """

    steps: int
    guidance: float
    kind: str
    batch_size: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"model.sampler.steps={self.steps} must be at least 1")
        if self.batch_size < 1:
            raise UserError(f"model.sampler.batch_size={self.batch_size} must be at least 1")
        if not math.isfinite(self.guidance):
            raise UserError(f"model.sampler.guidance={self.guidance} must be a finite number")


@dataclass(frozen=True)
class Batch:
    """Images that are sampled together: their places in the set, common guidance and size."""

    indices: tuple[int, ...]
    guidance: float
    size: tuple[int, int] | None  # height, width in pixels; None: the model's own


def generate(
    model: DiffusionModel,
    edit: WeightEdit,
    prompts: Sequence[Prompt],
    settings: SamplerSettings,
    root: Path,
    shard: tuple[int, int] | None = None,
    watch: Watcher | None = None,
) -> ImageSet:
    """The image set of `prompts` under `model` with `edit`, in a folder of its own below `root`.

    What the folder already holds is verified, what is missing or damaged is made; with nothing to
    make, the model is not run. Another process at work on the same set is waited for. `shard`
    (i, n) makes every nth batch from batch i on, beside other processes with other i: the returned
    set has images missing (`ImageSet.missing`) until all of 0 to n - 1 were made, and then is, byte
    for byte, the set made at once. `watch` is shown each batch as it is made.

    Leaves the model as found. An edit may break the model: pixels that are not finite are saved as
    black and their images counted by `ImageSet.broken`. Raises UserError for no prompts, those that
    `check_prompts` refuses, a shard that does not exist, an edit of another model, an unedited
    model whose images are not finite, a GPU without memory for one image, or a disk that does not
    take the images.
    """
    if not prompts:
        raise UserError("there are no prompts to generate images of")
    part = WHOLE if shard is None else Shard(*shard)
    check_prompts(model, prompts)
    description = describe_set(model, edit, prompts, settings)
    images = ImageSet(Path(root) / set_key(description), tuple(prompts))
    images.folder.mkdir(parents=True, exist_ok=True)
    batches = part.take(plan_batches(model, prompts, settings))
    with locked(images, part):
        _write_description(images, description)
        _complete(model, edit, images, settings, batches, part, watch)
        _warn_of_broken(images)
    if not part.is_whole:
        join_shards(images)
    return images


def check_prompts(model: DiffusionModel, prompts: Sequence[Prompt]) -> None:
    """Raise UserError for a prompt that the model cannot draw: too long for it, or of a wrong size.

    Runs no network. Prompts that may be cut (`Prompt.truncate`) are never too long.
    """
    model.check_prompts(list(dict.fromkeys(p.text for p in prompts if not p.truncate)))
    for size in sorted({prompt.size for prompt in prompts if prompt.size is not None}):
        try:
            model.latent_shape_at(size)
        except UserError as error:
            raise UserError(
                f"{error} The prompts ask for them; prompts.rules.size=null has all at the model's "
                "own size."
            ) from error


def describe_set(
    model: DiffusionModel,
    edit: WeightEdit,
    prompts: Sequence[Prompt],
    settings: SamplerSettings,
) -> dict[str, Any]:
    """Everything that determines a set's pixels, as JSON-able values."""
    return {
        "version": VERSION,
        "model": model.provenance(),
        "edit": edit.fingerprint,
        "sampler": asdict(settings) | {"guidance": float(settings.guidance)},  # 4 is 4.0
        **describe_runtime(model.device),
        "prompts": [_describe_prompt(prompt) for prompt in prompts],
    }


def set_key(description: dict[str, Any]) -> str:
    """The name of a set's folder: the first digits of the SHA-256 of its description."""
    return hashlib.sha256(_canonical(description)).hexdigest()[:KEY_LENGTH]


def _canonical(description: dict[str, Any]) -> bytes:
    return json.dumps(description, sort_keys=True, ensure_ascii=False).encode("utf-8")


def _write_description(images: ImageSet, description: dict[str, Any]) -> None:
    path = images.folder / SET_FILE
    data = _canonical(description) + b"\n"
    if not path.exists() or path.read_bytes() != data:
        write_atomically(path, data)


def _describe_prompt(prompt: Prompt) -> list[Any]:
    """Text, seed, and what else the image asks for if it does: sets that do not keep their keys."""
    own = prompt.own_settings()
    return [prompt.text, prompt.seed, own] if own else [prompt.text, prompt.seed]


def plan_batches(
    model: DiffusionModel, prompts: Sequence[Prompt], settings: SamplerSettings
) -> list[Batch]:
    """The set's fixed partition: images of one size and guidance, in pieces of `batch_size`.

    In the order of the batches' first images.
    """
    alike: dict[tuple[tuple[int, int] | None, float], list[int]] = {}
    own = (model.resolution, model.resolution)
    for index, prompt in enumerate(prompts):
        size = None if prompt.size == own else prompt.size
        guidance = settings.guidance if prompt.guidance is None else prompt.guidance
        alike.setdefault((size, guidance), []).append(index)
    batches = [
        Batch(tuple(indices[place] for place in piece), guidance, size)
        for (size, guidance), indices in alike.items()
        for piece in partition(len(indices), settings.batch_size)
    ]
    return sorted(batches, key=lambda batch: batch.indices[0])


def partition(count: int, size: int) -> list[range]:
    """range(count) in consecutive pieces of `size`, the last one shorter if need be."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _complete(
    model: DiffusionModel,
    edit: WeightEdit,
    images: ImageSet,
    settings: SamplerSettings,
    batches: Sequence[Batch],
    shard: Shard,
    watch: Watcher | None,
) -> None:
    """Verify what there is of `batches`, the shard's, and make what there is not."""
    wanted = [index for batch in batches for index in batch.indices]
    present = verify(images, wanted, shard)
    if len(present) == len(wanted):
        return
    if present:
        logger.info(
            "%s: %d of %d images are there, going on", images.folder, len(present), len(wanted)
        )
    lacking = [batch for batch in batches if not present.keys() >= set(batch.indices)]
    name = f"images {images.folder.name[:8]}"
    quiet = None if parent_process() is None else True  # one bar, where processes share the work
    progress = tqdm(total=len(wanted), initial=len(present), unit="image", desc=name, disable=quiet)
    with progress, edit.applied(model), ImageWriter(images, shard) as writer:
        for batch, (pixels, finite) in _sampled(model, images.prompts, settings, lacking):
            if not edit.num_weights and not finite.all():
                raise UserError(_not_finite(model, int((~finite).sum()), batch.guidance))
            missing = {i: place for place, i in enumerate(batch.indices) if i not in present}
            writer.put(
                {i: pixels[place] for i, place in missing.items()},
                broken={i for i, place in missing.items() if not finite[place]},
            )
            if watch is not None:
                watch(pixels[list(missing.values())])
            progress.update(len(missing))
    write_records(images, present | writer.written, shard)


def _sampled(
    model: DiffusionModel,
    prompts: Sequence[Prompt],
    settings: SamplerSettings,
    batches: Sequence[Batch],
) -> Iterator[tuple[Batch, Sampled]]:
    """Each batch with its images; every distinct prompt is encoded once."""
    texts = [[prompts[i].text for i in batch.indices] for batch in batches]
    report_cut(model, list(dict.fromkeys(text for batch in texts for text in batch)))
    encoder = PromptEncoder(model, texts)
    sample = _BatchSampler(model, encoder.unconditional, settings)
    for batch, conditioning in zip(batches, encoder, strict=True):
        seeds = [prompts[i].seed for i in batch.indices]
        yield batch, sample(conditioning, seeds, batch.guidance, batch.size)


def _not_finite(model: DiffusionModel, count: int, guidance: float) -> str:
    dtype = str(model.dtype).removeprefix("torch.")
    return (
        f"{count} images of the unedited model={model.name} in one batch are NaN or infinite: it "
        f"overflows in dtype={dtype} (use dtype=bfloat16 or float32), its weights are damaged, or "
        f"the guidance {guidance:g} (model.sampler.guidance, or the prompt's own) is too large."
    )


def _warn_of_broken(images: ImageSet) -> None:
    broken = images.broken()
    if broken:
        logger.warning(
            "%s: %d of %d images have values that are not finite, saved as black: the edit broke "
            "the model",
            images.folder,
            broken,
            len(images),
        )


class _BatchSampler:
    """Samples batches, in pieces once one did not fit into the GPU's memory.

    From then on all batches are sampled in pieces of half that size; see the module's head for
    what this does to the images.
    """

    def __init__(
        self, model: DiffusionModel, unconditional: Conditioning, settings: SamplerSettings
    ) -> None:
        self._model = model
        self._unconditional = unconditional
        self._settings = settings
        self._most = settings.batch_size  # images at once

    def __call__(
        self,
        conditioning: Conditioning,
        seeds: Sequence[int],
        guidance: float,
        size: tuple[int, int] | None,
    ) -> Sampled:
        """One batch of images, uint8 (N, H, W, 3) RGB, and which of them are finite, (N,)."""
        pieces: list[Sampled] = []
        start = 0
        while start < len(seeds):
            stop = min(start + self._most, len(seeds))
            piece = self._attempt(conditioning[start:stop], seeds[start:stop], guidance, size)
            if piece is None:
                self._halve(stop - start, size)
            else:
                pieces.append(piece)
                start = stop
        pixels, finite = zip(*pieces, strict=True)
        return np.concatenate(pixels), np.concatenate(finite)

    def _attempt(
        self,
        conditioning: Conditioning,
        seeds: Sequence[int],
        guidance: float,
        size: tuple[int, int] | None,
    ) -> Sampled | None:
        """The images, or None if they do not fit; leaving the handler lets the tensors go."""
        try:
            return self._sample(conditioning, seeds, guidance, size)
        except torch.OutOfMemoryError:
            return None

    def _halve(self, tried: int, size: tuple[int, int] | None) -> None:
        if tried == 1:
            height, width = size or 2 * (self._model.resolution,)
            raise UserError(
                f"the GPU's memory does not hold one image of model={self._model.name} at {height} "
                f"x {width} pixels: free it of other work, take dtype=float16, or a "
                "smaller model"
            )
        self._most = (tried + 1) // 2
        torch.cuda.empty_cache()  # in one piece again
        logger.warning(
            "%d images at once do not fit into the GPU's memory; going on with %d. "
            "model.sampler.batch_size=%d would have it so from the start",
            tried,
            self._most,
            self._most,
        )

    @torch.no_grad()
    def _sample(
        self,
        conditioning: Conditioning,
        seeds: Sequence[int],
        guidance: float,
        size: tuple[int, int] | None,
    ) -> Sampled:
        x_0 = sample_latents(
            self._model,
            conditioning,
            self._unconditional,
            seeds,
            steps=self._settings.steps,
            guidance=guidance,
            kind=self._settings.kind,
            size=size,
        )  # (N, C, h, w)
        return _to_pixels(self._model.decode_latents(x_0))


def _to_pixels(images: Tensor) -> Sampled:
    """Float (N, 3, H, W) in [0, 1] to uint8 (N, H, W, 3), and which images are finite, (N,).

    What is not finite becomes black.
    """
    finite = images.isfinite()  # (N, 3, H, W)
    images = torch.where(finite, images, torch.zeros_like(images))
    scaled = images.clamp(0, 1).mul(255).round().to(torch.uint8)  # (N, 3, H, W)
    pixels = scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return pixels, finite.flatten(1).all(dim=1).cpu().numpy()
