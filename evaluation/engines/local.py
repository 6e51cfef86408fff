"""This machine: images are made by this process, and on several GPUs by one more for each other."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.context import SpawnProcess

import torch

from cad.errors import UserError
from cad.models.base import DiffusionModel
from evaluation.engines.base import BuildModel, Engine, Order, Piece, finish
from evaluation.image_sets import ImageSet

Share = list[tuple[Order, Piece]]
"""What one process makes."""

logger = logging.getLogger(__name__)


class LocalEngine(Engine):
    """Shares sets between `processes` processes, this one counted, that have a model each.

    `device` is this process's: "cpu", "cuda" (all GPUs that are visible) or "cuda:N" (this one).
    `processes` null: one for each GPU of `device`, one on a CPU. With one, no other is started.
    Given more than there are GPUs, they share them. Raises UserError for less than one.
    """

    def __init__(self, device: str, processes: int | None = None) -> None:
        if processes is not None and processes < 1:
            raise UserError(
                f"engine.processes={processes} is not allowed: it is a whole number, at least 1, "
                "or null for one on each GPU"
            )
        self.device = device
        self.processes = processes

    def make(
        self, model: DiffusionModel, build: BuildModel, orders: Sequence[Order]
    ) -> list[ImageSet]:
        devices = self.devices()
        if len(devices) == 1:
            return [order.generate(model) for order in orders]
        shares: list[Share] = [[] for _ in devices]
        for order in orders:
            for piece in order.pieces(model, len(devices)):
                shares[piece.shard[0]].append((order, piece))
        with _started(build, devices[1:], shares[1:]) as others:
            for order, piece in shares[0]:
                order.make_piece(model, piece)
            _wait_for(others)
        return finish(model, orders)

    def devices(self) -> list[str]:
        """Of each process, this one's first."""
        if self.device != "cuda":
            return [self.device] * (self.processes or 1)
        visible = torch.cuda.device_count()
        return [f"cuda:{number % visible}" for number in range(self.processes or visible)]


@contextmanager
def _started(
    build: BuildModel, devices: Sequence[str], shares: Sequence[Share]
) -> Iterator[list[SpawnProcess]]:
    """Processes at work on `shares`, a device each; none for a share with nothing to make.

    Those that still run when the block ends, because it raised, are ended.
    """
    context = multiprocessing.get_context("spawn")  # CUDA does not outlive a fork
    processes: list[SpawnProcess] = []
    try:
        for number, (device, share) in enumerate(zip(devices, shares, strict=True), 2):
            if not share:
                continue
            # Pickled here: multiprocessing would put tensors into /dev/shm, often too small.
            sent = [(order.sent(), piece) for order, piece in share]
            work = pickle.dumps((build, device, torch.get_num_threads(), sent))
            name = f"process {number} of {len(devices) + 1} ({device})"
            process = context.Process(target=_work, args=(work,), name=name, daemon=True)
            process.start()
            processes.append(process)
        yield processes
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _wait_for(processes: Sequence[SpawnProcess]) -> None:
    """Until all have ended; the log names those that failed."""
    for process in processes:
        process.join()
        if process.exitcode:
            logger.warning("%s ended with exit code %d", process.name, process.exitcode)


def _work(work: bytes) -> None:
    """What another process does. A user's mistake is told without a traceback; exit code 1."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal's processes the first ends all
    threading.Thread(target=_end_with_parent, daemon=True).start()
    build, device, threads, share = pickle.loads(work)
    torch.set_num_threads(threads)  # other numbers round differently
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
    try:
        model = build(device)
        for order, piece in share:
            order.make_piece(model, piece)
    except UserError as error:
        logger.error("%s: %s", multiprocessing.current_process().name, error)
        sys.exit(1)


def _end_with_parent() -> None:
    """Also when it was killed: whoever ends a run wants its GPUs back."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
