"""Concept attribution in diffusion models: scores of weights, and edits made of them.

The front door (`cad.front_door`) is for a diffusers pipeline that is at hand:

    edit = cad.erase(pipeline, "church")
    with edit.applied(pipeline):
        image = pipeline("a photo of a church").images[0]

Nothing here knows of metrics, result folders, Hydra or W&B. Paper: component attribution for
diffusion models (Eq. 3 scores, Eq. 4 erase objective, Eq. 5 amplify objective).
"""

from importlib import import_module
from typing import Any

__all__ = ["Concept", "WeightEdit", "amplify", "attribute", "erase", "load"]


def __getattr__(name: str) -> Any:
    """What `cad.front_door` has of that name; PyTorch is imported when it is asked for."""
    if name in __all__:
        return getattr(import_module("cad.front_door"), name)
    raise AttributeError(f"module 'cad' has no attribute {name!r}")
