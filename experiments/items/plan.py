"""Which runs there are: every configuration of `run.py` that is wanted is done, missing or refused.

Knows nothing of items: whoever needs results names them by overrides of `run.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from omegaconf import DictConfig
from tqdm import tqdm

from experiments.composing import Compose, composer
from experiments.config import check, settle
from experiments.mistakes import SHOWN, find_mistake
from experiments.results import ResultFolder

LAUNCHER_KEYS = ("hydra/", "hydra.")  # what a multirun is told and a configuration is not

Overrides = tuple[str, ...]
Block = tuple[tuple[str, ...], ...]
"""Values for every place; stands for all their combinations."""


class State(StrEnum):
    """Of a run: its result is there, is not, or cannot be had."""

    DONE = "done"
    MISSING = "missing"
    REFUSED = "refused"


@dataclass(frozen=True, eq=False)
class Run:
    """One run of `run.py`. A refused one has a `reason`, and perhaps no configuration."""

    overrides: Overrides
    state: State
    reason: str = ""
    cfg: DictConfig | None = None  # settled
    result: ResultFolder | None = None

    @property
    def folder(self) -> Path:
        """Where the result is, or will be; only of a run that is not refused."""
        if self.result is None:
            raise LookupError(f"no result folder: {self.reason}")
        return self.result.final

    def looked_up(self) -> Run:
        """The run as it is on disk now."""
        if self.result is None:
            return self
        return replace(self, state=_state(self.result))


def find_runs(wanted: Iterable[Overrides], *, for_gpu: bool = False) -> dict[Overrides, Run]:
    """Each run that is wanted, in order, each once; what `run.py` would refuse is refused here.

    `for_gpu`: as they are where there is a GPU, which this machine need not have.
    """
    distinct = list(dict.fromkeys(wanted))
    with composer() as compose:
        bar = tqdm(distinct, "looking for results", unit="run", leave=False, disable=None)
        return {overrides: _find(overrides, compose, for_gpu) for overrides in bar}


def cartesian_blocks(combinations: Iterable[Overrides]) -> list[Block]:
    """Blocks whose products are the combinations.

    Each combination, a tuple of one length for all, is in exactly one block. A whole product is one
    block; what is not is cut place by place.
    """
    blocks: list[Block] = [tuple((v,) for v in each) for each in dict.fromkeys(combinations)]
    for place in range(len(blocks[0]) if blocks else 0):
        merged: dict[Block, tuple[str, ...]] = {}
        for block in blocks:
            rest = block[:place] + block[place + 1 :]
            merged[rest] = merged.get(rest, ()) + block[place]
        blocks = [(*rest[:place], values, *rest[place:]) for rest, values in merged.items()]
    return blocks


def last_of_each_key(overrides: Iterable[str]) -> Overrides:
    """Overrides without those that a later one of the same key replaces, in the order of keys."""
    return tuple({each.partition("=")[0]: each for each in overrides}.values())


def of_configuration(overrides: Iterable[str]) -> list[str]:
    """Overrides without those for Hydra itself, such as a launcher's settings."""
    return [each for each in overrides if not each.startswith(LAUNCHER_KEYS)]


def _find(overrides: Overrides, compose: Compose, for_gpu: bool) -> Run:
    try:
        cfg = compose("config", of_configuration(overrides))
        check(cfg)
        cfg = settle(cfg, for_gpu=for_gpu)
        result = ResultFolder.of(cfg)
    except SHOWN as error:
        message = find_mistake(error)
        if message is None:
            raise
        return Run(overrides, State.REFUSED, message)
    return Run(overrides, _state(result), "", cfg, result)


def _state(result: ResultFolder) -> State:
    return State.DONE if result.is_complete() else State.MISSING
