"""Result folders: whole or absent, addressed by the hash of what determines them.

`<runs>/<name>-<hash>/` appears when its last file is written: an unfinished run works in
`<runs>/.unfinished/<name>-<hash>/`, which is renamed into place, and holds the lock
`<runs>/.unfinished/<name>-<hash>.lock` meanwhile. `manifest.json` has the SHA-256 of every other
file; all are checked on each reuse. Files of a folder:

    config.yaml         the configuration as composed and resolved
    edit.safetensors    the edit (cad.weight_edit)
    records.jsonl       one line per image and metric, before and after the edit
    arrays.safetensors  what of the records is no text, such as features, where there is any
    attacks.jsonl       one line per attack and prompt, if attacks were chosen
    metrics.json        aggregates with n, interval, unit, direction, version; deterministic
    cost.json           editing time and peak memory: the machine's, hence apart
    environment.json    versions, commit, device, date
    history.jsonl       how making the edit went, a line per step, if the method trains
    training.png        the loss in it
    effects.csv         predicted and measured change of J of each ablation, if asked for
    table.md, before_after.png, attack.png
    manifest.json       SHA-256 of the above
"""

from __future__ import annotations

import json
import logging
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save

from cad.checks import folder_name
from cad.errors import UserError
from cad.files import file_digest, locked, write_atomically
from cad.identity import LIBRARIES, library_version, short_digest
from cad.places import REPOSITORY
from evaluation.evaluators.base import Record
from evaluation.image_sets import TEMPORARY_FILES

MANIFEST = "manifest.json"
EDIT = "edit.safetensors"
RECORDS = "records.jsonl"
ARRAYS = "arrays.safetensors"
UNFINISHED = ".unfinished"
PACKAGES = (*LIBRARIES, "torchvision", "safetensors", "numpy", "hydra-core")
UNTRACKED = ("wandb",)  # a mirror of the result, not part of it

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResultFolder:
    """The place of one experiment's result under `runs`."""

    runs: Path
    label: str  # "<model>-<concepts>-<edit>", for people
    digest: str  # of what determines the result

    @classmethod
    def of(cls, runs: Path, names: Mapping[str, str], identity: Mapping[str, Any]) -> Self:
        """The folder of what `identity` determines; it begins with `names`, given by their keys.

        Raises UserError for a name that could lead elsewhere.
        """
        for key, name in names.items():
            folder_name(key, name)
        return cls(runs, "-".join(names.values()), short_digest(identity))

    @property
    def name(self) -> str:
        return f"{self.label}-{self.digest}"

    @property
    def final(self) -> Path:
        return self.runs / self.name

    @property
    def work(self) -> Path:
        return self.runs / UNFINISHED / self.name

    def is_complete(self) -> bool:
        """Whether the result is there and every file is as its manifest says."""
        return self.final.is_dir() and not _damaged(self.final)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold this result alone, waiting for another process that does.

        Ask `is_complete` inside: the other may have finished it. The lock goes with the process,
        however that ends (`cad.files`). Raises UserError where the lock's file cannot be made.
        """
        path = self.runs / UNFINISHED / f"{self.name}.lock"
        with locked(path, f"another process is running {self.name}"):
            yield

    def open(self) -> Path:
        """The folder to work in, with what an earlier attempt left there. Call it while `locked`.

        A finished result with missing or altered files is reopened: the intact files stay, unless
        there is a later attempt. Partial files of a killed attempt are deleted.
        """
        if self.final.is_dir():
            damaged = _damaged(self.final)
            logger.warning("%s: damaged or missing %s; made again", self.final, ", ".join(damaged))
            for name in damaged:
                (self.final / name).unlink(missing_ok=True)
            if self.work.exists():
                shutil.rmtree(self.final)
            else:
                self.final.replace(self.work)
        elif self.work.exists() and any(self.work.iterdir()):
            logger.info("resuming %s", self.name)
        self.work.mkdir(parents=True, exist_ok=True)
        for partial in self.work.glob(TEMPORARY_FILES):
            partial.unlink()
        return self.work

    def close(self) -> Path:
        """Write the manifest of the finished work and move it into place. Returns `final`."""
        work = self.work
        write_json(work / MANIFEST, {name: file_digest(work / name) for name in _files(work)})
        work.replace(self.final)
        return self.final


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, written atomically. Refuses NaN, which is not JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, text.encode())


def write_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """`values` as JSON, one line each, written atomically. Refuses NaN, which is not JSON."""
    lines = (json.dumps(each, ensure_ascii=False, allow_nan=False) + "\n" for each in values)
    write_atomically(path, "".join(lines).encode())


def write_records(folder: Path, records: Sequence[Record]) -> None:
    """`records` as RECORDS, one JSON line each; their arrays apart, in ARRAYS, if there are any.

    ARRAYS has a tensor <metric>.<state>.<key> for each key whose values are arrays of one shape, a
    row for each record of that metric and state, in their order.
    """
    lines, arrays = [], dict[str, list[NDArray[np.float32]]]()
    for record in records:
        apart = {key for key, value in record.items() if isinstance(value, np.ndarray)}
        for key in apart:
            name = f"{record['metric']}.{record['state']}.{key}"
            arrays.setdefault(name, []).append(record[key])
        lines.append({key: value for key, value in record.items() if key not in apart})
    write_lines(folder / RECORDS, lines)
    if arrays:
        stacked = {name: np.stack(rows) for name, rows in arrays.items()}
        write_atomically(folder / ARRAYS, save(stacked))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The values of a file with one JSON object a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_json(path: Path) -> Any:
    """The object of a JSON file of results. UserError for a damaged one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete it, and make it again") from error
    return found


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


def _damaged(folder: Path) -> list[str]:
    """Names of the files that are not as the manifest says; the manifest itself if unreadable."""
    try:
        digests = read_json(folder / MANIFEST)
    except (OSError, UserError):
        return [MANIFEST]
    return [MANIFEST] * (not digests) + [
        name
        for name, found in digests.items()
        if not (folder / name).is_file() or file_digest(folder / name) != found
    ]


def _files(folder: Path) -> list[str]:
    names = (p.relative_to(folder) for p in sorted(folder.rglob("*")) if p.is_file())
    return [n.as_posix() for n in names if n.parts[0] not in UNTRACKED and n.name != MANIFEST]
