"""Attribution in half precision: how far its scores and masks are from float32's.

    python -m experiments.benchmarks.precision
    python -m experiments.benchmarks.precision concept=church model.attribution.samples=4

The same noise, weights and prompts in every precision. Two columns: Spearman's rank correlation of
all scores with those of float32, and how much of the mask that the default ratio chooses is the
same. The yardstick is float32 with other noise: what two runs of one attribution differ by anyway.
Further rows start the backward from gradients of other sizes (`cad.attribution.GRADIENT_RMS`).
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import hydra
import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from cad.attribution import GRADIENT_RMS
from cad.edits import ScoredEdit
from cad.errors import UserError
from cad.models.base import DiffusionModel, resolve_device
from experiments.benchmarks.agreement import Agreement, agree
from experiments.benchmarks.measuring import write_benchmark
from experiments.command_line import exit_status
from experiments.config import register_resolvers
from experiments.experiment import build_method, quiet_libraries
from experiments.rendering import DASH, show_table

REFERENCE = "float32"

register_resolvers()


@hydra.main(version_base="1.3", config_path="../../conf", config_name="benchmark_precision")
def main(config: DictConfig) -> None:
    quiet_libraries()
    rows = compare_precisions(config)
    table = pd.DataFrame(rows)
    caption = (
        f"Attribution of {config.concept.name} in model={config.model.name}, "
        f"{config.model.attribution.samples} samples of {config.model.attribution.steps} steps, "
        f"against {REFERENCE} with the same noise"
    )
    show_table(table, caption)
    device = resolve_device(config.device)
    write_benchmark(Path(config.output), "precision", caption, rows, device, table)


def compare_precisions(config: DictConfig) -> list[dict[str, str]]:
    """One row per edit, precision and size of gradient; the first of an edit is the yardstick."""
    trials = [(REFERENCE, config.seed + 1, GRADIENT_RMS)]
    trials += [
        (dtype, config.seed, rms)
        for dtype in config.dtypes
        for rms in (GRADIENT_RMS, *(2.0**power for power in config.gradient_powers))
    ]
    rows = []
    for edit in config.edits.values():
        config.edit = edit
        reference, method = scored(config, REFERENCE, config.seed)
        for dtype, seed, rms in tqdm(trials, f"edit={method.name}", unit="trial", disable=None):
            start = time.perf_counter()
            agreement = None
            try:
                scores, _ = scored(config, dtype, seed, rms)
                agreement = agree(reference, scores, method)
            except UserError as error:
                tqdm.write(str(error))
            row = {
                "edit": method.name,
                "precision": dtype if seed == config.seed else f"{dtype}, other noise",
                "gradient rms": f"2^{math.log2(rms):.0f}",
            }
            rows.append(row | _cells(agreement, time.perf_counter() - start))
    return rows


def scored(
    config: DictConfig, dtype: str, seed: int, gradient_rms: float = GRADIENT_RMS
) -> tuple[dict[str, Tensor], ScoredEdit]:
    """Scores {name: (out, in)} of the configured edit in a precision, float32, and the edit."""
    config = config.copy()
    config.dtype, config.seed = dtype, seed
    method = build_method(config)
    if not isinstance(method, ScoredEdit):
        raise UserError(
            f"edits: {method.name} has no attribution; allowed: erase, amplify, rescale"
        )
    model: DiffusionModel = instantiate(config.model.adapter, _convert_="all")
    concept = instantiate(config.concept)
    scores = method.attribution.scores(model, method.objective(concept), gradient_rms)
    return {name: score.cpu() for name, score in scores.items()}, method


def _cells(agreement: Agreement | None, seconds: float) -> dict[str, str]:
    if agreement is None:
        return {"rank correlation": "not finite", "mask overlap": DASH, "seconds": f"{seconds:.1f}"}
    return {
        "rank correlation": f"{agreement.rank_correlation:.4f}",
        "mask overlap": f"{agreement.mask_overlap:.4f}",
        "seconds": f"{seconds:.1f}",
    }


if __name__ == "__main__":
    sys.exit(exit_status(main))
