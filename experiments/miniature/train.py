"""Train the miniature: `python -m experiments.miniature.train teacher=FOLDER` (all stages).

    ... stages=[classifier]                                           one stage
    ... data.parquet=PATH                                             a copy of the photographs
    ... device=cuda denoiser.schedule.steps=400000                    as long as it is worth
    ... denoiser.schedule.steps=0 denoiser.schedule.decay=6000        finish, from where it is

Every stage resumes from its last checkpoint, and is skipped if it was finished with the same
settings from the same earlier results. With other settings it goes on from where it was; from other
results it refuses to: delete its folder to start it anew.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from cad.checks import seed, texts
from cad.errors import UserError
from cad.models.base import resolve_device
from experiments.miniature import (
    autoencoder,
    classifier,
    clip,
    decoder,
    denoiser,
    export,
    teacher,
    vision,
)
from experiments.miniature.training import INPUTS, Workshop
from experiments.run.command_line import exit_status

log = logging.getLogger(__name__)

RUN: dict[str, Callable[..., dict[str, Any]]] = {
    "selector": partial(classifier.run, stage="selector"),
    "clip": clip.run,
    "latents": teacher.run_latents,
    "denoiser": denoiser.run,
    "autoencoder": autoencoder.run,
    "classifier": partial(classifier.run, stage="classifier"),
    "judge": partial(classifier.run, stage="judge"),
    "decoder": decoder.run,
    "vision": vision.run,
    "export": export.run,
}


@hydra.main(version_base="1.3", config_path="../../conf", config_name="programs/miniature")
def main(config: DictConfig) -> None:
    run_stages(config)


def run_stages(config: DictConfig) -> None:
    """Run the stages of `config` that are not done yet, in their order."""
    unknown = set(texts("stages", config.stages)) - set(INPUTS)
    if unknown:
        raise UserError(f"stages={list(config.stages)}: {sorted(unknown)} not in {list(INPUTS)}")
    parts = {stage: instantiate(config[stage], _convert_="all") for stage in config.stages}
    workshop = open_workshop(config)
    for stage in [each for each in INPUTS if each in config.stages]:
        settings = OmegaConf.to_container(config[stage], resolve=True)
        if stage != "export":  # which is quick, and done each time
            if workshop.is_done(stage, settings):
                log.info("%s: done with these settings, says report.json", stage)
                continue
            workshop.begin(stage)
        figures = RUN[stage](workshop, **parts[stage])
        workshop.report(stage, settings, figures)


def open_workshop(config: DictConfig) -> Workshop:
    """The work folder with what `config` says of data, seed and device."""
    return Workshop(
        folder=Path(config.work).expanduser(),
        parquet=config.data.parquet,
        cache_folder=Path(config.data.cache).expanduser(),
        seed=seed("seed", config.seed),
        device=str(resolve_device(config.device)),
    )


if __name__ == "__main__":
    sys.exit(exit_status(main))
