"""Launchers of `run.py -m`: hydra/launcher=submitit_slurm, submitit_local and ray.

Ray's is hydra-ray-launcher's, and says what to install where that is missing. Submitit's outlive a
job's death. Their jobs are hydra-submitit-launcher's, with three differences. Every job is waited
for, also past one that was killed; the reason is left in its folder (`experiments.sweep`), where
the multirun's summary and `experiments.make` find it. `hydra.launcher` is read in each job's own
configuration, so that it may follow the job's model; on SLURM, jobs that ask for the same are one
array. And the suite's resolvers are known in a job's process before its configuration is composed.

Hydra finds them in hydra_plugins/, and imports them at every start: what is slow to import comes
when it is needed.
"""

from __future__ import annotations

import json
import logging
import os
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from cad.errors import UserError

if TYPE_CHECKING:
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import BaseSubmititLauncher
    from submitit import Job, SlurmExecutor

OWN = {"_target_", "submitit_folder", "max_num_timeout", "needs", "at_once", "submit"}
POLL = 0.5  # seconds between two looks at the running jobs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """A job of the multirun: its number, overrides, and hydra.launcher as it resolves for it."""

    number: int
    overrides: list[str]
    settings: dict[str, Any]

    @property
    def parameters(self) -> dict[str, Any]:
        """What submitit's executor is asked for."""
        return {k: v for k, v in self.settings.items() if k not in OWN and v is not None}


@dataclass(frozen=True)
class Work:
    """What a job's process does: it runs one task of `run.py`."""

    launcher: BaseSubmititLauncher

    def __call__(self, *arguments: Any) -> JobReturn:
        from experiments.config import register_resolvers

        register_resolvers()
        returned: JobReturn = self.launcher(*arguments)
        return returned

    def checkpoint(self, *arguments: Any) -> Any:
        """Before a job's time is up or it is preempted: submit it again; it goes on from disk."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *arguments)


class RayLauncher(Launcher):
    """Each job as a task of Ray."""

    def __init__(self, **settings: Any) -> None:
        self._settings = settings

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        try:
            from hydra_plugins.hydra_ray_launcher.ray_launcher import RayLauncher as Inner
        except ImportError as error:
            raise UserError(
                "hydra/launcher=ray needs hydra-ray-launcher, which is not installed: "
                ".venv/bin/pip install -e '.[ray]'"
            ) from error
        self._inner: Launcher = Inner(**self._settings)
        self._inner.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        return self._inner.launch(job_overrides, initial_job_idx)


class SubmititLauncher(Launcher):
    """What both of submitit have in common: submit, wait, tell."""

    def __init__(self, **settings: Any) -> None:
        """What is given is read again for each job, as it resolves there."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        try:
            from hydra_plugins.hydra_submitit_launcher.submitit_launcher import BaseSubmititLauncher
        except ImportError as error:
            chosen = config.hydra.runtime.choices["hydra/launcher"]
            raise UserError(
                f"hydra/launcher={chosen} needs hydra-submitit-launcher, which is not installed: "
                ".venv/bin/pip install -e '.[slurm]'"
            ) from error
        self.config = config
        self._context = hydra_context
        self._inner = BaseSubmititLauncher()
        self._inner.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Runs all and waits for all. A job without a result returns None, and its folder why."""
        Path(self.config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        tasks = [
            self._task(number, list(overrides))
            for number, overrides in enumerate(job_overrides, initial_job_idx)
        ]
        returned: dict[int, JobReturn] = {}
        running: dict[int, Job[JobReturn]] = {}
        try:
            for batch in self.submitted(tasks, running):
                running |= batch
                for number in [number for number, job in running.items() if job.done()]:
                    returned[number] = self._outcome(number, running.pop(number))
                    log.info("%d of %d runs have ended", len(returned), len(tasks))
        except KeyboardInterrupt:
            for job in running.values():
                job.cancel(check=False)
            raise
        none = JobReturn(status=JobStatus.COMPLETED)
        return [returned.get(task.number, none) for task in tasks]

    @abstractmethod
    def submitted(
        self, tasks: Sequence[Task], running: dict[int, Job[JobReturn]]
    ) -> Iterator[dict[int, Job[JobReturn]]]:
        """Jobs as they are submitted, by task number; asked again until none is `running`."""

    def arguments(self, task: Task) -> tuple[Any, ...]:
        """Of the task's work."""
        place = "hydra.sweep.dir"
        return task.overrides, place, task.number, f"job_{task.number}", Singleton.get_state()

    def _task(self, number: int, overrides: list[str]) -> Task:
        from experiments.config import plain

        composed = self._context.config_loader.load_sweep_config(self.config, overrides)
        composed.hydra.job.num = number
        log.info("#%d: %s", number, " ".join(composed.hydra.overrides.task))
        return Task(number, overrides, plain(composed.hydra.launcher))

    def _outcome(self, number: int, job: Job[JobReturn]) -> JobReturn:
        from submitit.core.utils import FailedJobError, UncompletedJobError

        from experiments.sweep import note_failure

        reason = None
        try:
            (returned,) = job.results()
        except (UncompletedJobError, FailedJobError):
            state = "" if job.state == "FINISHED" else f" ({job.state})"  # a local one's, always
            reason = f"its process ended without a result{state}"
            returned = JobReturn(status=JobStatus.COMPLETED)
        if returned.status == JobStatus.FAILED:
            error = returned._return_value
            reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            folder = Path(self.config.hydra.sweep.dir) / str(number)
            folder.mkdir(exist_ok=True)
            note_failure(folder, f"{reason}; its output: {job.paths.stdout}")
        return returned


class SlurmLauncher(SubmititLauncher):
    """Each job on a SLURM cluster. With `submit` false only writes the scripts for sbatch."""

    def submitted(
        self, tasks: Sequence[Task], running: dict[int, Job[JobReturn]]
    ) -> Iterator[dict[int, Job[JobReturn]]]:
        alike: dict[str, list[Task]] = {}
        for task in tasks:
            alike.setdefault(json.dumps(task.settings, sort_keys=True), []).append(task)
        for members in alike.values():
            if members[0].settings["submit"]:
                columns = zip(*map(self.arguments, members), strict=True)
                jobs = slurm_executor(members[0]).map_array(Work(self._inner), *columns)
                yield {task.number: job for task, job in zip(members, jobs, strict=True)}
            else:
                self._write_script(members)
        while running:
            time.sleep(POLL)
            yield {}

    def _write_script(self, tasks: Sequence[Task]) -> None:
        path = Path(self.config.hydra.sweep.dir) / f"sbatch-{tasks[0].number}.sh"
        text = script(tasks[0], len(tasks))
        path.write_text(text, encoding="utf-8")
        log.info("%s, not submitted:\n%s", path, text)


def script(task: Task, count: int) -> str:
    """What sbatch would be given for `count` jobs like `task`; needs no cluster."""
    from submitit import SlurmExecutor

    class Draft(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 1  # as if srun were there

    executor = slurm_executor(task, Draft)
    if count > 1:
        executor.parameters["map_count"] = count
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def slurm_executor(task: Task, kind: type[SlurmExecutor] | None = None) -> SlurmExecutor:
    """Asks for what the task does. Raises UserError where there is no SLURM."""
    from submitit import SlurmExecutor

    settings = task.settings
    try:
        executor = (kind or SlurmExecutor)(
            settings["submitit_folder"], max_num_timeout=settings["max_num_timeout"]
        )
    except RuntimeError as error:
        raise UserError(
            f"hydra/launcher=submitit_slurm: {error} hydra.launcher.submit=false writes the "
            "scripts without one; hydra/launcher=submitit_local runs the jobs on this machine"
        ) from error
    executor.update_parameters(**executor._convert_parameters(task.parameters))
    return executor


class LocalLauncher(SubmititLauncher):
    """Each job in a process of its own on this machine, `at_once` of them, on its GPUs in turn.

    `at_once` null: as many as there are GPUs, or one after another where there are none.
    """

    def submitted(
        self, tasks: Sequence[Task], running: dict[int, Job[JobReturn]]
    ) -> Iterator[dict[int, Job[JobReturn]]]:
        from submitit import LocalExecutor

        gpus = visible_gpus()
        count = tasks[0].settings["at_once"] or max(1, len(gpus))
        slots: list[int | None] = [None] * count  # the task that each is busy with
        waiting = list(tasks)
        while waiting or running:
            for slot, number in enumerate(slots):
                if number in running or not waiting:
                    continue
                task = waiting.pop(0)
                executor = LocalExecutor(task.settings["submitit_folder"])
                executor.update_parameters(**task.parameters)
                if gpus:  # submitit hides them all from a job that names none
                    own = gpus[slot % len(gpus)]
                    executor.parameters |= {"visible_gpus": [own], "gpus_per_node": 1}
                job = executor.submit(Work(self._inner), *self.arguments(task))
                slots[slot] = task.number
                yield {task.number: job}
            time.sleep(POLL)
            yield {}


def visible_gpus() -> list[str]:
    """This process's GPUs, by the names that CUDA_VISIBLE_DEVICES has for them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]
