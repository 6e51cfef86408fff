"""Where and with what a result was made: versions, commit, device, date."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from typing import Any

import torch

from cad.identity import LIBRARIES, library_version
from experiments.run.configuration import REPOSITORY

PACKAGES = (*LIBRARIES, "torchvision", "safetensors", "numpy", "hydra-core")


def describe_environment(device: str) -> dict[str, Any]:
    """The machine and the code as they are now, as JSON data: "finished" is the time of the call.

    `device` is resolved: "cpu", "cuda" or "cuda:N". Calls git, for the commit.
    """
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor()
    return {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "device_name": name or platform.machine(),
        "threads": torch.get_num_threads(),
        "libraries": {name: library_version(name) for name in PACKAGES},
    }


def git_commit() -> str:
    """The checkout's commit, with "-dirty" if files differ from it; "unknown" outside git."""
    git = ["git", "-C", str(REPOSITORY)]
    told = []
    for command in ("rev-parse HEAD", "status --porcelain"):
        try:
            ended = subprocess.run(
                [*git, *command.split()], capture_output=True, text=True, check=True, timeout=10
            )
        except (OSError, subprocess.SubprocessError):
            return "unknown"
        told.append(ended.stdout.strip())
    return f"{told[0]}-dirty" if told[1] else told[0]
