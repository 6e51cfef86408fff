"""A multirun whose jobs are processes of their own: one is killed, and made by the next command."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.context import ForkProcess
from pathlib import Path

import programs
import psutil
import pytest
from weights import write_weights

pytest.importorskip("hydra_plugins.hydra_submitit_launcher")

TIMEOUT = 400  # seconds; a launcher waits 15 for what a killed job may have left
JOB = "submitit.core._submit"  # in the command line of a job's process


def command(weights: Path, results: Path, sweep: Path) -> list[str]:
    """Two edits of a church, nothing measured."""
    paths = [f"paths.miniature={weights}", f"paths.results={results}", f"hydra.sweep.dir={sweep}"]
    chosen = ["edit=uce,rece", "concept=church", "evaluator=[]", "+evaluator={}"]
    return ["-m", *chosen, *paths, "debug=tiny", "logger=none"]


def kill_job(process: ForkProcess, number: int, sweep: Path) -> None:
    """SIGKILL for the process of a job, as soon as it has begun: the first is the first started."""
    begun = sweep / str(number) / ".hydra" / "overrides.yaml"
    end = time.monotonic() + TIMEOUT
    while not begun.exists():
        assert process.is_alive()
        assert time.monotonic() < end
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    jobs = [child for child in children if JOB in child.cmdline()]
    os.kill(min(jobs, key=lambda job: job.parent().pid).pid, signal.SIGKILL)


def wait_for_result(results: Path) -> list[Path]:
    """The launcher ends with the first job that died; the others go on."""
    end = time.monotonic() + TIMEOUT
    while not (found := list((results / "runs").glob("mini-*"))):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


def test_a_killed_job_takes_no_other_along_and_is_made_by_the_next_command(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = write_weights(tmp_path / "weights")
    results, sweep = tmp_path / "results", tmp_path / "sweep"
    killed = programs.start(*command(weights, results, sweep), "hydra/launcher=submitit_local")
    kill_job(killed, 0, sweep)
    killed.join(TIMEOUT)
    assert killed.exitcode == 2
    assert "has not produced any output" in capfd.readouterr().err
    (survivor,) = wait_for_result(results)
    assert survivor.name.startswith("mini-church-rece-")
    written = survivor.stat().st_mtime_ns

    again = programs.run(*command(weights, results, sweep))
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("nothing was computed") == 1
    names = sorted(path.name for path in (results / "runs").glob("mini-*"))
    assert [name.split("-")[2] for name in names] == ["rece", "uce"]
    assert survivor.stat().st_mtime_ns == written
