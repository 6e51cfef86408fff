"""The cost of an edit: wall time and peak memory of a block (Table 10)."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import psutil
import torch

MB = 1e6  # bytes
_SAMPLING_INTERVAL = 0.02  # seconds between two looks at the process's memory


@dataclass(frozen=True)
class Cost:
    """Wall time and peak memory of some work; machine-dependent, never part of a key.

    `memory_kind` says what `peak_memory_mb` is: on a GPU the most memory allocated by PyTorch,
    model included (what the paper reports); on a CPU the growth of the process's resident memory;
    "" if nothing was measured. `cached`: another run did the work, and these are its numbers.
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
    """Measures a block: `with measure(device) as meter: ...`, then `meter.cost`.

    Waits for the GPU at both ends and resets PyTorch's peak statistics; so around another measured
    block, the peak counts from the inner block's start. Pauses inside do not count. Add the cost of
    earlier sittings to `cost` inside the block, and it adds up. On a CPU, memory is the growth
    since the start or the last pause, and the largest counts: no pause before the first step.
    """

    def __init__(self, device: torch.device) -> None:
        self.cost = Cost()
        self._device = device
        self._cuda = device.type == "cuda"
        self._process = psutil.Process()

    def __enter__(self) -> Self:
        if self._cuda:
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            gc.collect()  # garbage of earlier work, freed meanwhile, would hide as much growth
            self._before = self._peak = self._process.memory_info().rss
            self._done = threading.Event()
            # The system's own peak of resident memory cannot be reset portably.
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._device)
            kind, peak = "cuda allocated", torch.cuda.max_memory_allocated(self._device)
        else:
            self._done.set()
            self._watcher.join()
            kind, peak = "resident growth", self._peak - self._before
        seconds = time.perf_counter() - self._start
        self.cost += Cost(seconds, peak / MB, memory_kind=kind)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block inside that does not count."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def _watch(self) -> None:
        done = False
        while not done:
            done = self._done.wait(_SAMPLING_INTERVAL)  # after which a last look is taken
            self._peak = max(self._peak, self._process.memory_info().rss)


measure = Meter
