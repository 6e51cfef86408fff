"""SHA-256 of tensors, weights and settings: the identities that keys are made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Over names, shapes, dtypes and bytes, in the order of the names; device does not matter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def parameter_digest(module: nn.Module) -> str:
    """Over all parameters of a module: the identity of its weights, as loaded."""
    return tensors_digest(module.named_parameters())


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Over JSON-able settings, in the order of their keys. TypeError for anything else."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
