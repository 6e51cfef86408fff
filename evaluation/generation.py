"""Fills image sets: prompts x seeds under a model as it is given, resumable, never twice.

A set's key is the hash of everything that determines its pixels (`describe_set`). The engine is no
part of it; how images are cut into batches is (`evaluation.sampler`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cad.errors import UserError
from cad.files import locked
from cad.identity import describe_runtime, digest
from cad.models.base import DiffusionModel
from cad.weight_edit import NO_EDIT
from evaluation.image_sets import ImageSet, ImageWriter, replace_if_other, verify
from evaluation.prompts import Prompt
from evaluation.sampler import Batch, Engine, SamplerSettings, plan_batches

KEY_LENGTH = 20  # hexadecimal digits of the SHA-256, in folder names

logger = logging.getLogger(__name__)


def generate(
    model: DiffusionModel,
    prompts: Sequence[Prompt],
    settings: SamplerSettings,
    root: Path,
    *,
    engine: Engine | None = None,
) -> ImageSet:
    """The image set of `prompts` under `model` as it is, in a folder of its own below `root`.

    With an edit inside its block: `with edit.applied(model): generate(model, ...)`. Files that are
    there are verified, missing and damaged ones made; with nothing to make, the model is not run.
    Another process at work on the same set is waited for.

    An edit may break the model: pixels that are not finite are saved as black and their images
    counted by `ImageSet.broken`. Raises UserError for prompts that `check_prompts` refuses, an
    unedited model whose images are not finite, and where GPU, engine or disk do not take them.
    """
    if not prompts:
        raise UserError("there are no prompts to generate images of")
    check_prompts(model, prompts)
    description = describe_set(model, prompts, settings)
    images = ImageSet(Path(root) / digest(description)[:KEY_LENGTH], tuple(prompts))
    with locked(images.folder / ".lock", f"another process is making {images.folder}"):
        text = json.dumps(description, sort_keys=True, ensure_ascii=False) + "\n"
        replace_if_other(images.folder / "set.json", text)
        writer = ImageWriter(images, verify(images))
        if len(writer.records) < len(images):
            _complete(model, writer, settings, engine or Engine())
    broken = images.broken()
    if broken:
        logger.warning(
            f"{images.folder}: {broken} of {len(images)} images have values that are not finite, "
            "saved as black: the edit broke the model"
        )
    return images


def check_prompts(model: DiffusionModel, prompts: Sequence[Prompt]) -> None:
    """Raise UserError for a prompt that the model cannot draw: too long for it, or of a wrong size.

    Prompts that may be cut (`Prompt.truncate`) are never too long.
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
    model: DiffusionModel, prompts: Sequence[Prompt], settings: SamplerSettings
) -> dict[str, Any]:
    """Everything that determines a set's pixels, libraries and kind of device too, as JSON data.

    A prompt is its text and seed, and what else it asks for if it does; several edits are one hash
    of theirs, the innermost last.
    """
    edits = [edit.fingerprint for edit in model.edits] or [NO_EDIT]
    asked = [[prompt.text, prompt.seed, prompt.own_settings()] for prompt in prompts]
    return {
        "version": settings.version,
        "model": model.provenance(),
        "edit": edits[0] if len(edits) == 1 else digest(edits),
        "sampler": settings.settings(),
        **describe_runtime(model.device),
        "prompts": [[part for part in prompt if part != {}] for prompt in asked],
    }


def _complete(
    model: DiffusionModel, writer: ImageWriter, settings: SamplerSettings, engine: Engine
) -> None:
    """Make the images that have no record yet."""
    images, present = writer.images, frozenset(writer.records)
    if present:
        logger.info("%s: %d of %d images are there", images.folder, len(present), len(images))
    planned = plan_batches(model, images.prompts, settings)
    batches = [batch for batch in planned if not present.issuperset(batch.indices)]
    name, todo = f"images {images.folder.name[:8]}", len(images) - len(present)
    with tqdm(total=todo, unit="image", desc=name, disable=None) as progress, writer:
        for batch, pixels, finite in engine.sampled(model, settings, batches):
            if not model.edits and not finite.all():
                raise UserError(_overflow(model, batch))
            missing = [place for place, i in enumerate(batch.indices) if i not in present]
            indices = [batch.indices[place] for place in missing]
            writer.put(indices, pixels[missing], finite[missing])
            progress.update(len(missing))


def _overflow(model: DiffusionModel, batch: Batch) -> str:
    dtype = str(model.dtype).removeprefix("torch.")
    return (
        f"images of the unedited model={model.name} are NaN or infinite: it overflows in "
        f"dtype={dtype} (use dtype=bfloat16 or float32), its weights are damaged, or the guidance "
        f"{batch.guidance:g} (model.sampler.guidance, or the prompt's own) is too large."
    )
