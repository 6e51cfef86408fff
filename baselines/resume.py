"""Trainings that survive being killed: their state on disk, and their cost over all sittings."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cad.digests import tensors_digest
from cad.files import atomic_path
from cad.instrument import Cost, Meter, measure

log = logging.getLogger(__name__)

FORMAT = "training/1"


@dataclass(frozen=True)
class State:
    """Everything that the rest of a training depends on, what it said so far, and what it took."""

    tensors: Mapping[str, Tensor]  # read from disk: on the CPU
    notes: Mapping[str, Any]  # JSON-able: what is no tensor
    history: list[dict[str, float]]  # one record per step done
    cost: Cost


class Checkpoint:
    """The state of one training: a file in a folder of its own. Writes atomically."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "state.safetensors"

    def read(self) -> State | None:
        """The state that was written last; None if there is none, or, with a warning, a damaged."""
        if not self.path.is_file():
            return None
        try:
            state = _read(self.path)
        except (SafetensorError, LookupError, TypeError, ValueError) as error:
            log.warning("the checkpoint %s is damaged (%s): starting anew", self.path, error)
            return None
        log.info("training goes on after step %d, from %s", len(state.history), self.path)
        return state

    def write(self, state: State) -> None:
        """Replaces what was written before."""
        tensors = {name: each.detach().cpu().contiguous() for name, each in state.tensors.items()}
        header = {
            "format": FORMAT,
            "sha256": tensors_digest(tensors.items()),
            "notes": dict(state.notes),
            "history": state.history,
            "cost": asdict(state.cost),
        }
        with atomic_path(self.path) as temporary:
            save_file(tensors, temporary, {"cad": json.dumps(header, sort_keys=True)})

    def remove(self) -> None:
        """Deletes the folder, with whatever a process that was killed while writing left there."""
        shutil.rmtree(self.folder, ignore_errors=True)


class Stopwatch:
    """`cad.instrument.measure` with pauses: `cost` is what the block took outside of them.

    Set `cost` to that of earlier sittings and it adds up. On a CPU, memory is the growth since the
    start or the last pause; the largest counts, so let no pause come before the first step.
    """

    def __init__(self, device: torch.device) -> None:
        self.cost = Cost()
        self._device = device
        self._block: AbstractContextManager[Meter]
        self._meter: Meter

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside the block does not count."""
        self._stop()
        try:
            yield
        finally:
            self._start()

    def _start(self) -> None:
        self._block = measure(self._device)
        self._meter = self._block.__enter__()

    def _stop(self) -> None:
        self._block.__exit__(None, None, None)
        self.cost += self._meter.cost


def _read(path: Path) -> State:
    with safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {}).get("cad", "{}"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if header["format"] != FORMAT:
        raise ValueError(f"its format is {header['format']!r}, not {FORMAT!r}")
    if header["sha256"] != tensors_digest(tensors.items()):
        raise ValueError("its content does not match its hash")
    return State(tensors, dict(header["notes"]), list(header["history"]), Cost(**header["cost"]))
