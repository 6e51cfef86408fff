"""A Ray cluster: pieces of image sets are tasks, on whatever GPU is free; a dead node costs little.

A task whose process or node dies is run again elsewhere and goes on with the images that are not
there yet. Images go to one folder, which all machines see under the same path, with locks that they
pass on (`cad.locks`), and all have the same installation. The process that orders the sets needs
the same kind of device as the tasks: it made the edit there, and makes what they leave out.

A worker process keeps its model between tasks, so Ray must neither end it after one, its default
for GPUs (`max_calls`), nor hide GPUs from it: Ray gives a process that goes on to another set of
tasks another GPU (seen with Ray 2.60), and CUDA looks at CUDA_VISIBLE_DEVICES once in its life. So
tasks see all GPUs and take the one that is theirs.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from cad.errors import UserError
from cad.models.base import DiffusionModel
from evaluation.engines.base import BuildModel, Engine, Order, Piece, finish
from evaluation.image_sets import ImageSet

SEE_ALL_GPUS = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}

logger = logging.getLogger(__name__)
warm_models: dict[tuple[BuildModel, str], DiffusionModel] = {}  # of a worker process; one at most


class RayEngine(Engine):
    """Tasks of `batches_per_task` batches each, tried again up to `max_retries` times.

    `address` is `ray.init`'s. A task takes one GPU where this process's model is on one, and
    `cpus_per_task` CPUs. It computes with as many threads as this process, whatever it takes: other
    numbers round differently. Raises UserError where Ray is not installed or runs this process
    itself, or for numbers that make no sense.
    """

    def __init__(
        self, address: str | None, batches_per_task: int, cpus_per_task: float, max_retries: int
    ) -> None:
        try:
            import ray
        except ImportError as error:
            raise UserError(
                "engine=ray needs Ray, which is not installed: .venv/bin/pip install -e '.[ray]'"
            ) from error
        if ray.is_initialized():  # a task that waits for others may wait for what it holds itself
            raise UserError(
                "engine=ray cannot be used where Ray is at work already: hydra/launcher=ray makes "
                "every run a task, engine=ray every part of a run's images. Choose one of them"
            )
        if batches_per_task < 1 or cpus_per_task < 0 or max_retries < 0:
            raise UserError(
                f"engine.batches_per_task={batches_per_task} must be at least 1, "
                f"engine.cpus_per_task={cpus_per_task} and engine.max_retries={max_retries} at "
                "least 0"
            )
        self.address = address
        self.batches_per_task = batches_per_task
        self.cpus_per_task = cpus_per_task
        self.max_retries = max_retries

    def make(
        self, model: DiffusionModel, build: BuildModel, orders: Sequence[Order]
    ) -> list[ImageSet]:
        wanted = [(order, self._pieces(model, order)) for order in orders]
        if any(pieces for _, pieces in wanted):
            with _session(self.address):
                _warn_of_waiting("CPU" if model.device.type == "cpu" else "GPU")
                _wait_for(self._submit(model.device.type, build, wanted))
        return finish(model, orders)

    def _pieces(self, model: DiffusionModel, order: Order) -> list[Piece]:
        return order.pieces(model, math.ceil(len(order.batches(model)) / self.batches_per_task))

    def _submit(
        self, kind: str, build: BuildModel, wanted: Sequence[tuple[Order, list[Piece]]]
    ) -> dict[Any, Piece]:
        """A task for each piece; `kind` is of the device. Orders are stored once, for all tasks."""
        import ray

        task = ray.remote(
            num_cpus=self.cpus_per_task,
            num_gpus=0 if kind == "cpu" else 1,
            max_calls=0,
            max_retries=self.max_retries,
        )(_make_piece)
        threads = torch.get_num_threads()
        submitted = {}
        for order, pieces in wanted:
            stored = ray.put(order.sent()) if pieces else None
            for piece in pieces:
                submitted[task.remote(build, kind, threads, stored, piece)] = piece
        return submitted


@contextmanager
def _session(address: str | None) -> Iterator[None]:
    """Ray's, ended with the block, which frees what the workers hold. UserError where none is."""
    import ray

    try:
        ray.init(
            address=address,
            include_dashboard=False,
            logging_level=logging.WARNING,
            runtime_env={"env_vars": SEE_ALL_GPUS},
        )
    except (ConnectionError, ValueError) as error:
        raise UserError(f"engine.address={address}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _warn_of_waiting(resource: str) -> None:
    import ray

    if not ray.cluster_resources().get(resource):
        logger.warning("Ray has no %s at present: the images wait until a node has", resource)


def _wait_for(submitted: Mapping[Any, Piece]) -> None:
    """Until all tasks have ended; the log has each reason why some failed, once."""
    import ray

    waiting, told = dict(submitted), set[str]()
    total = sum(piece.missing for piece in waiting.values())
    with tqdm(total=total, unit="image", desc="images on Ray", disable=None) as progress:
        while waiting:
            (ended,), _ = ray.wait(list(waiting), num_returns=1)
            piece = waiting.pop(ended)
            try:
                ray.get(ended)
            except ray.exceptions.RayError as error:
                reason = str(getattr(error, "cause", error))
                if reason not in told:
                    logger.warning("a task for images of %s failed: %s", piece.key, reason)
                told.add(reason)
            progress.update(piece.missing)


def _make_piece(build: BuildModel, kind: str, threads: int, order: Order, piece: Piece) -> None:
    """The task. Raises UserError as `Order.make_piece`."""
    torch.set_num_threads(threads)
    device = kind if kind == "cpu" else _own_gpu()
    if kind != "cpu":
        torch.cuda.set_device(device)
    if (build, device) not in warm_models:
        warm_models.clear()  # first: two may not fit
        warm_models[build, device] = build(device)
    order.make_piece(warm_models[build, device], piece)


def _own_gpu() -> str:
    """PyTorch's name for the GPU that Ray gave to this task."""
    import ray

    (own,) = ray.get_gpu_ids()  # its name among those that the node's Ray was given
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return f"cuda:{visible.split(',').index(str(own)) if visible else int(own)}"
