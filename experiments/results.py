"""Result folders: whole or absent, addressed by the hash of what determines them.

`<runs>/<name>-<hash>/` appears when its last file is written: an unfinished run works in
`<runs>/.unfinished/<name>-<hash>/`, which is renamed into place, and holds the lock
`<runs>/.unfinished/<name>-<hash>.lock` meanwhile. `manifest.json` has the SHA-256 of every other
file; all are checked on each reuse. Files of a folder:

    config.yaml         the configuration as composed and resolved
    edit.safetensors    the edit (cad.weight_edit)
    records.jsonl       one line per image and metric, before and after the edit
    arrays.safetensors  what of the records is no text, such as features, where there is any
    metrics.json        aggregates with n, interval, unit, direction, version; deterministic
    cost.json           editing time and peak memory: the machine's, hence apart
    environment.json    versions, commit, device, date
    history.jsonl       how making the edit went, a line per step, if the method trains
    training.png        the loss in it
    effects.csv         predicted and measured change of J of each ablation, if asked for
    table.md, before_after.png
    manifest.json       SHA-256 of the above
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig
from safetensors.numpy import load_file, save

from cad import locks
from cad.errors import UserError
from evaluation.evaluators.base import Record
from evaluation.files import write_atomically
from evaluation.image_sets import TEMPORARY_FILES
from experiments.config import short_hash
from experiments.identity import identity

MANIFEST = "manifest.json"
RECORDS = "records.jsonl"
ARRAYS = "arrays.safetensors"
UNFINISHED = ".unfinished"
UNTRACKED = ("wandb",)  # a mirror of the result, not part of it

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResultFolder:
    """The place of one experiment's result under `runs`."""

    runs: Path
    label: str  # "<model>-<concepts>-<edit>", for people
    digest: str  # of the configuration's identity

    @classmethod
    def of(cls, cfg: DictConfig) -> Self:
        """The folder that a settled configuration's result has."""
        concepts = "+".join(concept.name for concept in cfg.concepts.values())
        label = f"{cfg.model.name}-{concepts}-{cfg.edit.name}"
        return cls(Path(cfg.paths.runs), label, short_hash(identity(cfg)))

    @property
    def name(self) -> str:
        return f"{self.label}-{self.digest}"

    @property
    def final(self) -> Path:
        return self.runs / self.name

    @property
    def work(self) -> Path:
        return self.runs / UNFINISHED / self.name

    @property
    def _discarded(self) -> Path:
        """Where a damaged result goes, to be deleted once the new one is in its place."""
        return self.runs / UNFINISHED / f"{self.name}.discarded"

    def is_complete(self) -> bool:
        """Whether the result is there and every file is as its manifest says."""
        return self.final.is_dir() and not _damaged(self.final)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold this result alone, waiting for another process that does.

        Ask `is_complete` inside: the other may have finished it. The lock goes with the process,
        however that ends (`cad.locks`). Raises UserError where the lock's file cannot be made.
        """
        path = self.runs / UNFINISHED / f"{self.name}.lock"
        with locks.locked(path, f"another process is running {self.name}"):
            yield

    def open(self) -> Path:
        """The folder to work in, with what an earlier attempt left there. Call it while `locked`.

        A finished result with missing or altered files is reopened: the intact files stay. Partial
        files of a killed attempt are deleted. Raises UserError where the folder cannot be made.
        """
        try:
            self.work.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        if self.final.is_dir() and not self.work.exists():
            damaged = _damaged(self.final)
            logger.warning("%s: damaged or missing %s; made again", self.final, ", ".join(damaged))
            for name in damaged:
                (self.final / name).unlink(missing_ok=True)
            self.final.replace(self.work)
        elif self.work.exists() and any(self.work.iterdir()):
            logger.info("resuming %s", self.name)
        self.work.mkdir(exist_ok=True)
        for partial in self.work.glob(TEMPORARY_FILES):
            partial.unlink()
        shutil.rmtree(self._discarded, ignore_errors=True)
        return self.work

    def close(self) -> Path:
        """Write the manifest of the finished work and move it into place. Returns `final`.

        A damaged result that is still there makes room and is deleted.
        """
        digests = {name: _sha256(self.work / name) for name in _files(self.work)}
        write_json(self.work / MANIFEST, digests)
        if self.final.exists():
            logger.warning("%s: damaged; replaced by the new result", self.final)
            self.final.replace(self._discarded)
        self.work.replace(self.final)
        shutil.rmtree(self._discarded, ignore_errors=True)
        return self.final

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"paths.results: cannot write to {self.runs} ({error.strerror}); choose another "
            "folder with paths.results=DIR"
        )


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, written atomically. Refuses NaN, which is not JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, text.encode())


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
        plain = {key: value for key, value in record.items() if key not in apart}
        lines.append(json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n")
    write_atomically(folder / RECORDS, "".join(lines).encode())
    if arrays:
        stacked = {name: np.stack(rows) for name, rows in arrays.items()}
        write_atomically(folder / ARRAYS, save(stacked))


def read_records(folder: Path) -> list[Record]:
    """What `write_records` was given."""
    records: list[Record] = read_lines(folder / RECORDS)
    if not (folder / ARRAYS).exists():
        return records
    for name, rows in load_file(folder / ARRAYS).items():
        metric, state, key = name.split(".")
        owners = [r for r in records if (r["metric"], r["state"]) == (metric, state)]
        for record, row in zip(owners, rows, strict=True):
            record[key] = row
    return records


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The values of a file with one JSON object a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_json(path: Path) -> Any:
    """The value of a JSON file of a result folder."""
    return json.loads(path.read_text(encoding="utf-8"))


def _damaged(folder: Path) -> list[str]:
    """Names of the files that are not as the manifest says; the manifest itself if unreadable."""
    try:
        digests = read_json(folder / MANIFEST)
    except (OSError, ValueError):
        return [MANIFEST]
    return [
        name
        for name, digest in digests.items()
        if not (folder / name).is_file() or _sha256(folder / name) != digest
    ]


def _files(folder: Path) -> list[str]:
    names = (p.relative_to(folder) for p in sorted(folder.rglob("*")) if p.is_file())
    return [n.as_posix() for n in names if n.parts[0] not in UNTRACKED and n.name != MANIFEST]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
