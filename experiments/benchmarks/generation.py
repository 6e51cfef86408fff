"""Images per second of the suite's generator and of the diffusers pipeline that it is built on.

    python -m experiments.benchmarks.generation
    python -m experiments.benchmarks.generation model=sd14 model.weights=random device=cuda

The plain loop is written as one would by hand: `pipeline(prompt, generator=...)` and
`image.save(path)`, one image after another. The pipeline's own batches are as large as the
generator's. All three write PNG files to a temporary folder and take turns.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig

from cad.models.pretrained import Pretrained
from evaluation.generation import generate
from evaluation.image_sets import ImageSet
from evaluation.prompts import Prompt, build_prompts
from evaluation.sampler import SamplerSettings
from experiments.benchmarks.measuring import take_turns, write_benchmark
from experiments.run.arguments import build
from experiments.run.command_line import exit_status
from experiments.run.configuration import register_resolvers
from experiments.run.rendering import show_table

register_resolvers()


@hydra.main(
    version_base="1.3", config_path="../../conf", config_name="programs/benchmark_generation"
)
def main(config: DictConfig) -> None:
    pretrained: Pretrained = build(config.model.adapter)
    model, prompts = pretrained.load(), build_prompts(build(config.prompts))
    settings = build(config.model.sampler, SamplerSettings)
    pipeline, _ = pretrained.pipeline(model.device, model.dtype)  # as diffusers loads it
    pipeline.set_progress_bar_config(disable=True)
    with tempfile.TemporaryDirectory() as scratch:  # a set in a folder of its own is made anew

        def loop(batch_size: int) -> NDArray[np.int64]:
            return plain_images(pipeline, prompts, settings, batch_size, scratch)

        def generator() -> ImageSet:
            return generate(model, prompts, settings, Path(tempfile.mkdtemp(dir=scratch)))

        tasks: dict[str, Callable[[], object]] = {
            "plain loop": lambda: loop(1),
            "pipeline's batches": lambda: loop(settings.batch_size),
            "generator": generator,
        }
        measured = take_turns(tasks, config.rounds)
        levels = np.abs(loop(1) - np.stack([image for _, image in generator()]))
    seconds = pd.Series({name: each.median for name, each in measured.items()})
    columns = {"seconds": seconds, "images per second": len(prompts) / seconds}
    columns["ratio"] = seconds.iloc[0] / seconds
    table = pd.DataFrame(columns).round(2).reset_index(names="")
    rows = [{**row, "rounds": measured[row[""]].times} for row in table.to_dict("records")]
    caption = (
        f"{len(prompts)} images by {model.name}, {settings.steps} steps, batches of "
        f"{settings.batch_size}, PNGs included: median of {config.rounds}; the generator's differ "
        f"from the loop's in {100 * (levels > 0).mean():.4f} % of the values, by at most "
        f"{levels.max()} grey levels"
    )
    write_benchmark(Path(config.output) / "generation", caption, rows, table, model.device)
    show_table(table, caption)


def plain_images(
    pipeline: Any,
    prompts: Sequence[Prompt],
    settings: SamplerSettings,
    batch_size: int,
    folder: str,
) -> NDArray[np.int64]:
    """The pipeline's own images, (N, H, W, 3), each saved as a PNG file in the folder."""
    images: list[Any] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        images += pipeline(
            [prompt.text for prompt in batch],
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            generator=[torch.Generator().manual_seed(prompt.seed) for prompt in batch],
        ).images
    for index, image in enumerate(images):
        image.save(Path(folder, f"{index:06d}.png"))
    return np.stack([np.asarray(image, dtype=np.int64) for image in images])


if __name__ == "__main__":
    sys.exit(exit_status(main))
