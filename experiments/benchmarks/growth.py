"""How time and memory grow: attribution and generation against steps, samples, images and width.

    python -m experiments.benchmarks.growth
    python -m experiments.benchmarks.growth rounds=1 'only="attribution*"'

One quantity grows at a time, the others stay at `base`. Each point is a process of its own, since a
process's memory only ever grows; there the work is done once for the peak of memory and `rounds`
times for its time: on a CPU the processor's, which other work on the machine does not lengthen as
it does the wall's, and points cannot take turns. The exponents are slopes of least squares in
log-log: 1 is linear. Another width is the miniature's UNet with random weights, its channels
multiplied; its weights grow with the square.
"""

from __future__ import annotations

import fnmatch
import itertools
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pandas as pd
from diffusers import UNet2DConditionModel
from hydra.utils import instantiate
from matplotlib.figure import Figure as Canvas
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from cad.edits import ScoredEdit
from cad.errors import UserError
from cad.instrument import measure
from cad.models.base import DiffusionModel, resolve_device
from cad.weight_edit import WeightEdit
from evaluation.files import write_atomically
from evaluation.generation import SamplerSettings, generate
from evaluation.prompts import Prompt
from experiments.benchmarks.measuring import write_benchmark
from experiments.command_line import exit_status
from experiments.config import plain, register_resolvers
from experiments.experiment import build_method, quiet_libraries
from experiments.figures.style import BLACK, BLUE, GREEN, ORANGE, PANEL_SIZE, new_canvas, save
from experiments.rendering import show_table

NAME = "growth"
QUANTITIES = {"seconds": "time", "megabytes": "peak memory"}
STYLES = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"))  # of what grows

register_resolvers()


@dataclass(frozen=True)
class Point:
    """Work of some size: the settings that `work` has, one of which is `grows`."""

    work: str  # "attribution" | "generation"
    grows: str  # steps | samples | images | width
    settings: Mapping[str, float]

    @property
    def series(self) -> str:
        return f"{self.work} against {self.grows}"

    @property
    def value(self) -> float:
        return self.settings[self.grows]


@hydra.main(version_base="1.3", config_path="../../conf", config_name="benchmark_growth")
def main(config: DictConfig) -> None:
    points = chosen_points(config)
    text = OmegaConf.to_yaml(config)
    rows = []
    for point in tqdm(points, "points", unit="point", disable=None):
        rows.append({"series": point.series, "value": point.value, **in_a_process(text, point)})
    frame = pd.DataFrame(rows)
    table = exponents(frame)
    caption = (
        f"Growth of attribution and generation, {config.model.name}: exponents of time and of peak "
        f"memory over the range; a process per point, median of {config.rounds}"
    )
    show_table(table, caption)
    folder = Path(config.output)
    write_benchmark(folder, NAME, caption, rows, resolve_device(config.device), table)
    write_atomically(folder / f"{NAME}.png", save(draw(frame, table))["png"])


def chosen_points(config: DictConfig) -> list[Point]:
    """The points of the series whose name matches `only`. UserError if none does."""
    points = [
        Point(str(work), str(grows), {**plain(node.base), str(grows): value})
        for work, node in config.works.items()
        for grows, values in node.grows.items()
        for value in values
    ]
    chosen = [point for point in points if fnmatch.fnmatch(point.series, config.only)]
    if not chosen:
        names = ", ".join(dict.fromkeys(point.series for point in points))
        raise UserError(f"only={config.only} matches none of the series: {names}")
    return chosen


def in_a_process(text: str, point: Point) -> dict[str, float]:
    """What `measured` returns, from a fresh process. `text` is the configuration as YAML."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(measured, text, point).result()


def measured(text: str, point: Point) -> dict[str, float]:
    """Seconds, the median of some rounds, and by how many megabytes the first grew the process."""
    register_resolvers()
    quiet_libraries()
    config = OmegaConf.create(text)
    if not isinstance(config, DictConfig):
        raise TypeError("a configuration is a mapping")
    model: DiffusionModel = instantiate(config.model.adapter, _convert_="all")
    widen(model, point.settings.get("width", 1))
    with tempfile.TemporaryDirectory() as folder:
        work = WORKS[point.work](config, model, point.settings, Path(folder))
        with measure(model.device) as meter:
            next(work)
        seconds = []
        clock = time.process_time if model.device.type == "cpu" else time.perf_counter
        for _ in range(config.rounds):
            start = clock()
            next(work)
            seconds.append(clock() - start)
    return {"seconds": statistics.median(seconds), "megabytes": meter.cost.peak_memory_mb}


def widen(model: DiffusionModel, factor: float) -> None:
    """Give the model a UNet of random weights with `factor` times the channels; 1 leaves it.

    Heads stay as many, so that each is wider.
    """
    if factor == 1:
        return
    unet: Any = model.denoiser
    config = dict(unet.config)
    widths = [int(factor * width) for width in config["block_out_channels"]]
    unet = UNet2DConditionModel.from_config(config | {"block_out_channels": widths})
    model.denoiser = unet.to(model.device, model.dtype).eval().requires_grad_(False)


def attribute(
    config: DictConfig, model: DiffusionModel, settings: Mapping[str, float], folder: Path
) -> Iterator[None]:
    """An attribution each time it is asked."""
    method = build_method(config)
    if not isinstance(method, ScoredEdit):
        raise UserError(f"edit={method.name} has no attribution; allowed: erase, amplify, rescale")
    steps, samples = int(settings["steps"]), int(settings["samples"])
    attribution = replace(method.attribution, steps=steps, samples=samples)
    objective = method.objective(instantiate(config.concept))
    while True:
        attribution.scores(model, objective)
        yield


def make_images(
    config: DictConfig, model: DiffusionModel, settings: Mapping[str, float], folder: Path
) -> Iterator[None]:
    """A new set of images each time it is asked."""
    sampler = SamplerSettings(**plain(config.model.sampler))
    sampler = replace(sampler, steps=int(settings["steps"]))
    text, count = config.concept.prompt, int(settings["images"])
    start = 0
    while True:
        prompts = [Prompt(text, start + index, config.concept.name) for index in range(count)]
        generate(model, WeightEdit({}, {}), prompts, sampler, folder)
        start += count
        yield


Work = Callable[[DictConfig, DiffusionModel, Mapping[str, float], Path], Iterator[None]]
WORKS: dict[str, Work] = {"attribution": attribute, "generation": make_images}


def exponents(frame: pd.DataFrame) -> pd.DataFrame:
    """A row for each series: its range, and the exponents of time and memory."""
    rows: list[dict[str, Any]] = []
    for name, group in frame.groupby("series", sort=False):
        row: dict[str, Any] = {"": name}
        row["from"], row["to"] = f"{group['value'].min():g}", f"{group['value'].max():g}"
        for quantity, words in QUANTITIES.items():
            row[words] = f"{slope(group['value'], group[quantity]):.2f}"
        rows.append(row)
    return pd.DataFrame(rows)


def slope(x: pd.Series[float], y: pd.Series[float]) -> float:
    """Of log y against log x, by least squares."""
    return float(np.polyfit(np.log(np.asarray(x)), np.log(np.maximum(y, 1e-9)), 1)[0])


def draw(frame: pd.DataFrame, table: pd.DataFrame) -> Canvas:
    """A row for each kind of work, time and memory beside each other, relative to the smallest.

    Log-log, a line for each quantity that grows, dotted what would be linear.
    """
    fitted = {str(row[""]): row for _, row in table.iterrows()}
    works = {name: list(group) for name, group in itertools.groupby(fitted, key=work_of)}
    canvas = new_canvas(PANEL_SIZE[0] * len(QUANTITIES), PANEL_SIZE[1] * len(works))
    panels = canvas.subplots(len(works), len(QUANTITIES), squeeze=False)
    for row, (work, names) in zip(panels, works.items(), strict=True):
        for panel, (quantity, words) in zip(row, QUANTITIES.items(), strict=True):
            for name, (colour, marker) in zip(names, STYLES, strict=False):
                group = frame[frame["series"] == name].sort_values("value")
                times = group["value"] / group["value"].iloc[0]
                grown = group[quantity] / group[quantity].iloc[0]
                label = f"{name.rpartition(' ')[2]}: exponent {fitted[name][words]}"
                panel.plot(times, grown, color=colour, marker=marker, label=label)
            most = panel.get_xlim()[1]
            panel.plot([1, most], [1, most], color=BLACK, linestyle=":", linewidth=1)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log", base=2)
            panel.set(title=f"{work}: {words}")
            panel.set(xlabel="times the smallest", ylabel="times that of the smallest")
            for axis in (panel.xaxis, panel.yaxis):
                axis.set_major_formatter("{x:g}")
            panel.legend(fontsize="small")
    return canvas


def work_of(series: str) -> str:
    return series.partition(" ")[0]


if __name__ == "__main__":
    sys.exit(exit_status(main))
