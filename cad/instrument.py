"""What an edit costs: wall time and peak memory of a block (Table 10)."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

MB = 1e6  # bytes
_SAMPLING_INTERVAL = 0.02  # seconds between two looks at the process's memory


@dataclass(frozen=True)
class Cost:
    """Wall time and peak memory of some work; machine-dependent, never part of a key.

    `memory_kind` says what `peak_memory_mb` is: on a GPU the most memory allocated by PyTorch,
    model included (what the paper reports); on a CPU the growth of the process's resident memory;
    "" if nothing was measured. `cached`: the numbers are those of the run that did the work, not
    of this one.
    """

    seconds: float = 0.0
    peak_memory_mb: float = 0.0
    cached: bool = False
    memory_kind: str = ""  # "cuda allocated" | "resident growth" | ""

    def __add__(self, other: Cost) -> Cost:
        """The cost of one after the other: times add up, the larger peak stays, with its kind."""
        larger, smaller = sorted((self, other), key=lambda cost: -cost.peak_memory_mb)
        return Cost(
            self.seconds + other.seconds,
            larger.peak_memory_mb,
            self.cached or other.cached,
            larger.memory_kind or smaller.memory_kind,
        )


class Meter:
    """Holds the `cost` of a measured block, once the block has ended."""

    cost: Cost


@contextmanager
def measure(device: torch.device) -> Iterator[Meter]:
    """Measures the block: `with measure(device) as meter: ...`, then `meter.cost`.

    Waits for the GPU at both ends and resets PyTorch's peak statistics; so around another measured
    block, the peak counts from the inner block's start.
    """
    meter = Meter()
    memory = _CudaPeak(device) if device.type == "cuda" else _ResidentPeak()
    start = time.perf_counter()
    try:
        yield meter
    finally:
        peak = memory.stop()
        seconds = time.perf_counter() - start
        meter.cost = Cost(seconds, peak / MB, memory_kind=memory.kind)


class _CudaPeak:
    kind = "cuda allocated"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)

    def stop(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device)


class _ResidentPeak:
    """Watches the resident memory from a thread: the system's own peak cannot be reset portably."""

    kind = "resident growth"

    def __init__(self) -> None:
        gc.collect()  # garbage of earlier work, freed meanwhile, would hide as much of the growth
        self._process = psutil.Process()
        self._start = self._peak = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLING_INTERVAL):
            self._look()

    def _look(self) -> None:
        self._peak = max(self._peak, self._process.memory_info().rss)

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        self._look()
        return int(self._peak - self._start)
