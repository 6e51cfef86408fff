"""Less memory for the same gradients: activations are computed again in the backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cad.errors import UserError
from cad.models.base import DiffusionModel


def check_gradient_checkpointing(model: DiffusionModel, wanted: bool, key: str) -> None:
    """UserError if it is wanted and the denoiser cannot do it; `key` is its configuration key."""
    if wanted and not getattr(model.denoiser, "_supports_gradient_checkpointing", False):
        raise UserError(
            f"{key}=true is not allowed for model={model.name}: "
            f"{type(model.denoiser).__name__} does not support it."
        )


@contextmanager
def checkpointed_gradients(denoiser: Any, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing inside the block, if it is wanted; afterwards as it was."""
    if not wanted or denoiser.is_gradient_checkpointing:
        yield
        return
    denoiser.enable_gradient_checkpointing()
    try:
        yield
    finally:
        denoiser.disable_gradient_checkpointing()
