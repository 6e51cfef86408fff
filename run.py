"""Entry point: `python run.py --help` explains what can be asked for."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from tqdm.contrib.logging import logging_redirect_tqdm

from experiments.command_line import USAGE_ERROR, exit_status
from experiments.config import check, parse_shard, register_resolvers, settle
from experiments.mistakes import SHOWN, find_mistake
from experiments.rendering import show_result
from experiments.results import ResultFolder
from experiments.sweep import finish_sweep, note_failure, note_result

# Read when libraries are imported, which comes later.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
register_resolvers()

logger = logging.getLogger(__name__)
failed_jobs: list[Path] = []  # folders of this process's jobs that ended with a mistake


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """One job. A user's mistake is told and noted here, so that a sweep goes on with the others."""
    job_folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        result = run(cfg)
        if result is not None:
            note_result(job_folder, result)
    except SHOWN as error:
        message = find_mistake(error)
        if message is None:
            raise
        logger.error("%s", message)
        note_failure(job_folder, message)
        failed_jobs.append(job_folder)


def run(cfg: DictConfig) -> Path | None:
    """Run one experiment unless it is finished, mirror it to the logger, show it.

    Returns the result's folder; None for a shard, which makes images and no result. Waits for
    another process that runs the same experiment.
    """
    check(cfg)
    cfg = settle(cfg)
    tracker = hydra.utils.instantiate(cfg.logger)
    folder = ResultFolder.of(cfg)
    shard = parse_shard(cfg.shard)
    if shard is not None:
        from experiments.experiment import make_shard  # slow to import

        with logging_redirect_tqdm():
            make_shard(cfg, folder, shard)
        return None
    with folder.locked(), logging_redirect_tqdm():
        reused = folder.is_complete()
        if not reused:
            from experiments.experiment import run_experiment  # slow to import

            run_experiment(cfg, folder)
        tracker.log(folder.final)
    show_result(folder.final, reused=reused)
    return folder.final


def command() -> int:
    """Exit status: 0, or that of a mistake after a message for each that the user can mend."""
    try:
        status = exit_status(main)  # what it tells comes of composing, before any job
    finally:
        failed = finish_sweep()  # launchers run jobs in processes of their own
    return status or (USAGE_ERROR if failed_jobs or failed else 0)


if __name__ == "__main__":
    sys.exit(command())
