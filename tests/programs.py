"""The suite's programs as a user calls them, but in this process: PyTorch is imported once."""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import runpy
import sys
import traceback
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from pathlib import Path
from unittest import mock

from huggingface_hub import constants
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from cad.places import REPOSITORY

FORK = multiprocessing.get_context("fork")
QUIET = {"COLUMNS": "150", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Ended:
    """A program that has ended."""

    returncode: int
    stdout: str
    stderr: str


def call(program: Path, *arguments: str) -> Ended:
    """`python PROGRAM ARGUMENTS`, offline.

    Leaves Hydra, the loggers, sys.path and the environment as found.
    """
    out, err = io.StringIO(), io.StringIO()
    with _as_found(), redirect_stdout(out), redirect_stderr(err):
        sys.argv = [str(program), *arguments]
        try:
            runpy.run_path(str(program), run_name="__main__")
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        except Exception:
            traceback.print_exc()
            status = 1
    return Ended(status, out.getvalue(), err.getvalue())


def run(*overrides: str) -> Ended:
    """`python run.py OVERRIDES`."""
    return call(REPOSITORY / "run.py", *overrides)


def start(*overrides: str) -> ForkProcess:
    """`python run.py OVERRIDES` in a child of this process, which a test may kill."""

    def told() -> None:
        ended = run(*overrides)
        os.write(2, ended.stderr.encode())
        os._exit(ended.returncode)

    process = FORK.Process(target=told)
    process.start()
    return process


@contextmanager
def _as_found():
    root, path, argv = logging.getLogger(), list(sys.path), sys.argv
    handlers, level = list(root.handlers), root.level
    root.handlers.clear()  # a process begins with none
    GlobalHydra.instance().clear()
    try:
        with (
            mock.patch.dict(os.environ, QUIET),
            mock.patch.object(constants, "HF_HUB_OFFLINE", True),
        ):
            yield
    finally:
        for handler in set(root.handlers) - set(handlers):
            handler.close()
        root.handlers[:], sys.path[:], sys.argv = handlers, path, argv
        root.setLevel(level)
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None
