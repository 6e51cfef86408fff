"""Train the miniature: `python -m experiments.miniature.train` (all stages, in order).

    python -m experiments.miniature.train stages=[classifier]       one stage
    python -m experiments.miniature.train data.parquet=PATH         a local copy of the photographs
    python -m experiments.miniature.train denoiser.schedule.steps=60000 device=cuda

Every stage resumes from its last checkpoint and skips what is done.
"""

from __future__ import annotations

import importlib
import logging
from pathlib import Path

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from cad.errors import UserError
from experiments.miniature.stages import Workshop

log = logging.getLogger(__name__)

STAGES = ("classifier", "clip", "autoencoder", "latents", "denoiser", "export")


@hydra.main(version_base="1.3", config_path="../../conf", config_name="miniature")
def main(config: DictConfig) -> None:
    run_stages(config)


def run_stages(config: DictConfig) -> None:
    """Run the stages of `config` that are not done yet, in their order."""
    unknown = set(config.stages) - set(STAGES)
    if unknown:
        raise UserError(f"stages={list(config.stages)}: {sorted(unknown)} not in {list(STAGES)}")
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    workshop = Workshop(
        folder=Path(config.work).expanduser(),
        parquet=config.data.parquet,
        cache_folder=Path(config.data.cache).expanduser(),
        seed=config.seed,
        device=device,
    )
    for stage in STAGES:
        if stage not in config.stages:
            continue
        if stage in workshop.reported() and stage != "export":
            log.info("%s: done already (its entry in %s says so)", stage, workshop.report_file)
            continue
        module = importlib.import_module(f"experiments.miniature.{stage}")
        module.run(workshop, **instantiate(config[stage], _convert_="all"))


if __name__ == "__main__":
    main()
