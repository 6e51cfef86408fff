"""The generator against a plain loop over diffusers' pipeline: the same images, how much sooner.

    python -m experiments.benchmarks.generation
    python -m experiments.benchmarks.generation images_per_class=10 memory_images=2000
    python -m experiments.benchmarks.generation model=sd14 model.weights=random device=cuda

The loop is what one would write by hand: `pipeline(prompt, generator=...)` and `image.save(path)`,
one image after another. Both write PNGs to a temporary folder; both are warmed up first.
"""

from __future__ import annotations

import sys
import tempfile
import time
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
from tqdm import tqdm

from cad.errors import UserError
from cad.models.base import DiffusionModel
from cad.models.pipeline import PipelineModel, Weights
from cad.weight_edit import WeightEdit
from evaluation.generation import SamplerSettings, Watcher, generate
from evaluation.image_sets import ImageSet
from evaluation.prompts import Prompt, build_prompts
from experiments.command_line import exit_status
from experiments.config import register_resolvers
from experiments.rendering import show_table

WARM_UP = 2  # images
MB = 2**20

register_resolvers()


@hydra.main(version_base="1.3", config_path="../../conf", config_name="benchmark_generation")
def main(config: DictConfig) -> None:
    model: PipelineModel = instantiate(config.model.adapter, _convert_="all")
    settings = SamplerSettings(**config.model.sampler)
    prompts = build_prompts(instantiate(config.prompts, _convert_="all"))
    pipeline = plain_pipeline(config, model)
    with tempfile.TemporaryDirectory() as folder:
        compare(model, pipeline, prompts, settings, Path(folder))
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
    folder: Path,
) -> None:
    """Print seconds and images per second of both, and by how much their images differ."""
    loop(pipeline, prompts[:WARM_UP], settings, folder / "warm")
    make(model, prompts[:WARM_UP], settings, folder / "warm")
    before = time.perf_counter()
    pictures = loop(pipeline, prompts, settings, folder / "loop")
    between = time.perf_counter()
    images = make(model, prompts, settings, folder / "generator")
    seconds = {"plain loop": between - before, "generator": time.perf_counter() - between}
    rows = [
        {
            "": name,
            "seconds": f"{taken:.1f}",
            "images per second": f"{len(prompts) / taken:.2f}",
            "ratio": f"{seconds['plain loop'] / taken:.2f}",
        }
        for name, taken in seconds.items()
    ]
    levels = np.abs(np.stack([picture for _, picture in images]).astype(int) - pictures)
    caption = (
        f"{len(prompts)} images by {model.name}, {settings.steps} steps, batches of "
        f"{settings.batch_size}, {model.device.type}, {torch.get_num_threads()} threads; largest "
        f"difference {levels.max()} grey levels, {100 * (levels > 0).mean():.4f} % of values differ"
    )
    show_table(pd.DataFrame(rows), caption)


def loop(
    pipeline: Any,
    prompts: list[Prompt],
    settings: SamplerSettings,
    folder: Path,
) -> NDArray[np.int64]:
    """The images of a plain loop, (N, H, W, 3), each saved as a PNG."""
    folder.mkdir(exist_ok=True)
    made = []
    for index, prompt in enumerate(tqdm(prompts, "plain loop", unit="image", disable=None)):
        image = pipeline(
            prompt.text,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            generator=torch.Generator().manual_seed(prompt.seed),
        ).images[0]
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
