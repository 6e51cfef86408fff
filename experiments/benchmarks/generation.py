"""The generator against the pipeline, in a plain loop and in batches: the same images, sooner.

    python -m experiments.benchmarks.generation
    python -m experiments.benchmarks.generation rounds=1 memory_images=2000
    python -m experiments.benchmarks.generation model=sd14 model.weights=random device=cuda

The loop is what one would write by hand: `pipeline(prompt, generator=...)` and `image.save(path)`,
one image after another; the pipeline's own batches are as large as the generator's. All write PNGs
to a temporary folder, and take turns.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pandas as pd
import psutil
import torch
from hydra.utils import instantiate
from numpy.typing import NDArray
from omegaconf import DictConfig

from cad.errors import UserError
from cad.models.base import DiffusionModel
from cad.models.pipeline import PipelineModel, Weights
from cad.weight_edit import WeightEdit
from evaluation.generation import SamplerSettings, Watcher, generate
from evaluation.image_sets import ImageSet
from evaluation.prompts import Prompt, build_prompts
from experiments.benchmarks.measuring import alternate, medians, write_benchmark
from experiments.command_line import exit_status
from experiments.config import register_resolvers
from experiments.rendering import show_table

NAME = "generation"
MB = 2**20

register_resolvers()


@hydra.main(version_base="1.3", config_path="../../conf", config_name="benchmark_generation")
def main(config: DictConfig) -> None:
    model: PipelineModel = instantiate(config.model.adapter, _convert_="all")
    settings = SamplerSettings(**config.model.sampler)
    prompts = build_prompts(instantiate(config.prompts, _convert_="all"))
    pipeline = plain_pipeline(config, model)
    with tempfile.TemporaryDirectory() as folder:
        compare(model, pipeline, prompts, settings, config, Path(folder))
        if config.memory_images:
            watch_memory(model, prompts, settings, Path(folder), config.memory_images)


def plain_pipeline(config: DictConfig, model: PipelineModel) -> Any:
    """The pipeline as diffusers loads it, in the model's dtype and on its device."""
    weights = Weights(
        instantiate(config.model.source), config.model.weights, config.model.architecture
    )
    loaded = weights.pipeline(model.pipeline_class, model.name, model.dtype, model.device)
    pipeline = loaded.pipeline
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def compare(
    model: DiffusionModel,
    pipeline: Any,
    prompts: list[Prompt],
    settings: SamplerSettings,
    config: DictConfig,
    folder: Path,
) -> None:
    """Images per second of all three, and by how much the generator's differ from the loop's."""
    fresh = (folder / str(index) for index in itertools.count())  # or nothing would be made
    tasks = {
        "plain loop": lambda: loop(pipeline, prompts, settings, next(fresh)),
        "pipeline's batches": lambda: batches(pipeline, prompts, settings, next(fresh)),
        "generator": lambda: make(model, prompts, settings, next(fresh)),
    }
    seconds = alternate(tasks, config.rounds)
    found = medians(seconds)
    rows = [
        {
            "": name,
            "seconds": round(median, 2),
            "images per second": round(len(prompts) / median, 2),
            "ratio": round(found["plain loop"] / median, 2),
        }
        for name, median in found.items()
    ]
    plain = loop(pipeline, prompts, settings, next(fresh))
    own = np.stack([picture for _, picture in make(model, prompts, settings, next(fresh))])
    levels = np.abs(own.astype(int) - plain)
    caption = (
        f"{len(prompts)} images by {model.name}, {settings.steps} steps, batches of "
        f"{settings.batch_size}, PNGs included: median of {config.rounds}; the generator's differ "
        f"from the loop's in {100 * (levels > 0).mean():.4f} % of the values, by at most "
        f"{levels.max()} grey levels"
    )
    show_table(pd.DataFrame(rows), caption)
    measured = [row | {"rounds": seconds[str(row[""])]} for row in rows]
    write_benchmark(Path(config.output), NAME, caption, measured, model.device, pd.DataFrame(rows))


def loop(
    pipeline: Any,
    prompts: list[Prompt],
    settings: SamplerSettings,
    folder: Path,
) -> NDArray[np.int64]:
    """The images of a plain loop, (N, H, W, 3), each saved as a PNG."""
    return batches(pipeline, prompts, replace(settings, batch_size=1), folder)


def batches(
    pipeline: Any,
    prompts: list[Prompt],
    settings: SamplerSettings,
    folder: Path,
) -> NDArray[np.int64]:
    """The images as the pipeline makes several at once, (N, H, W, 3), each saved as a PNG."""
    folder.mkdir()
    made = []
    for start in range(0, len(prompts), settings.batch_size):
        piece = prompts[start : start + settings.batch_size]
        images = pipeline(
            [prompt.text for prompt in piece],
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            generator=[torch.Generator().manual_seed(prompt.seed) for prompt in piece],
        ).images
        for index, image in enumerate(images, start):
            image.save(folder / f"{index:06d}.png")
            made.append(np.asarray(image, dtype=np.int64))
    return np.stack(made)


def make(
    model: DiffusionModel,
    prompts: list[Prompt],
    settings: SamplerSettings,
    folder: Path,
    watch: Watcher | None = None,
) -> ImageSet:
    """The generator's images of the unedited model."""
    return generate(model, WeightEdit({}, {}), prompts, settings, folder, watch=watch)


@dataclass
class MemoryLog:
    """Resident megabytes of the process after each batch; a `generation.Watcher`."""

    megabytes: list[float]

    def __call__(self, images: NDArray[np.uint8]) -> None:
        self.megabytes.append(psutil.Process().memory_info().rss / MB)


def watch_memory(
    model: DiffusionModel, prompts: list[Prompt], settings: SamplerSettings, folder: Path, n: int
) -> None:
    """Print the memory in each quarter of a run over `n` images. UserError for too few."""
    least = 4 * settings.batch_size
    if n < least:
        raise UserError(f"memory_images={n} is less than four batches: take {least} or more")
    many = [replace(prompts[i % len(prompts)], seed=i) for i in range(n)]
    memory = MemoryLog([])
    make(model, many, settings, folder / "memory", memory)
    rows = [
        {"quarter": quarter + 1, "mean, MB": f"{part.mean():.0f}", "peak, MB": f"{part.max():.0f}"}
        for quarter, part in enumerate(np.array_split(np.array(memory.megabytes), 4))
    ]
    show_table(pd.DataFrame(rows), f"resident memory over {n} images, after each batch")


if __name__ == "__main__":
    sys.exit(exit_status(main))
