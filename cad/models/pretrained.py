"""A model that is not loaded yet, and its loading: from safetensors, local ones only, or random."""

from __future__ import annotations

import inspect
import logging
import pkgutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError
from torch import nn

from cad.checks import check, folder_name, one_of, only
from cad.errors import UserError
from cad.identity import Identified, answer, immaterial
from cad.models.base import (
    DTYPES,
    PUBLISHED,
    WEIGHTS,
    DiffusionModel,
    Origin,
    resolve_device,
    resolve_dtype,
)
from cad.models.hub import UNUSED, Located, Source
from cad.models.pipeline import PipelineModel
from cad.models.random_weights import random_pipeline

_pixels = only(
    lambda x: type(x) is int and 0 < x <= 8192 and x % 8 == 0,
    "pixels, a multiple of 8, at most 8192",
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pretrained(Identified):
    """All that determines a model, small enough to send to any process.

    Two that are equal load the same model. Raises UserError for unknown weights, and for random
    ones of no architecture.
    """

    family: str  # dotted name of the class: cad.models.stable_diffusion.StableDiffusionModel
    name: str
    source: Source  # of published weights
    resolution: int  # pixels per side
    device: str = immaterial()  # auto | cpu | cuda | cuda:0 | ...
    dtype: str = "auto"  # auto | float32 | float16 | bfloat16
    weights: str = PUBLISHED  # or, of an architecture, random | random-small, at small widths
    architecture: str | None = None  # of random weights
    # Text encoders and image autoencoder wait in main memory and are on the device only while they
    # work; the numbers are the same.
    offload: bool = immaterial(False)
    t5: bool = True  # false neither loads nor fetches the T5 of a family that has one

    def __post_init__(self) -> None:
        one_of(WEIGHTS)("model.weights", self.weights)
        names = one_of(("auto", *DTYPES))
        check(self, "model.adapter", name=folder_name, dtype=names, resolution=_pixels)
        if self.weights != PUBLISHED and self.architecture is None:
            raise UserError(
                f"model.weights={self.weights} needs model.architecture, a published one: sd14."
            )

    def settings(self) -> dict[str, Any]:
        """Every field that counts: of random weights the architecture, of others the source.

        Loads nothing. Raises UserError for a local source that is not there.
        """
        dtype = self.dtype
        if dtype == "auto":
            dtype = str(resolve_dtype(dtype, resolve_device(self.device))).removeprefix("torch.")
        return {
            "family": self.family,
            "name": self.name,
            "resolution": self.resolution,
            "dtype": dtype,
            "weights": self.weights,
            "from": answer(self.source) if self.weights == PUBLISHED else self.architecture,
            "t5": self.t5,
        }

    def load(self, device: str | None = None) -> PipelineModel:
        """The model, on another device than its own if one is named.

        Raises UserError as `pipeline` and the family do, and for an unknown device or dtype.
        """
        place = resolve_device(device or self.device)
        home = torch.device("cpu") if self.offload else place
        pipeline, located = self.pipeline(home, resolve_dtype(self.dtype, place))
        model = self.family_class()(self.name, pipeline, self.resolution, located)
        model.denoiser.to(place)
        return model

    def pipeline(self, device: torch.device, dtype: torch.dtype) -> tuple[Any, Located]:
        """The pipeline as diffusers has it, on one device, and where its weights came from.

        Silences both libraries. Raises UserError as `Source.locate`, `load_pipeline` and
        `random_pipeline`, for a family that does not exist, and for t5=false of one without.
        """
        family = self.family_class()
        if not (self.t5 or family.t5_parts):
            raise UserError(f"t5=false: model={self.name} reads prompts without a T5.")
        without = () if self.t5 else family.t5_parts
        published = self.weights == PUBLISHED
        located = self.source.locate(without) if published else None  # with a download's bars
        for library in (diffusers, transformers):
            library.utils.logging.set_verbosity_error()
            library.utils.logging.disable_progress_bar()
        if located is not None:
            variant = self.source.variant
            pipeline = load_pipeline(family.pipeline_class, located, variant, dtype, without)
            return pipeline.to(device), located
        log.warning("model=%s has random weights: its images and metrics mean nothing", self.name)
        architecture, small = str(self.architecture), self.weights == "random-small"
        pipeline = random_pipeline(
            family.pipeline_class, architecture, dtype, without=without, small=small, device=device
        )
        return pipeline, Located(Path(), None, Origin(architecture, self.weights))

    def family_class(self) -> type[PipelineModel]:
        """The adapter's class. UserError where `family` names none."""
        try:
            family: type[PipelineModel] = pkgutil.resolve_name(self.family)
            if not issubclass(family, DiffusionModel):
                raise ValueError("it is no family of models")
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            raise UserError(f"model.adapter.family={self.family} is no class: {error}") from error
        return family


def load_pipeline(
    pipeline_class: Any,
    located: Located,
    variant: str | None,
    dtype: torch.dtype,
    without: Collection[str] = (),
) -> Any:
    """A pipeline of diffusers' `pipeline_class` on the CPU, its weights as `dtype`.

    The parts `without` are None, and so are safety checker and image encoder. Raises UserError for
    files that do not load, for weights that did not become `dtype`, and for a checkpoint in one
    file that lacks a part: those of SD-3.5 hold no text encoders.
    """
    accepted = inspect.signature(pipeline_class.__init__).parameters
    options = {"dtype": dtype, "local_files_only": True}
    options |= {name: None for name in (*UNUSED, *without) if name in accepted}
    if "requires_safety_checker" in accepted:
        options["requires_safety_checker"] = False
    path = str(located.path)
    try:
        if located.config is None:
            options |= {"variant": variant, "use_safetensors": True}
            pipeline = pipeline_class.from_pretrained(path, **options)
        else:
            config = str(located.config)
            pipeline = pipeline_class.from_single_file(path, config=config, **options)
    except (SingleFileComponentError, NotImplementedError) as error:  # of weights without a value
        raise _incomplete(located, str(error).splitlines()[0]) from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"the pipeline in {path} does not load: {type(error).__name__}: {error}"
        ) from error
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            _check_weights(name, part, located, dtype)
    return pipeline


def _check_weights(name: str, part: nn.Module, located: Located, dtype: torch.dtype) -> None:
    # A weight of a text encoder that a checkpoint lacks is no error: it stays without a value.
    empty = [key for key, weight in part.named_parameters() if weight.is_meta]
    if empty:
        found = f"{name} has no value for {len(empty)} of its weights ({empty[0]}, ...)"
        raise _incomplete(located, found)
    # diffusers before 0.40 gives float32, whatever it is asked for, and says nothing.
    kept = set(getattr(part, "_keep_in_fp32_modules", None) or ())  # T5's overflow in float16
    dtypes = {w.dtype for key, w in part.named_parameters() if kept.isdisjoint(key.split("."))}
    if dtypes != {dtype}:
        names = ", ".join(sorted(str(each).removeprefix("torch.") for each in dtypes))
        raise UserError(
            f"dtype={str(dtype).removeprefix('torch.')} was asked for, and {name} was loaded as "
            f"{names}: install diffusers>=0.40, or set dtype={names}."
        )


def _incomplete(located: Located, found: str) -> UserError:
    return UserError(
        f"model.source.path={located.path} does not hold a whole pipeline: {found}. Give a file "
        "that does, with text encoders and image autoencoder, or a folder in diffusers' layout; "
        "model.source.path=null takes the repository's own files."
    )
