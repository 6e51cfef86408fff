"""Edits as values: what a sweep over ratios, and selecting, applying, undoing, storing them cost.

    python -m experiments.benchmarks.edits

The sweep is on the miniature: scores once, then a selection for each ratio. The edit's own costs
are also measured on SD-1.4's feed-forward weights at the paper's ratio, with random weights and
random scores: neither time nor size depends on their values.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import hydra
import pandas as pd
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from cad.components import component_weights
from cad.edits import ScoredEdit
from cad.errors import UserError
from cad.models.base import DiffusionModel, resolve_device
from cad.score_store import compute_scores
from cad.selection import Selection
from cad.weight_edit import WeightEdit
from experiments.benchmarks.measuring import alternate, medians, write_benchmark
from experiments.command_line import exit_status
from experiments.composing import composer
from experiments.config import check, register_resolvers, settle
from experiments.experiment import build_method, quiet_libraries
from experiments.rendering import show_table

MS = 1000
MB = 1e6  # bytes

register_resolvers()


@hydra.main(version_base="1.3", config_path="../../conf", config_name="benchmark_edits")
def main(config: DictConfig) -> None:
    quiet_libraries()
    folder, device = Path(config.output), resolve_device(config.device)
    model, method, concept = build(config, config.sweep_model)
    sweep = sweep_costs(model, method, method.objective(concept), config)
    caption = f"A sweep over {len(config.ratios)} ratios, {model.name}: median of {config.rounds}"
    show_table(pd.DataFrame(sweep), caption)
    write_benchmark(folder, "sweep", caption, sweep, device, pd.DataFrame(sweep))
    rows = []
    for name in config.models:
        model, method, _ = build(config, name)
        rows.append(edit_costs(model, method, config.rounds))
    caption = f"An edit at the model's default ratio: median of {config.rounds}, milliseconds"
    show_table(pd.DataFrame(rows), caption)
    write_benchmark(folder, "edits", caption, rows, device, pd.DataFrame(rows))


def build(config: DictConfig, name: str) -> tuple[DiffusionModel, ScoredEdit, Any]:
    """The model, shipped or of random weights, its edit and the concept."""
    node = config.models[name]
    with composer() as compose:
        cfg = compose("config", [*node.overrides, "logger=none", f"device={config.device}"])
    check(cfg)
    cfg = settle(cfg)
    method = build_method(cfg)
    if not isinstance(method, ScoredEdit):
        raise UserError(f"models.{name}: edit={method.name} has no attribution")
    model: DiffusionModel = instantiate(cfg.model.adapter, _convert_="all")
    return model, method, instantiate(cfg.concept)


def sweep_costs(
    model: DiffusionModel, method: ScoredEdit, objective: Any, config: DictConfig
) -> list[dict[str, Any]]:
    """One ratio; many from the same scores; and many as if each had its own attribution."""
    ratios = list(config.ratios)

    def select(chosen: list[float]) -> None:
        scores = compute_scores(model, objective, method.attribution).scores
        for ratio in chosen:
            Selection(ratio, method.selection.per).indices(scores, method.sign)

    tasks = {"one ratio": lambda: select(ratios[:1]), "all ratios": lambda: select(ratios)}
    found = medians(alternate(tasks, config.rounds))
    one = found["one ratio"]
    apart = f"{len(ratios)} attributions (calculated)"
    return [
        {"": name, "seconds": round(seconds, 2), "times one ratio": round(seconds / one, 2)}
        for name, seconds in (found | {apart: len(ratios) * one}).items()
    ]


def edit_costs(model: DiffusionModel, method: ScoredEdit, rounds: int) -> dict[str, Any]:
    """Milliseconds of every step of an edit's life, its weights and megabytes."""
    weights = component_weights(model, method.attribution.component)
    scores = random_scores(weights)
    seconds: dict[str, list[float]] = {}

    @contextmanager
    def timed(step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds.setdefault(step, []).append(time.perf_counter() - start)

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        path = Path(folder) / "edit.safetensors"
        for _ in range(rounds + 1):  # the first is not counted
            with timed("select"):
                indices = method.selection.indices(scores, method.sign)
            changes = {name: method.change(each.int()) for name, each in indices.items()}
            made = WeightEdit(changes, {"model": model.provenance()})
            with timed("apply"):
                stack.enter_context(made.applied(model))
            with timed("undo"):
                stack.close()
            with timed("save"):
                made.save(path)
            with timed("load"):
                WeightEdit.load(path)
        size = path.stat().st_size / MB
    found = medians({step: each[1:] for step, each in seconds.items()})
    return {
        "model": model.name,
        "may change": sum(weight.numel() for weight in weights.values()),
        "weights": made.num_weights,
        "file, MB": round(size, 3),
        **{step: round(MS * each, 1) for step, each in found.items()},
    }


def random_scores(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores {name: (out, in)} of the weights' shapes, half of them positive."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(weight.flatten(1).shape, generator=generator).to(weight.device)
        for name, weight in weights.items()
    }


if __name__ == "__main__":
    sys.exit(exit_status(main))
