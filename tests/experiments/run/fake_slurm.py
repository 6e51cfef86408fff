"""`sbatch`, `srun` and `sacct` on this machine alone: as much of SLURM as submitit asks for.

Linked under these names into a folder of PATH. A job's array tasks are processes, started at once.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ARRAY_JOB = "4711"


def sbatch(script: str) -> None:
    """Start the script's tasks and tell the job's number; keeps the script beside this file."""
    text = Path(script).read_text()
    (Path(sys.argv[0]).parent / "submitted.sh").write_text(text)
    found = re.search(r"--array=0-(\d+)", text)
    for task in range(int(found[1]) + 1) if found else [None]:
        own = {"SLURM_JOB_ID": ARRAY_JOB, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
        if task is not None:
            own |= {"SLURM_ARRAY_JOB_ID": ARRAY_JOB, "SLURM_ARRAY_TASK_ID": str(task)}
        nowhere = subprocess.DEVNULL  # whoever submits reads what sbatch writes to its end
        environment = os.environ | own
        subprocess.Popen(["bash", script], env=environment, stdout=nowhere, stderr=nowhere)
    sys.stdout.write(f"Submitted batch job {ARRAY_JOB}\n")


def srun(arguments: list[str]) -> None:
    """Run what comes after the options, its output where SLURM would have it."""
    output = arguments[arguments.index("--output") + 1]
    job = os.environ.get("SLURM_ARRAY_JOB_ID", ARRAY_JOB)
    task = os.environ.get("SLURM_ARRAY_TASK_ID", "0")
    for name, value in (("%A", job), ("%a", task), ("%j", job), ("%t", "0")):
        output = output.replace(name, value)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    python = next(i for i, word in enumerate(arguments) if word.endswith("python"))
    with Path(output).open("a") as file:
        subprocess.run(arguments[python:], stdout=file, stderr=subprocess.STDOUT, check=False)
    (Path(sys.argv[0]).parent / f"ended-{job}_{task}").touch()


def sacct() -> None:
    """FAILED for every task that has ended: asked only of those that left no result."""
    ended = Path(sys.argv[0]).parent.glob("ended-*")
    lines = (f"{path.name.removeprefix('ended-')}|FAILED|here\n" for path in ended)
    sys.stdout.write("JobID|State|NodeList\n" + "".join(lines))


if __name__ == "__main__":
    name = Path(sys.argv[0]).name
    if name == "sbatch":
        sbatch(sys.argv[1])
    elif name == "srun":
        srun(sys.argv[1:])
    else:
        sacct()
