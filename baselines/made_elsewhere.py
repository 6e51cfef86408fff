"""Weights that were edited elsewhere, measured like every other method.

An edit of this suite, a fine-tuned denoiser (diffusers' folder or file), or a LoRA: whatever
differs from the unedited model becomes the edit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cad.concepts import Concept
from cad.edits import Edit
from cad.errors import UserError
from cad.files import content_digest
from cad.instrument import measure
from cad.models.base import DiffusionModel
from cad.models.pipeline import PipelineModel
from cad.store import METADATA
from cad.weight_edit import Change, Replace, WeightEdit

DENOISERS = ("unet", "transformer")  # a pipeline's folder of it
LORA_MARK = "lora"  # in every name of a LoRA's weights


@dataclass(eq=False)
class MadeElsewhere(Edit):
    """The difference of the weights at `path` from the model's, for whatever concept they claim.

    `path` is an edit's file, a pipeline's folder, a denoiser's, a .safetensors file with a
    denoiser's weights under diffusers' names, or a LoRA's (needs the package peft).
    """

    name = "file"

    path: str
    lora_scale: float = 1.0

    def settings(self, concepts: Sequence[Concept]) -> dict[str, Any]:
        found = {"content": [content_digest(each) for each in self._files()]}
        return found | ({} if self.lora_scale == 1.0 else {"lora_scale": self.lora_scale})

    def make(self, model: DiffusionModel, concepts: Sequence[Concept]) -> WeightEdit:
        with measure(model.device) as meter:
            changes = self._changes(model)
        if not changes:
            raise UserError(f"edit.path={self.path} has the model's own weights: nothing changes.")
        return WeightEdit(changes, cost=meter.cost)

    def _changes(self, model: DiffusionModel) -> dict[str, Change]:
        files = self._files()
        with _opened(files[0]) as file:
            if METADATA in (file.metadata() or {}):
                edit = WeightEdit.load(files[0])
                with edit.applied(model):  # refuses an edit of another model
                    return dict(edit.changes)
            if any(LORA_MARK in name for name in file.keys()):  # noqa: SIM118 (not a dict)
                return _differences(model, self._with_lora(model, files[0]))
        return _differences(model, _tensors(files))

    def _files(self) -> list[Path]:
        """The .safetensors at `path`, in order. UserError where there are none."""
        path = Path(self.path).expanduser()
        if path.suffix == ".safetensors" and path.is_file():
            return [path]
        folders = [path / each for each in DENOISERS if (path / each).is_dir()] or [path]
        files = sorted(folders[0].glob("*.safetensors"))
        if not files:
            raise UserError(
                f"edit.path={self.path} is no .safetensors file and no folder with any: give an "
                "edit, a denoiser's weights, a LoRA, or a folder in diffusers' layout."
            )
        plain = [
            each for each in files if ".fp16." not in each.name and ".non_ema" not in each.name
        ]
        return plain or files

    def _with_lora(self, model: DiffusionModel, file: Path) -> Iterator[tuple[str, Tensor]]:
        """The denoiser's weights with the LoRA fused into them; its text encoders' are left out."""
        assert isinstance(model, PipelineModel)
        loader: Any = model.pipeline_class
        denoiser: Any = copy.deepcopy(model.denoiser)
        part: dict[str, Any] = {model.denoiser_name: denoiser}
        try:
            found = loader.lora_state_dict(str(file))
            if model.denoiser_name == "unet":
                loader.load_lora_into_unet(*found, **part)
            else:
                loader.load_lora_into_transformer(found, **part)
            denoiser.fuse_lora(lora_scale=self.lora_scale)
            denoiser.unload_lora()
        except (ImportError, ValueError, RuntimeError) as error:
            raise UserError(
                f"edit.path={self.path} is a LoRA that cannot be loaded: {error} (the package peft "
                "is needed: pip install peft)"
            ) from error
        yield from denoiser.named_parameters()


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"edit.path={path} cannot be read: {error}") from error


def _tensors(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    for path in files:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                yield name, file.get_tensor(name)


@torch.no_grad()
def _differences(model: DiffusionModel, found: Iterator[tuple[str, Tensor]]) -> dict[str, Change]:
    """Every weight that is another one than the model's. UserError for one that it lacks."""
    weights = dict(model.denoiser.named_parameters())
    changes: dict[str, Change] = {}
    for name, tensor in found:
        if name not in weights or weights[name].shape != tensor.shape:
            raise UserError(
                f"edit.path: {name!r}, {tuple(tensor.shape)}, is no weight of model={model.name}; "
                "the names are diffusers' names of the denoiser's parameters."
            )
        values = tensor.to(weights[name].device, model.dtype)
        if not torch.equal(values, weights[name]):
            changes[name] = Replace(values)
    return changes
