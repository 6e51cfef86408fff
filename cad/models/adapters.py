"""From a diffusers pipeline that somebody has loaded to the model that `cad` works with."""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import Any

from cad.errors import UserError
from cad.models.base import DiffusionModel

FAMILIES = {  # diffusers' class and the adapter over its modules
    "StableDiffusionPipeline": "cad.models.stable_diffusion.StableDiffusionModel",
    "StableDiffusionXLPipeline": "cad.models.stable_diffusion_xl.StableDiffusionXLModel",
    "StableDiffusion3Pipeline": "cad.models.stable_diffusion_3.StableDiffusion3Model",
}
_IN_USE = "_cad_adapter"  # the pipeline's attribute that has its last adapter


def adapt(pipeline: Any) -> DiffusionModel:
    """An adapter over a pipeline of one of FAMILIES, which goes on working with its modules.

    Inside `WeightEdit.applied` it is the one that the edit was applied to; elsewhere a new one,
    which hashes the weights as they are then. Puts the modules into eval mode and switches their
    gradients off. Raises UserError for a pipeline of another class, and what the family raises.
    """
    name = next((each.__name__ for each in type(pipeline).mro() if each.__name__ in FAMILIES), "")
    if not name:
        raise UserError(
            f"{type(pipeline).__name__} is no pipeline that concepts can be attributed in; "
            f"there are adapters for diffusers' {', '.join(FAMILIES)}."
        )
    adapter = vars(pipeline).get(_IN_USE)
    if not (isinstance(adapter, DiffusionModel) and adapter.edits):
        family = pkgutil.resolve_name(FAMILIES[name])
        called = Path(pipeline.config.get("_name_or_path") or name).name
        adapter = family(called, pipeline, family.default_resolution(pipeline))
        vars(pipeline)[_IN_USE] = adapter
    assert isinstance(adapter, DiffusionModel)
    return adapter
