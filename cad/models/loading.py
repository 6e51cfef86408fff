"""Diffusers pipelines from files: safetensors and local files only."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import diffusers
import torch
import transformers
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError
from torch import nn

from cad.errors import UserError
from cad.models.hub import UNUSED, Located


def load_pipeline(
    pipeline_class: Any,
    located: Located,
    variant: str | None,
    dtype: torch.dtype,
    without: Collection[str] = (),
) -> Any:
    """A pipeline of diffusers' `pipeline_class` on the CPU, its weights as `dtype`.

    `located.path` is a folder, whose weight files are those of `variant`, or a checkpoint in one
    file. The parts `without` are None, and so are safety checker and image encoder. Raises
    UserError for files that do not load, and for a checkpoint that lacks a part: those of SD-3.5
    hold no text encoders. Switches off the loading bars of diffusers and transformers.
    """
    # Typed Any, as a pipeline's parts are registered at run time.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    parts = {"dtype": dtype, "local_files_only": True} | _left_out(pipeline_class, without)
    try:
        if located.config is None:
            pipeline = pipeline_class.from_pretrained(
                str(located.path), variant=variant, use_safetensors=True, **parts
            )
        else:
            pipeline = pipeline_class.from_single_file(
                str(located.path), config=str(located.config), **parts
            )
    except SingleFileComponentError as error:
        raise UserError(_incomplete(located, str(error).splitlines()[0])) from error
    except NotImplementedError as error:  # diffusers moves weights that have no value
        raise UserError(_incomplete(located, "some of its weights are missing")) from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"the pipeline in {located.path} does not load: {type(error).__name__}: {error}"
        ) from error
    _check_weights(pipeline, located)
    return pipeline


def _left_out(pipeline_class: Any, without: Collection[str]) -> dict[str, Any]:
    """The arguments that keep parts from being loaded, as far as the pipeline has them."""
    accepted = inspect.signature(pipeline_class.__init__).parameters
    settings: dict[str, Any] = {name: None for name in (*UNUSED, *without) if name in accepted}
    if "requires_safety_checker" in accepted:
        settings["requires_safety_checker"] = False
    return settings


def _check_weights(pipeline: Any, located: Located) -> None:
    # A weight of a text encoder that a checkpoint lacks is no error: it stays without a value.
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            empty = [key for key, weight in part.named_parameters() if weight.is_meta]
            if empty:
                found = f"{name} has no value for {len(empty)} of its weights ({empty[0]}, ...)"
                raise UserError(_incomplete(located, found))


def _incomplete(located: Located, found: str) -> str:
    return (
        f"model.source.path={located.path} does not hold a whole pipeline: {found}. Give a file "
        "that does, with text encoders and image autoencoder, or a folder in diffusers' layout; "
        "model.source.path=null takes the repository's own files."
    )
