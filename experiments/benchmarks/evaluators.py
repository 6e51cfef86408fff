"""Evaluators: images scored per second, each.

    python -m experiments.benchmarks.evaluators
    python -m experiments.benchmarks.evaluators model=sd14 device=cuda images=256

The images are noise of the model's size: no evaluator's time depends on what an image shows, but
for NudeNet's, whose suppression of overlapping boxes has less to do. Aggregating (FID's distance)
comes once a set and is not counted. An evaluator whose weights are not here is listed with the
reason.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pandas as pd
from hydra.utils import instantiate
from numpy.typing import NDArray
from omegaconf import DictConfig

from cad.models.base import resolve_device
from evaluation.evaluators.base import BATCH_SIZE, GENERAL, Evaluator
from evaluation.prompts import Prompt, build_prompts
from experiments.benchmarks.measuring import alternate, medians, write_benchmark
from experiments.command_line import exit_status
from experiments.config import register_resolvers
from experiments.experiment import quiet_libraries
from experiments.mistakes import SHOWN, find_mistake
from experiments.rendering import DASH, show_table

NAME = "evaluators"
STYLES = ("style_accuracy",)  # evaluators whose groups are styles

log = logging.getLogger(__name__)

register_resolvers()


@hydra.main(version_base="1.3", config_path="../../conf", config_name="benchmark_evaluators")
def main(config: DictConfig) -> None:
    quiet_libraries()
    tasks: dict[str, Callable[[], object]] = {}
    rows: list[dict[str, Any]] = []
    for name, node in config.evaluator.items():
        try:
            evaluator: Evaluator = instantiate(node, _convert_="all")
        except SHOWN as error:
            reason = find_mistake(error)
            if reason is None:
                raise
            log.warning("%s: %s", name, reason)
            rows.append({"evaluator": name, "images per second": DASH, "why": reason})
            continue
        tasks[str(name)] = scoring(evaluator, prompts_for(config, str(name), evaluator), config)
    seconds = alternate(tasks, config.rounds)
    for name, median in medians(seconds).items():
        speed = f"{config.images / median:.1f}"
        rows.append({"evaluator": name, "images per second": speed, "why": ""})
    side = config.model.adapter.resolution
    caption = (
        f"Images scored per second, {config.images} of {side} x {side} pixels at a time, those of "
        f"{config.model.name}: median of {config.rounds}"
    )
    table = pd.DataFrame(rows)
    table = table if table["why"].any() else table.drop(columns="why")
    show_table(table, caption)
    device = resolve_device(config.device)
    write_benchmark(Path(config.output), NAME, caption, [{**row} for row in rows], device, table)


def prompts_for(config: DictConfig, name: str, evaluator: Evaluator) -> list[Prompt]:
    """As many prompts as images, of the kind that the evaluator measures."""
    kind = "style" if name in STYLES else "object"
    node = config.model.prompts[GENERAL if evaluator.measures == GENERAL else kind]
    prompts = build_prompts(instantiate(node, _convert_="all"))
    return [prompts[index % len(prompts)] for index in range(config.images)]


def scoring(
    evaluator: Evaluator, prompts: Sequence[Prompt], config: DictConfig
) -> Callable[[], object]:
    """What scores all images, in the batches that runs have."""
    evaluator.check(prompts)
    side = config.model.adapter.resolution
    random = np.random.default_rng(config.seed)
    pixels: NDArray[np.uint8] = random.integers(
        0, 256, (2, len(prompts), side, side, 3), dtype=np.uint8
    )

    def score() -> None:
        for start in range(0, len(prompts), BATCH_SIZE):
            piece = slice(start, start + BATCH_SIZE)
            pair = pixels[1, piece] if evaluator.paired else None
            evaluator.score(pixels[0, piece], prompts[piece], pair)

    return score


if __name__ == "__main__":
    sys.exit(exit_status(main))
