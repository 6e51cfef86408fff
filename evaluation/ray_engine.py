"""Many GPUs, of one machine or of a cluster: batches are Ray's tasks, on whatever GPU is free.

Tasks sample and return pixels; the process that orders them writes all files, so the machines need
no common folder, only the same installation and weights. A task whose process or node dies is run
again elsewhere. The ordering process needs the same kind of device as the tasks: it made the edit
there, and samples what they leave out.

A worker process keeps its model between tasks, so Ray must neither end it after one (`max_calls`),
nor hide GPUs from it: another set of tasks gets another GPU (seen with Ray 2.60), and CUDA looks at
CUDA_VISIBLE_DEVICES once. So tasks see all GPUs and take their own.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from cad.checks import check, not_negative, whole
from cad.errors import UserError
from cad.identity import describe_runtime
from cad.models.base import DiffusionModel
from cad.models.pretrained import Pretrained
from cad.weight_edit import WeightEdit
from evaluation.pixels import Pixels
from evaluation.sampler import Batch, Engine, Finite, Sampled, SamplerSettings, sample_batches

try:
    import ray
except ImportError:
    ray = None

SEE_ALL_GPUS = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
TASKS_PER_SLOT = 2  # in flight at most; bounds what is sampled and not yet written

logger = logging.getLogger(__name__)
warm_models: dict[tuple[Pretrained, str], DiffusionModel] = {}  # of a worker process; one at most


@dataclass
class RayEngine(Engine):
    """Tasks of some batches each, for workers that load the model on devices of their own.

    A task takes one GPU where this process's model is on one, and `cpus_per_task` CPUs. It computes
    with as many threads as this process, whatever it takes: other numbers round differently. The
    session of Ray begins with the first set and ends with the engine's `with` block.
    """

    model: Pretrained  # that `sampled` is given, loaded
    address: str | None  # `ray.init`'s
    batches_per_task: int
    cpus_per_task: float
    max_retries: int  # of a task whose process or node died

    def __post_init__(self) -> None:
        if ray is None:
            raise UserError(
                "engine=ray needs Ray, which is not installed: .venv/bin/pip install -e '.[ray]'"
            )
        if ray.is_initialized():  # a task that waits for others may wait for what it holds itself
            raise UserError(
                "engine=ray cannot be used where Ray is at work already: hydra/launcher=ray makes "
                "every run a task, engine=ray every part of a run's images. Choose one of them"
            )
        rules = {"batches_per_task": whole(1), "max_retries": whole(0)}
        check(self, "engine", cpus_per_task=not_negative, **rules)

    def __exit__(self, *error: object) -> None:
        ray.shutdown()

    def sampled(
        self, model: DiffusionModel, settings: SamplerSettings, batches: Sequence[Batch]
    ) -> Iterator[Sampled]:
        try:
            ray.init(
                address=self.address,
                include_dashboard=False,
                logging_level=logging.WARNING,
                runtime_env={"env_vars": SEE_ALL_GPUS},
                ignore_reinit_error=True,  # by the run's earlier set
            )
        except (ConnectionError, ValueError) as error:
            raise UserError(f"engine.address={self.address}: {error}") from error
        left = yield from self._sampled_by_tasks(model, settings, batches)
        if left:
            missing = sum(len(batch.indices) for batch in left)
            logger.warning(f"{missing} images are missing after all tasks; making them here")
            yield from sample_batches(model, settings, left)

    def _sampled_by_tasks(
        self, model: DiffusionModel, settings: SamplerSettings, batches: Sequence[Batch]
    ) -> Generator[Sampled, None, list[Batch]]:
        """Each batch with its images as its task ends; returns the batches of failed tasks."""
        if not self._slots(model):
            logger.warning("Ray has no %s at present: the images wait", model.device.type)
        task = ray.remote(
            num_cpus=self.cpus_per_task,
            num_gpus=0 if model.device.type == "cpu" else 1,
            max_calls=0,
            max_retries=self.max_retries,
        )(sample_task)
        threads, edits = torch.get_num_threads(), ray.put(model.edits)
        common = (self.model, describe_origin(model), threads, edits, settings)
        starts = range(0, len(batches), self.batches_per_task)
        waiting = deque(batches[start : start + self.batches_per_task] for start in starts)
        running: dict[Any, Sequence[Batch]] = {}
        left, reasons = list[Batch](), set[str]()
        while waiting or running:
            slots = max(1, self._slots(model))  # asked anew, as nodes come and go
            while waiting and len(running) < TASKS_PER_SLOT * slots:
                own = waiting.popleft()
                running[task.remote(*common, own)] = own
            (ended,), _ = ray.wait(list(running), num_returns=1)
            own = running.pop(ended)
            try:
                made = ray.get(ended)
            except ray.exceptions.RayError as error:
                left += own
                reasons.add(str(getattr(error, "cause", error)))
                continue
            for batch, (pixels, finite) in zip(own, made, strict=True):
                yield batch, pixels, finite
        for reason in sorted(reasons):
            logger.warning("tasks for images failed: %s", reason)
        return left

    def _slots(self, model: DiffusionModel) -> int:
        """How many tasks on devices like the model's the cluster can run at once."""
        resources = ray.cluster_resources()
        if model.device.type == "cpu":
            return int(resources.get("CPU", 0) / (self.cpus_per_task or 1))
        return int(resources.get("GPU", 0))


def sample_task(
    pretrained: Pretrained,
    origin: dict[str, Any],
    threads: int,
    edits: Sequence[WeightEdit],
    settings: SamplerSettings,
    batches: Sequence[Batch],
) -> list[tuple[Pixels, Finite]]:
    """The images of the batches under the edits, sampled in a worker process.

    Raises UserError where its model is of another `origin` (`describe_origin`) than was ordered.
    """
    torch.set_num_threads(threads)
    model = _warm_model(pretrained, origin["device"])
    found = describe_origin(model)
    if found != origin:
        differing = ", ".join(key for key in origin if found[key] != origin[key])
        raise UserError(
            f"a worker of engine=ray would make other images: it has another {differing}. Every "
            "machine needs the same installation, the same weights and the same kind of device"
        )
    with ExitStack() as stack:
        for edit in edits:
            stack.enter_context(edit.applied(model))
        return [(pixels, finite) for _, pixels, finite in sample_batches(model, settings, batches)]


def describe_origin(model: DiffusionModel) -> dict[str, Any]:
    """The model, the kind of device and the libraries: equal ones make equal images."""
    return model.provenance() | describe_runtime(model.device)


def _warm_model(pretrained: Pretrained, kind: str) -> DiffusionModel:
    """The worker's model on its own device of this kind, loaded by its first task."""
    device = kind
    if kind != "cpu":
        (own,) = ray.get_gpu_ids()  # its name among those that the node's Ray was given
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        device = f"cuda:{visible.split(',').index(str(own)) if visible else int(own)}"
        torch.cuda.set_device(device)
    if (pretrained, device) not in warm_models:
        warm_models.clear()  # first: two may not fit
        warm_models[pretrained, device] = pretrained.load(device)
    return warm_models[pretrained, device]
