"""Estimators of the same scores at equal quality: what each costs in time, FLOPs and memory.

    python -m experiments.benchmarks.estimators
    python -m experiments.benchmarks.estimators concept=golf_ball effects.rounds=0

Every trial is an attribution with a seed of its own, compared with references of many samples:
Spearman's rank correlation of all scores, and the share of the reference's mask at the default
ratio that the trial chooses too. `restart`, deterministic, is the released estimator; `shared`
walks once through every timestep. Trials take turns, round by round, so that whatever else the
machine does meets them all. Then some become edits, whose effect runs of `run.py` measure.

Scores are kept below the output folder: a benchmark that was stopped goes on. The times of trials
that were made earlier are theirs; the table says how many there are.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from cad.attribution import Attribution
from cad.concepts import Concept
from cad.edits import ScoredEdit
from cad.errors import UserError
from cad.models.base import DiffusionModel, resolve_device
from cad.score_store import Scored, ScoreStore
from experiments.benchmarks.agreement import agree
from experiments.benchmarks.estimator_costs import FlopCounts, matrix_rate, peak_memory_mb
from experiments.benchmarks.estimator_effects import measured_effects
from experiments.benchmarks.estimator_report import Row, write_effects, write_quality
from experiments.command_line import exit_status
from experiments.config import plain, register_resolvers
from experiments.experiment import build_method, quiet_libraries

SAMPLES = "samples"

log = logging.getLogger(__name__)

register_resolvers()


@dataclass(frozen=True)
class Trial:
    """An estimator at a number of samples, in a round."""

    estimator: str
    round: int
    attribution: Attribution

    @property
    def samples(self) -> int:
        return self.attribution.samples


class Bench:
    """The model, the edit whose scores are estimated, and where they are kept."""

    def __init__(self, config: DictConfig) -> None:
        self.config = config
        self.model: DiffusionModel = instantiate(config.model.adapter, _convert_="all")
        self.concept: Concept = instantiate(config.concept)
        method = build_method(config)
        if not isinstance(method, ScoredEdit):
            raise UserError(f"edit={method.name} has no attribution; allowed: erase, rescale")
        self.method = method
        self.objective = method.objective(self.concept)
        self.store = ScoreStore(Path(config.output) / "scores")

    def scored(self, attribution: Attribution) -> Scored:
        """Scores {name: (out, in)}, from the folder or computed now."""
        return self.store.scored(self.model, self.objective, attribution)

    def attribution(self, settings: Mapping[str, Any], samples: int, seed: int) -> Attribution:
        """The edit's own attribution with other settings. UserError for one that does not exist."""
        try:
            return replace(self.method.attribution, **dict(settings), samples=samples, seed=seed)
        except TypeError as error:
            raise UserError(f"estimators: {error}") from error

    def references(self) -> dict[str, Scored]:
        """By name; the scores that count as the truth."""
        found = {}
        for name, settings in plain(self.config.references).items():
            log.info("reference %s: %s samples", name, settings[SAMPLES])
            own = {key: value for key, value in settings.items() if key not in (SAMPLES, "seed")}
            found[name] = self.scored(
                self.attribution(own, settings[SAMPLES], settings["seed"] + self.config.seed)
            )
        return found

    def trials(self) -> list[Trial]:
        """All of them, a round after another, so that they take turns."""
        return [
            Trial(name, turn, self.attribution(node["settings"], samples, self.config.seed + turn))
            for turn in range(self.config.rounds)
            for name, node in plain(self.config.estimators).items()
            for samples in node[SAMPLES]
        ]


@hydra.main(version_base="1.3", config_path="../../conf", config_name="benchmark_estimators")
def main(config: DictConfig) -> None:
    quiet_libraries()
    check(config)
    bench = Bench(config)
    trials = bench.trials()  # first: what is wrong with them is told before the work
    with logging_redirect_tqdm():
        rows = list(measure(bench, trials, bench.references()))
    write_quality(config, rows, matrix_rate(bench.model.device, bench.model.dtype))
    if config.effects.rounds:
        write_effects(config, measured_effects(config))


def check(config: DictConfig) -> None:
    """Raise UserError for a baseline or effects of estimators that are not among them."""
    known = plain(config.estimators)
    edits = plain(config.effects.estimators) if config.effects.rounds else {}
    for name, samples in [(str(config.baseline), [1]), *edits.items()]:
        if name not in known or not set(samples) <= set(known[name][SAMPLES]):
            tried = ", ".join(f"{each}: {node[SAMPLES]}" for each, node in known.items())
            raise UserError(f"{name} with {samples} samples is not tried; estimators has {tried}")
    if config.effects.rounds > config.rounds:
        raise UserError(
            f"effects.rounds={config.effects.rounds} is more than rounds={config.rounds}"
        )


def measure(
    bench: Bench, trials: Sequence[Trial], references: Mapping[str, Scored]
) -> Iterator[Row]:
    """A row per trial: its cost, and its agreement with every reference."""
    flops = FlopCounts(bench.model, bench.objective)
    memory: dict[tuple[str, int], float] = {}
    for trial in tqdm(trials, "trials", unit="trial", disable=None):
        scored = bench.scored(trial.attribution)
        at_once = min(trial.samples, trial.attribution.batch_size)
        kind = (trial.attribution.trajectory, at_once)
        if kind not in memory:
            memory[kind] = _memory(bench, trial, scored)
        agreement = {
            name: agree(reference.scores, scored.scores, bench.method)
            for name, reference in references.items()
        }
        yield Row(
            estimator=trial.estimator,
            samples=trial.samples,
            round=trial.round,
            seconds=scored.cost.seconds,
            cached=scored.cost.cached,
            tflop=flops.of(trial.attribution) / 1e12,
            memory_mb=memory[kind],
            rank_correlation={name: each.rank_correlation for name, each in agreement.items()},
            mask_overlap={name: each.mask_overlap for name, each in agreement.items()},
        )


def _memory(bench: Bench, trial: Trial, scored: Scored) -> float:
    """Peak megabytes. A CPU process's memory only ever grows, so there a fresh one is asked."""
    if resolve_device(bench.config.device).type == "cuda":
        return scored.cost.peak_memory_mb
    return peak_memory_mb(bench.config, trial.attribution)


if __name__ == "__main__":
    sys.exit(exit_status(main))
