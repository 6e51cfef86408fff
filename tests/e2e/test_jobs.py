"""A multirun whose jobs are processes of their own: one is killed, and made by the next command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from weights import write_weights

from experiments.run.configuration import REPOSITORY

pytest.importorskip("hydra_plugins.hydra_submitit_launcher")

TIMEOUT = 400  # seconds; a launcher waits 15 for what a killed job may have left
JOB = "submitit.core._submit"  # in the command line of a job's process


def start(weights: Path, results: Path, sweep: Path) -> subprocess.Popen[str]:
    """Two edits of a church, nothing measured."""
    return subprocess.Popen(
        [
            *(sys.executable, "run.py", "-m", "edit=uce,rece", "concept=church"),
            *("evaluator=[]", "+evaluator={}", "debug=tiny", "logger=none"),
            "hydra/launcher=submitit_local",
            *(f"paths.miniature={weights}", f"paths.results={results}", f"hydra.sweep.dir={sweep}"),
        ],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "150"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_job(process: subprocess.Popen[str], number: int, sweep: Path) -> None:
    """SIGKILL for the process of a job, as soon as it has begun: the first is the first started."""
    begun = sweep / str(number) / ".hydra" / "overrides.yaml"
    end = time.monotonic() + TIMEOUT
    while not begun.exists():
        assert process.poll() is None
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


def test_a_killed_job_takes_no_other_along_and_is_made_by_the_next_command(tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "weights")
    results, sweep = tmp_path / "results", tmp_path / "sweep"
    killed = start(weights, results, sweep)
    kill_job(killed, 0, sweep)
    output, _ = killed.communicate(timeout=TIMEOUT)
    assert killed.returncode == 2, output
    assert "has not produced any output" in output
    (survivor,) = wait_for_result(results)
    assert survivor.name.startswith("mini-church-rece-")
    written = survivor.stat().st_mtime_ns

    again = start(weights, results, sweep)
    output, _ = again.communicate(timeout=TIMEOUT)
    assert again.returncode == 0, output
    names = sorted(path.name for path in (results / "runs").glob("mini-*"))
    assert [name.split("-")[2] for name in names] == ["rece", "uce"]
    assert survivor.stat().st_mtime_ns == written
    logs = [path.read_text() for path in sweep.glob(".submitit/*/*_log.out")]
    assert sum("nothing was computed" in log for log in logs) == 1
