"""Entry point: `python run.py --help` explains what can be asked for."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from tqdm.contrib.logging import logging_redirect_tqdm

from cad.errors import UserError
from experiments.config import check, register_resolvers, settle
from experiments.rendering import show_result
from experiments.results import ResultFolder
from experiments.sweep import note_result

# Read when libraries are imported, which comes later; the last lets errors through to `command`.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HYDRA_FULL_ERROR", "1")
register_resolvers()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """Run one experiment unless it is finished, show it, and mirror it to the logger."""
    check(cfg)
    cfg = settle(cfg)
    tracker = hydra.utils.instantiate(cfg.logger)
    folder = ResultFolder.of(cfg)
    reused = folder.is_complete()
    with logging_redirect_tqdm():
        if not reused:
            from experiments.experiment import run_experiment  # slow to import

            run_experiment(cfg, folder)
        tracker.log(folder.final)
    note_result(Path(HydraConfig.get().runtime.output_dir), folder.final)
    show_result(folder.final, reused=reused)


def command() -> int:
    """Exit status: 0, or 2 after one message for what the user can mend."""
    try:
        main()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        logging.getLogger(__name__).error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(command())
