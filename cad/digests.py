"""SHA-256 of tensors and weights: the identities that keys are made of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Over names, shapes, dtypes and bytes, in the order of the names; device does not matter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def parameter_digest(module: nn.Module) -> str:
    """Over all parameters of a module: the identity of its weights, as loaded."""
    return tensors_digest(module.named_parameters())
