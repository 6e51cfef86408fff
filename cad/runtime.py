"""What computes: the kind of device and the libraries. Part of every key of computed things."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch

LIBRARIES = ("torch", "diffusers", "transformers", "pillow")  # all that numbers or pixels pass


def describe_runtime(device: torch.device) -> dict[str, Any]:
    """The device's kind and the libraries' versions; JSON-able. Other ones round differently."""
    return {"device": device.type, "versions": {name: version(name) for name in LIBRARIES}}
