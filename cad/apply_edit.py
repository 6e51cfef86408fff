"""Applies an edit to a diffusers pipeline: apply_edit(pipeline.unet, "edit.safetensors").

A denoiser of the weights that the edit was made for; `transformer` instead of `unet` in SD 3.
"""

import json

import torch
from safetensors import safe_open


@torch.no_grad()
def apply_edit(denoiser: torch.nn.Module, path: str) -> None:
    """Changes the denoiser's weights in place."""
    weights = dict(denoiser.named_parameters())
    with safe_open(path, framework="pt") as file:
        for name, (kind, factor) in json.loads(file.metadata()["cad"])["changes"].items():
            stored = file.get_tensor(name)
            if kind == "replace":  # new values
                weights[name].copy_(stored)
            else:  # "zero", "scale": flat indices of what is multiplied by 0 or the factor
                index = torch.unravel_index(
                    stored.long().to(weights[name].device), weights[name].shape
                )
                weights[name][index] *= factor or 0.0
