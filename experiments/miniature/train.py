"""Train the miniature: `python -m experiments.miniature.train` (all stages, in order).

    python -m experiments.miniature.train stages=[classifier]       one stage
    python -m experiments.miniature.train data.parquet=PATH         a local copy of the photographs
    python -m experiments.miniature.train denoiser.schedule.steps=60000 device=cuda

Every stage resumes from its last checkpoint, and is skipped if it was finished with the same
settings from the same earlier results. With other settings it goes on from where it was; from other
results it refuses to: delete its folder to start it anew.
"""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from cad.checks import seed, texts
from cad.errors import UserError
from cad.models.base import resolve_device
from experiments.miniature.stages import INPUTS, Workshop
from experiments.run.command_line import exit_status

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="../../conf", config_name="programs/miniature")
def main(config: DictConfig) -> None:
    run_stages(config)


def run_stages(config: DictConfig) -> None:
    """Run the stages of `config` that are not done yet, in their order."""
    unknown = set(texts("stages", config.stages)) - set(INPUTS)
    if unknown:
        raise UserError(f"stages={list(config.stages)}: {sorted(unknown)} not in {list(INPUTS)}")
    parts = {stage: instantiate(config[stage], _convert_="all") for stage in config.stages}
    workshop = Workshop(
        folder=Path(config.work).expanduser(),
        parquet=config.data.parquet,
        cache_folder=Path(config.data.cache).expanduser(),
        seed=seed("seed", config.seed),
        device=str(resolve_device(config.device)),
    )
    for stage in INPUTS:
        if stage not in config.stages:
            continue
        settings = OmegaConf.to_container(config[stage], resolve=True)
        if stage != "export" and workshop.is_done(stage, settings):
            log.info("%s: done with these settings, says %s", stage, workshop.report_file)
            continue
        if stage != "export":
            workshop.begin(stage)
        module = importlib.import_module(f"experiments.miniature.{stage}")
        figures = module.run(workshop, **parts[stage])
        workshop.report(stage, settings, figures)


if __name__ == "__main__":
    sys.exit(exit_status(main))
