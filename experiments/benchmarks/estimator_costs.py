"""What an attribution costs, beside its time: FLOPs, peak memory, and what the machine can do."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from cad.attribution import Attribution
from cad.edits import ScoredEdit
from cad.instrument import measure
from cad.models.base import DiffusionModel
from cad.objectives import Objective
from experiments.config import register_resolvers
from experiments.experiment import build_method, quiet_libraries

SIZES = (512, 1024, 2048)  # of square matrices, larger ones on a GPU
GPU_SIZES = (4096, 8192)
RATE_SECONDS = 0.5  # of multiplying each


class FlopCounts:
    """Counted FLOPs of attributions of one objective; a multiply and an add are two.

    Counted once each: what one sample's state costs, and a guided step without gradient. The rest
    is how many there are.
    """

    def __init__(self, model: DiffusionModel, objective: Objective) -> None:
        self._model = model
        self._objective = objective
        self._units: tuple[float, float, float] | None = None

    def of(self, attribution: Attribution) -> float:
        """FLOPs of `attribution.scores`."""
        if self._units is None:
            self._units = self._count(attribution)
        once, state, guided = self._units
        steps = attribution.steps
        walked = steps * (steps - 1) // 2 if attribution.trajectory == "restart" else 0
        return once + attribution.samples * (steps * state + walked * guided)

    def _count(self, attribution: Attribution) -> tuple[float, float, float]:
        """FLOPs done once (prompts), for a state with its gradient, for a guided step."""
        small = replace(attribution, samples=1, steps=1, trajectory="shared")
        one, two = self._counted(small), self._counted(replace(small, steps=2))
        again = self._counted(replace(small, steps=2, trajectory="restart"))
        return 2 * one - two, two - one, again - two

    def _counted(self, attribution: Attribution) -> float:
        with FlopCounterMode(display=False) as counter:
            attribution.scores(self._model, self._objective)
        return float(counter.get_total_flops())


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """The best FLOP/s of square matrix products on the device, in the dtype."""
    best = 0.0
    for size in GPU_SIZES if device.type == "cuda" else SIZES:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        _multiply(a, b, 0.0)  # warm
        count, seconds = _multiply(a, b, RATE_SECONDS)
        best = max(best, 2 * size**3 * count / seconds)
    return best


def _multiply(a: torch.Tensor, b: torch.Tensor, least: float) -> tuple[int, float]:
    """Products made in at least so many seconds: how many, and how long it took."""
    count, start = 0, time.perf_counter()
    while True:
        product = a @ b
        count += 1
        if a.device.type == "cuda":
            torch.cuda.synchronize(product.device)
        seconds = time.perf_counter() - start
        if seconds >= least:
            return count, seconds


def peak_memory_mb(config: DictConfig, attribution: Attribution) -> float:
    """By how many megabytes a fresh process grows in two steps of the attribution.

    More steps, and batches after the first, need no more.
    """
    short = replace(attribution, steps=2, samples=min(attribution.samples, attribution.batch_size))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_grown_by, OmegaConf.to_yaml(config), asdict(short)).result()


def _grown_by(text: str, settings: dict[str, Any]) -> float:
    register_resolvers()
    quiet_libraries()
    config = OmegaConf.create(text)
    assert isinstance(config, DictConfig)
    model: DiffusionModel = instantiate(config.model.adapter, _convert_="all")
    method = build_method(config)
    assert isinstance(method, ScoredEdit)
    objective = method.objective(instantiate(config.concept))
    with measure(model.device) as meter:
        Attribution(**settings).scores(model, objective)
    return meter.cost.peak_memory_mb
