"""How the suite's programs end: a message for what a user can mend, a traceback for a bug.

Importing this module makes the resolvers of conf/ known: a launcher's job unpickles `JobEnds`, and
so comes here, before it composes its configuration.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException, InstantiationException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cad.errors import UserError
from cad.files import write_atomically
from experiments.run.configuration import (
    CONF,
    check_once,
    check_results,
    choices,
    register_resolvers,
)

USAGE_ERROR = 2  # exit status
INTERRUPTED = 130  # exit status, as shells have it
LINK = "result.json"  # of a multirun's job
TERMINATED = 143
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
CONFIGURING = ("hydra", "omegaconf", "antlr4", "submitit", "hydra_plugins")
NO_OPTION = re.compile(r"In '.+': Could not load '(\w+)/(.+)'")
RESOLVING = "UserError raised while resolving interpolation: "
NO_CHOICE = "Config group override must be"
NO_KEY = re.compile(r"Could not override '([^']+)'")
NO_PLUGIN = "\nLaunchers are plug-ins: pip install -e '.[slurm]' or '.[ray]'"

log = logging.getLogger(__name__)

register_resolvers()


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which batch systems end a job: the run ends as after Ctrl-C."""


def exit_status(program: Callable[[], object]) -> int:
    """0; USAGE_ERROR after the message of a user's mistake; INTERRUPTED, TERMINATED by a signal."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # else Hydra ends the process with its own words
    logging.raiseExceptions = False  # a log's full disk
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        program()
    except KeyboardInterrupt as end:
        told = str(end) or "interrupted"
        log.error("%s: the same command goes on where this one stopped", told)
        return TERMINATED if isinstance(end, Terminated) else INTERRUPTED
    except Exception as error:
        message = find_mistake(error)
        if message is None:
            raise
        log.error("%s", message)
        return USAGE_ERROR
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def find_mistake(error: BaseException) -> str | None:
    """The message for a mistake that a user can mend; None for everything else.

    Hydra wraps whatever a constructor raises: a UserError among the causes is what the user is
    told, without the wrapping; any other error inside an instantiation is a bug. What Hydra,
    OmegaConf and launchers raise themselves is about the configuration, or a job that died.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return str(cause)
        cause = cause.__cause__
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return (
            f"cannot write {error.filename or 'a result'} ({error.strerror}): make room, or choose "
            "another folder with paths.results=DIR; the same command goes on where it stopped"
        )
    if isinstance(error, OSError) and error.errno in NO_ACCESS:
        return f"{error.filename or 'a file'} cannot be read or written ({error.strerror})"
    if isinstance(error, OmegaConfBaseException):
        told = str(error).splitlines()[0]
        if told.endswith(("not found", "not in struct")):
            told += "; python run.py --cfg job shows the keys that there are"
        return told.partition(RESOLVING)[2] or f"{error.full_key or 'the configuration'}: {told}"
    known = isinstance(error, HydraException) or _origin(error) in CONFIGURING
    if isinstance(error, InstantiationException) or not known:
        return None
    return _with_choices(error)


def _with_choices(error: BaseException) -> str:
    """Hydra's message, with what could be chosen instead where it does not say that."""
    listed = NO_OPTION.match(str(error))  # of several, Hydra names no choices
    if listed and (CONF / listed[1]).is_dir():
        return f"{listed[1]}={listed[2]} is unknown; choose from {choices(listed[1])}"
    if str(error).startswith(NO_CHOICE):  # Hydra does not say of which group
        named = ((each, *each.lstrip("+").split("=", 1)) for each in sys.argv[1:] if "=" in each)
        known = ((each, value, choices(key)) for each, key, value in named)
        told = [f"{each}: choose from {c}" for each, value, c in known if c and value not in c]
        return "; ".join([str(error), *told])
    unknown = NO_KEY.match(str(error))
    if unknown:
        top = map(str, OmegaConf.load(CONF / "config.yaml"))
        near = get_close_matches(unknown[1], [*(path.stem for path in CONF.iterdir()), *top], 1)
        hint = f"; did you mean {near[0]}?" if near else "."
        return f"{unknown[1]} is no setting{hint} python run.py --cfg job shows all"
    return str(error) + (NO_PLUGIN if "'hydra/launcher/" in str(error) else "")


def _terminate(number: int, frame: object) -> None:
    raise Terminated("terminated")


def _origin(error: BaseException) -> str:
    """The package whose code raised the error; its own where nobody did."""
    place, name = error.__traceback__, type(error).__module__
    while place is not None:
        name, place = place.tb_frame.f_globals.get("__name__", ""), place.tb_next
    return str(name).partition(".")[0]


class JobEnds(Callback):
    """Hydra's callback of all programs: unusable folders, failed jobs, a multirun's summary.

    A failed job does not stop the others of a multirun; the process then ends with USAGE_ERROR. It
    ends by SystemExit: Hydra turns any other exception of a callback into a warning, and adds words
    of its own to a job's.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        _end_unless_usable(config, "hydra.run.dir")  # before Hydra makes it

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        _end_unless_usable(config, "hydra.sweep.dir")
        for link in Path(config.hydra.sweep.dir).glob(f"*/{LINK}"):
            link.unlink()  # of an earlier run of the same command
        self._count, self._began = _count_jobs(config), time.monotonic()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        error = job_return._return_value if job_return.status == JobStatus.FAILED else None
        message = find_mistake(error) if error else None
        if message:
            log.error("%s", message)
        if config.hydra.mode == RunMode.MULTIRUN:
            folder = Path(config.hydra.runtime.output_dir)
            self._tell_progress(config)
            if error is None:
                note(folder, result=job_return.return_value)
                return
            if not message:
                log.error("a bug", exc_info=error)
            note(folder, error=message or f"{type(error).__name__}: {error}")
            job_return.return_value, job_return.status = None, JobStatus.COMPLETED
        elif message:
            raise SystemExit(USAGE_ERROR)

    def _tell_progress(self, config: DictConfig) -> None:
        """Log how many jobs are done and the time to go, where they run one after another."""
        if not config.hydra.launcher._target_.endswith(".BasicLauncher"):
            return
        done, spent = config.hydra.job.num + 1, time.monotonic() - self._began
        left = spent / done * (self._count - done)
        times = f"{_clock(spent)} so far, about {_clock(left)} to go"
        log.info("%d of %d runs done: %s", done, self._count, times)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from experiments.run.sweep import summarise  # imports PyTorch

        if not summarise(Path(config.hydra.sweep.dir)):
            raise SystemExit(USAGE_ERROR)


def note(job: Path, result: Path | None = None, error: str | None = None) -> None:
    """Leave a job's result, or why it has none, in the job's own folder of the multirun."""
    told = {"folder": None if result is None else str(result), "error": error}
    write_atomically(job / LINK, json.dumps(told).encode())


def _count_jobs(config: DictConfig) -> int:
    """The number of a multirun's jobs."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    parsed = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
    return sum(len(batch) for batch in BasicSweeper.split_arguments(parsed, None))


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _end_unless_usable(config: DictConfig, hydras: str) -> None:
    given = config.hydra.overrides
    try:
        check_once([*given.task, *given.hydra])
        check_results(config, hydras)
    except UserError as error:
        log.error("%s", error)
        raise SystemExit(USAGE_ERROR) from error
