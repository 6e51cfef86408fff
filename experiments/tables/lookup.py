"""Which runs of a table or figure have their results.

A result is found by its run's identity, so a run is composed and prepared to be looked up.
`RunNames` remembers what was found, for `status`, which has no time for that.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from cad.files import write_atomically
from cad.places import REPOSITORY
from experiments.run.command_line import find_mistake
from experiments.run.configuration import CONF, Compose
from experiments.tables.exhibit import ListedRun

CODE = ("cad", "baselines", "evaluation", "experiments/run", "experiments/miniature/weights")
DEFAULTS = {"model": "mini", "concept": "parachute", "edit": "erase"}  # of conf/config.yaml


def option_folders() -> list[str]:
    """The folders beside conf/ in which the running program was told to find options."""
    sources = HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else []
    found = [source.path for source in sources if source.schema == "file"]
    return [path for path in found if Path(path) != CONF]


def options(overrides: Sequence[str]) -> dict[str, str]:
    """The values that overrides give to keys and groups of conf/, the last of each."""
    return dict(each.partition("=")[::2] for each in overrides)


def look_up(run: ListedRun, compose: Compose, names: RunNames) -> ListedRun:
    """The run with its finished result if there is one, or with the reason why it is refused."""
    if run.refused:
        return run
    from experiments.run.experiment import prepare  # imports PyTorch

    try:
        folder = prepare(compose(run.overrides)).folder
    except Exception as error:
        message = find_mistake(error)
        if message is None:
            raise
        return replace(run, refused=message)
    names.note(run, folder.final.name)
    return replace(run, result=folder.final if folder.is_complete() else None)


class RunNames:
    """Names of result folders by the overrides of their runs, kept in `<runs>/.names.json`.

    They hold for one state of code, configuration, libraries and machine. What lies outside, such
    as a model's folder that an override names, may change unseen: `status` alone believes them.
    """

    def __init__(self, runs: Path, folders: Sequence[str] = ()) -> None:
        self.runs = runs
        self._labels = {path.name.rpartition("-")[0] for path in runs.glob("*-*")}
        self._path = runs / ".names.json"
        self._stamp = _stamp([*(REPOSITORY / name for name in CODE), CONF, *map(Path, folders)])
        self._names = self._read()

    def find(self, run: ListedRun, compose: Compose) -> ListedRun:
        """The run as `look_up` has it, but composed only if its result may be there unnoted."""
        name = self._names.get(_key(run))
        if name is not None:
            there = (self.runs / name / "manifest.json").exists()
            return replace(run, result=self.runs / name if there else None)
        chosen = DEFAULTS | options(run.overrides)
        concepts = chosen["concept"].strip("[]").replace(",", "+")
        after = chosen.get("after", "").strip("[]").split(",")
        label = "+".join([f"{chosen['model']}-{concepts}-{chosen['edit']}", *filter(None, after)])
        return look_up(run, compose, self) if label in self._labels else run

    def note(self, run: ListedRun, name: str) -> None:
        """Remember the name of a run's folder; `save` writes it down."""
        self._names[_key(run)] = name

    def save(self) -> None:
        """Write down what is new, beside what others have written meanwhile."""
        written = self._read()
        if self._names.items() - written.items():
            content = {"stamp": self._stamp, "names": written | self._names}
            write_atomically(self._path, json.dumps(content, indent=1).encode())

    def _read(self) -> dict[str, str]:
        try:
            written = json.loads(self._path.read_text(encoding="utf-8"))
            return dict(written["names"]) if written["stamp"] == self._stamp else {}
        except (OSError, ValueError, TypeError, LookupError):  # missing, or damaged
            return {}


def _key(run: ListedRun) -> str:
    """The run's overrides, in whatever order, without trackers', which change nothing."""
    return " ".join(sorted(each for each in run.overrides if not each.startswith("logger")))


def _stamp(folders: Sequence[Path]) -> str:
    """A hash of everything that a name depends on; of files their size and time of change."""
    files = sorted(file for folder in folders for file in folder.rglob("*.*") if file.is_file())
    stats = [(str(file), file.stat()) for file in files if file.suffix != ".pyc"]
    known: list[Any] = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    known += sorted(path.name for path in Path(sysconfig.get_path("purelib")).glob("*.dist-info"))
    known += [platform.node(), os.environ.get("CUDA_VISIBLE_DEVICES")]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()
