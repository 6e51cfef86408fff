"""Where and with what a result was made: versions, commit, device, date."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from cad import runtime
from experiments.config import REPOSITORY

LIBRARIES = (*runtime.LIBRARIES, "torchvision", "safetensors", "numpy", "hydra-core")


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
        "libraries": {library: _version(library) for library in LIBRARIES},
    }


def git_commit() -> str:
    """The checkout's commit, with "-dirty" if files differ from it; "unknown" outside git."""
    try:
        commit = _git("rev-parse", "HEAD")
        return f"{commit}-dirty" if _git("status", "--porcelain") else commit
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"
