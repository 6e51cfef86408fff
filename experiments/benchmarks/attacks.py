"""Attacks on many prompts at once against one by one: the same tokens, how much sooner.

    python -m experiments.benchmarks.attacks
    python -m experiments.benchmarks.attacks attack=unlearn_diff prompts_attacked=16

Nobody succeeds, so that both go through the whole schedule. Both are warmed up first; what is made
once for a run (the edit) is not counted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import hydra
import numpy as np
import pandas as pd
import torch
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
from experiments.command_line import exit_status
from experiments.config import register_resolvers
from experiments.experiment import build_method
from experiments.rendering import show_table

register_resolvers()


@hydra.main(version_base="1.3", config_path="../../conf", config_name="benchmark_attacks")
def main(config: DictConfig) -> None:
    model: DiffusionModel = instantiate(config.model.adapter, _convert_="all")
    edit = build_method(config)(model, instantiate(config.concept))
    prompts = build_prompts(instantiate(config.prompts, _convert_="all"))
    chosen = [prompt for prompt in prompts if prompt.group == config.concept.name]
    settings = SamplerSettings(**config.model.sampler)
    for attack in build_attacks(config):
        compare(model, edit, attack, chosen[: config.prompts_attacked], settings)


def compare(
    model: DiffusionModel,
    edit: WeightEdit,
    attack: Attack,
    prompts: Sequence[Prompt],
    settings: SamplerSettings,
) -> None:
    """Print seconds of both ways, and how many prompts end with the same tokens."""
    timed(model, edit, attack, prompts[:1], settings, 1)
    alone, seconds_alone = timed(model, edit, attack, prompts, settings, 1)
    together, seconds_together = timed(model, edit, attack, prompts, settings, len(prompts))
    rows = [
        {"": way, "seconds": f"{seconds:.1f}", "ratio": f"{seconds_alone / seconds:.2f}"}
        for way, seconds in (("one by one", seconds_alone), ("batched", seconds_together))
    ]
    same = sum(one.tokens == other.tokens for one, other in zip(alone, together, strict=True))
    schedule = attack.schedule
    caption = (
        f"{attack.name} on {len(prompts)} prompts, {schedule.timesteps} timesteps of "
        f"{schedule.iterations} iterations, {model.name}, {model.device.type}, "
        f"{torch.get_num_threads()} threads; {same} of {len(prompts)} end with the same tokens"
    )
    show_table(pd.DataFrame(rows), caption)


def timed(
    model: DiffusionModel,
    edit: WeightEdit,
    attack: Attack,
    prompts: Sequence[Prompt],
    settings: SamplerSettings,
    size: int,
) -> tuple[list[Outcome], float]:
    """The outcomes, `size` prompts at once, and the seconds that they took."""
    outcomes: list[Outcome] = []
    progress: tqdm[Any] = tqdm(
        total=len(prompts) * attack.schedule.timesteps, desc=f"{size} at once", disable=None
    )
    before = time.perf_counter()
    with progress:
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            own = replace(settings, batch_size=size)
            outcomes += search(model, edit, attack, batch, own, nobody, progress)
    return outcomes, time.perf_counter() - before


def nobody(images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[bool]:
    """A judge to whom no image shows anything."""
    return [False] * len(images)


if __name__ == "__main__":
    sys.exit(exit_status(main))
