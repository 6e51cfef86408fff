"""Estimators of the same scores at equal quality: what each costs in time, FLOPs and memory.

    python -m experiments.benchmarks.estimators
    python -m experiments.benchmarks.estimators concept=golf_ball rounds=3

Every trial is an attribution with a seed of its own, compared with references of many samples:
Spearman's rank correlation of all scores, and the share of the reference's mask at the default
ratio that the trial chooses too. `restart`, deterministic, is the released estimator but for
its pairing (`cad.trajectories`), which costs one guided step more for every timestep; `shared`
walks once through every timestep. Trials take turns, round by round, so that other load on the
machine meets them all.

Scores are kept below the output folder, so a stopped benchmark goes on where it was, with the times
that trials took then; the caption says how many there are.
"""

from __future__ import annotations

import functools
import multiprocessing
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
import pandas as pd
import torch
from omegaconf import DictConfig
from scipy.stats import spearmanr
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from cad.attribution import Attribution, attribute
from cad.edits import ScoredEdit
from cad.errors import UserError
from cad.files import write_atomically
from cad.models.base import DiffusionModel
from cad.models.pretrained import Pretrained
from cad.objectives import Objective
from cad.store import Store
from cad.trajectories import ALL
from experiments.benchmarks import estimator_report as report
from experiments.benchmarks.measuring import timer, write_benchmark
from experiments.run.command_line import exit_status
from experiments.run.configuration import plain, register_resolvers
from experiments.run.experiment import prepare
from experiments.run.rendering import show_table

SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}  # rows of the matrices multiplied

register_resolvers()


@dataclass(frozen=True)
class Trial:
    """An estimator at a number of samples, in a round."""

    estimator: str
    round: int
    attribution: Attribution


@hydra.main(
    version_base="1.3", config_path="../../conf", config_name="programs/benchmark_estimators"
)
def main(config: DictConfig) -> None:
    experiment = prepare(config)
    method = experiment.method
    if not isinstance(method, ScoredEdit):
        raise UserError(f"edit={method.name} has no attribution; choose erase, amplify or rescale")
    trials = list_trials(config, method.attribution)  # first: mistakes are told before the work
    model, objective = experiment.model.load(), method.objective(experiment.concepts[0])
    scored = functools.partial(attribute, model, objective, store=Store(f"{config.output}/scores"))
    flops = flop_counter(model, objective, method.attribution)
    memory = functools.cache(functools.partial(peak_memory_mb, experiment.model, objective))
    rows = []
    with logging_redirect_tqdm():
        references = {
            name: scored(change(method.attribution, settings)).scores
            for name, settings in plain(config.references).items()
        }
        for trial in tqdm(trials, "trials", unit="trial", disable=None):
            found = scored(trial.attribution)
            row = {
                "estimator": trial.estimator,
                "samples": trial.attribution.samples,
                "round": trial.round,
                "seconds": found.cost.seconds,
                "cached": found.cost.cached,
                "tflop": flops(trial.attribution) / 1e12,
                "memory_mb": memory(shorten(trial.attribution)),
            }
            for name, reference in references.items():
                for quality, value in agree(reference, found.scores, method).items():
                    row[f"{quality}.{name}"] = value
            rows.append(row)
    write(config, rows, model)


def list_trials(config: DictConfig, attribution: Attribution) -> list[Trial]:
    """All trials, one round after another. UserError if one sample of the baseline is not there."""
    trials = [
        Trial(name, turn, change(attribution, settings | {"samples": count, "seed": seed}))
        for turn, seed in enumerate(range(attribution.seed, attribution.seed + config.rounds))
        for name, settings in plain(config.estimators).items()
        for count in settings["samples"]
    ]
    name = config.baseline
    if not any((trial.estimator, trial.attribution.samples) == (name, 1) for trial in trials):
        raise UserError(f"baseline={name} needs estimators.{name}.samples=[1]")
    return trials


def change(attribution: Attribution, settings: Mapping[str, Any]) -> Attribution:
    """The attribution with other settings. UserError for one that does not exist."""
    try:
        return replace(attribution, **settings)
    except TypeError as error:
        raise UserError(f"estimators, references: {error}") from error


def flop_counter(
    model: DiffusionModel, objective: Objective, attribution: Attribution
) -> Callable[[Attribution], float]:
    """A function that tells the FLOPs of an attribution; a multiply and an add are two.

    Three short attributions are counted: they tell the cost of the prompts, of a state with its
    gradient, and of a guided step without one. The rest is how many of each there are.
    """

    def count(steps: int, trajectory: str) -> float:
        short = replace(attribution, samples=1, steps=steps, trajectory=trajectory)
        with FlopCounterMode(display=False) as counter:
            short.scores(model, objective)
        return float(counter.get_total_flops())

    one, two = count(1, "shared"), count(2, "shared")
    state, guided = two - one, count(2, "restart") - two

    def flops(whole: Attribution) -> float:
        counted = whole.counted()
        beyond = {"restart": 0, "released": 1}.get(whole.trajectory)
        walked = counted.start if beyond is None else sum(i + beyond for i in counted)
        return one - state + whole.samples * (len(counted) * state + walked * guided)

    return flops


def agree(
    reference: Mapping[str, Tensor], other: Mapping[str, Tensor], method: ScoredEdit
) -> dict[str, float]:
    """How far scores {name: (out, in)} of the same weights agree, at most 1.

    "rank_correlation" is Spearman's, over all scores; "mask_overlap" is the share of the weights
    which `method` would choose by the reference that it chooses by the other scores, too.
    """
    flat = [torch.cat([each[name].flatten() for name in reference]) for each in (reference, other)]
    masks = [method.selection.indices(each, method.sign) for each in (reference, other)]
    chosen = sum(len(indices) for indices in masks[0].values())
    shared = masks[0].keys() & masks[1].keys()
    both = sum(int(torch.isin(masks[0][name], masks[1][name]).sum()) for name in shared)
    return {"rank_correlation": float(spearmanr(*flat).statistic), "mask_overlap": both / chosen}


def shorten(attribution: Attribution) -> Attribution:
    """Two steps of one batch: further steps and batches need no more memory than these."""
    samples = min(attribution.samples, attribution.batch_size)
    return replace(attribution, steps=2, stage=ALL, samples=samples, seed=0)


def peak_memory_mb(pretrained: Pretrained, objective: Objective, attribution: Attribution) -> float:
    """Peak memory of an attribution in a process of its own: a process never shrinks on a CPU."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_peak_memory_mb, pretrained, objective, attribution).result()


def _peak_memory_mb(
    pretrained: Pretrained, objective: Objective, attribution: Attribution
) -> float:
    return attribute(pretrained.load(), objective, attribution).cost.peak_memory_mb


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """The best FLOP/s of products of square matrices on the device, in the dtype."""
    best = 0.0
    for size in SIZES[device.type]:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        found = timer(functools.partial(torch.matmul, a, b)).blocked_autorange(min_run_time=0.5)
        best = max(best, 2 * size**3 / found.median)
    return best


def write(config: DictConfig, rows: Sequence[Mapping[str, Any]], model: DiffusionModel) -> None:
    """Write estimators.md, .json and .png, and who is as good for less in a table of its own."""
    summary = report.summarise(pd.DataFrame(rows))
    references, baseline = list(config.references), config.baseline
    rate = matrix_rate(model.device, model.dtype)
    what = f"{config.concept.name} in model={model.name}, {config.component} weights"
    caption = (
        f"Attribution of {what}: medians of time and means of quality over {config.rounds} rounds, "
        f"{sum(row['cached'] for row in rows)} of {len(rows)} times from an earlier run; the "
        f"machine multiplies matrices at {rate / 1e9:.0f} GFLOP/s"
    )
    path = Path(config.output) / "estimators"
    costs = report.cost_table(summary, references, rate, baseline)
    write_benchmark(path, caption, rows, costs, model.device)
    show_table(costs, caption)
    equal = report.equal_quality_table(summary, references, baseline)
    caption = f"The cheapest that is at least as good, of {what}"
    path_of_equal = path.with_name(f"{path.name}_equal_quality")
    write_benchmark(path_of_equal, caption, equal.to_dict("records"), equal, model.device)
    show_table(equal, caption)
    write_atomically(path.with_suffix(".png"), report.draw(summary, references[0]))


if __name__ == "__main__":
    sys.exit(exit_status(main))
