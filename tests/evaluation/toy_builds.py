"""How another process makes the toy model."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

from torch import Tensor
from toy_model import ToyModel


@dataclass(frozen=True)
class Dying:
    """Kills its process when the model has made `batches` batches of images."""

    batches: int

    def __call__(self, device: str) -> ToyModel:
        model = ToyModel()
        decode, made = model.decode_latents, list[Tensor]()

        def decode_latents(x_0: Tensor) -> Tensor:
            if len(made) == self.batches:
                os.kill(os.getpid(), signal.SIGKILL)
            made.append(x_0)
            return decode(x_0)

        model.decode_latents = decode_latents  # type: ignore[method-assign]
        return model


def another_model(device: str) -> ToyModel:
    """As on a machine with other weights."""
    return ToyModel(seed=1)
