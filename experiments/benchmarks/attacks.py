"""Attacks on many prompts at once against one by one: the same tokens, how much sooner.

    python -m experiments.benchmarks.attacks
    python -m experiments.benchmarks.attacks attack=unlearn_diff prompts_attacked=16

Nobody succeeds, so that both go through the whole schedule. They take turns; what is made once for
a run (the edit) is not counted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pandas as pd
from hydra.utils import instantiate
from numpy.typing import NDArray
from omegaconf import DictConfig
from tqdm import tqdm

from cad.models.base import DiffusionModel
from cad.weight_edit import WeightEdit
from evaluation.attacks.base import Attack
from evaluation.attacks.search import Outcome, search
from evaluation.generation import SamplerSettings
from evaluation.prompts import Prompt, build_prompts
from experiments.attacking import build_attacks
from experiments.benchmarks.measuring import alternate, medians, write_benchmark
from experiments.command_line import exit_status
from experiments.config import register_resolvers
from experiments.experiment import build_method, quiet_libraries
from experiments.rendering import show_table

register_resolvers()


@hydra.main(version_base="1.3", config_path="../../conf", config_name="benchmark_attacks")
def main(config: DictConfig) -> None:
    quiet_libraries()
    model: DiffusionModel = instantiate(config.model.adapter, _convert_="all")
    edit = build_method(config)(model, instantiate(config.concept))
    prompts = build_prompts(instantiate(config.prompts, _convert_="all"))
    own = [prompt for prompt in prompts if prompt.group == config.concept.name]
    for attack in build_attacks(config):
        ways = compared_ways(config, model, edit, attack, own[: config.prompts_attacked])
        seconds = alternate(ways, config.rounds)
        write(config, model, attack, ways, medians(seconds))


@dataclass
class Way:
    """Attacks all prompts, `size` at once; keeps what came of it."""

    size: int
    search: Callable[[int], list[Outcome]]
    outcomes: list[Outcome] = field(default_factory=list)

    def __call__(self) -> None:
        self.outcomes = self.search(self.size)


def compared_ways(
    config: DictConfig,
    model: DiffusionModel,
    edit: WeightEdit,
    attack: Attack,
    prompts: Sequence[Prompt],
) -> dict[str, Way]:
    settings = SamplerSettings(**config.model.sampler)

    def attacked(size: int) -> list[Outcome]:
        outcomes: list[Outcome] = []
        own = replace(settings, batch_size=size)
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            silent: tqdm[Any] = tqdm(disable=True)
            outcomes += search(model, edit, attack, batch, own, nobody, silent)
        return outcomes

    return {"one by one": Way(1, attacked), "batched": Way(len(prompts), attacked)}


def write(
    config: DictConfig,
    model: DiffusionModel,
    attack: Attack,
    ways: Mapping[str, Way],
    seconds: Mapping[str, float],
) -> None:
    """Seconds of both ways, and how many prompts end with the same tokens."""
    alone, together = (way.outcomes for way in ways.values())
    same = sum(one.tokens == other.tokens for one, other in zip(alone, together, strict=True))
    table = pd.DataFrame(
        {"": way, "seconds": round(each, 1), "ratio": round(seconds["one by one"] / each, 2)}
        for way, each in seconds.items()
    )
    schedule = attack.schedule
    caption = (
        f"{attack.name} on {len(alone)} prompts, {schedule.timesteps} timesteps of "
        f"{schedule.iterations} iterations, {model.name}: median of {config.rounds}; {same} of "
        f"{len(alone)} end with the same tokens"
    )
    show_table(table, caption)
    rows = [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]
    name = f"attack_{attack.name}"
    write_benchmark(Path(config.output), name, caption, rows, model.device, table)


def nobody(images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[bool]:
    """A judge to whom no image shows anything."""
    return [False] * len(images)


if __name__ == "__main__":
    sys.exit(exit_status(main))
