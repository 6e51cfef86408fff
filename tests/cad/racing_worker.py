"""Two processes that need the same scores or the same edit at once; writes what each of them did.

python racing_worker.py ROOT: for each kind (scores, edit), once undisturbed and once with the first
process killed (SIGKILL) while it computes. Prints JSON: {"scores": ..., "scores, killed": ...},
each who computed, in order, whether the second found it, and how often it said that it waits.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from linear_toy import LinearObjective, LinearToyModel

from cad import score_store
from cad.attribution import Attribution
from cad.concepts import Concept
from cad.edit_store import EditStore
from cad.edits import Edit, Made
from cad.instrument import Cost
from cad.score_store import Scored, ScoreStore
from cad.weight_edit import Zero

CHURCH = Concept("church", "object", "church", "church")
POLL = 0.01  # seconds

Slow = Callable[[], None]
"""Notes that the process computes, and waits until it may end."""


class SlowEdit(Edit):
    name = "slow"

    def __init__(self, slow: Slow) -> None:
        self.slow = slow

    def settings(self, concepts):
        return {}

    def make(self, model, concepts):
        self.slow()
        return Made({"weight": Zero(torch.arange(1))})


def scores(root: Path, slow: Slow) -> bool:
    def compute(*_):
        slow()
        return Scored({"weight": torch.ones(4, 4)}, Cost(1.0, 1.0))

    score_store.compute_scores = compute
    model, objective = LinearToyModel(), LinearObjective(CHURCH)
    return ScoreStore(root).scored(model, objective, Attribution(steps=1, samples=1)).cost.cached


def edit(root: Path, slow: Slow) -> bool:
    made, _ = EditStore(root).edit(SlowEdit(slow), LinearToyModel(), [CHURCH])
    return made.cost.cached


def until(condition: Callable[[], object]) -> None:
    while not condition():
        time.sleep(POLL)


def work(make: Callable[[Path, Slow], bool], root: Path, name: str) -> None:
    logging.basicConfig(filename=root / f"{name}.log", level=logging.INFO)

    def slow() -> None:
        with (root / "computed").open("a") as file:
            file.write(f"{name}\n")
        until((root / "go").exists)

    found = make(root / "store", slow)
    (root / f"{name}.found").write_text(json.dumps(found))


def race(make: Callable[[Path, Slow], bool], root: Path, killed: bool) -> dict[str, object]:
    root.mkdir()
    fork = multiprocessing.get_context("fork")
    first, second = (fork.Process(target=work, args=(make, root, n)) for n in ("first", "second"))
    log = root / "second.log"
    first.start()
    until((root / "computed").exists)
    second.start()
    until(lambda: log.exists() and "waiting for it" in log.read_text())
    if killed:
        os.kill(first.pid, signal.SIGKILL)
    (root / "go").touch()
    first.join()
    second.join()
    return {
        "computed": (root / "computed").read_text().split(),
        "found": json.loads((root / "second.found").read_text()),
        "told": log.read_text().count("waiting for it"),
        "exits": [first.exitcode, second.exitcode],
        "kept": sorted(path.suffix for path in (root / "store").iterdir()),
    }


def main(root: Path) -> None:
    torch.set_num_threads(1)
    outcomes = {
        f"{make.__name__}{', killed' * killed}": race(
            make, root / f"{make.__name__}-{killed}", killed
        )
        for make in (scores, edit)
        for killed in (False, True)
    }
    sys.stdout.write(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
