"""Trainings that survive being killed: how far one has got, on disk."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cad.errors import UserError
from cad.instrument import Cost
from cad.store import read_tensors, write_tensors

log = logging.getLogger(__name__)

FORMAT = "training/2"


@dataclass(frozen=True)
class Progress:
    """Everything that the rest of a training depends on, what it said so far, and what it took."""

    tensors: Mapping[str, Tensor]  # on the CPU, if read from disk
    scaler: dict[str, Any]  # of gradients: what is no tensor; JSON-able
    history: list[dict[str, float]]  # one record per step done
    cost: Cost


class Checkpoint:
    """The progress of one training: a file in a folder of its own. Writes atomically."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "progress.safetensors"

    def read(self) -> Progress | None:
        """The progress that was written last; None if there is none or, with a warning, damaged."""
        if not self.path.is_file():
            return None
        try:
            header, tensors = read_tensors(self.path, FORMAT)
            history = [dict(record) for record in header["history"]]
            progress = Progress(tensors, header["scaler"], history, Cost(**header["cost"]))
        except (UserError, LookupError, TypeError, ValueError) as error:
            log.warning("the checkpoint %s is damaged (%s): starting anew", self.path, error)
            return None
        log.info("training goes on after step %d, from %s", len(history), self.path)
        return progress

    def write(self, progress: Progress) -> None:
        """Replaces what was written before."""
        # Records as pairs: the header's keys are sorted, and theirs are to stay in their order.
        history = [list(record.items()) for record in progress.history]
        header = {"scaler": progress.scaler, "history": history, "cost": asdict(progress.cost)}
        write_tensors(self.path, progress.tensors, header, FORMAT)

    def remove(self) -> None:
        """Deletes the folder, with whatever a process that was killed while writing left there."""
        shutil.rmtree(self.folder, ignore_errors=True)
