"""Entry point: `python run.py --help` explains what can be asked for."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from experiments.run.command_line import exit_status

# Read when libraries are imported, which comes later.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.append(str(Path.cwd()))  # where plug-ins of one's own may be


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> Path | None:
    """One run, whose result's folder is returned; or a table or figure, from many."""
    job = HydraConfig.get()
    if job.runtime.choices["table"] or job.runtime.choices["figure"]:
        from experiments.tables.make import make

        make(cfg, list(job.overrides.task))
        return None
    from experiments.run.configuration import check_overrides
    from experiments.run.experiment import prepare, run  # imports PyTorch, as --help need not

    is_sweep = job.mode == RunMode.MULTIRUN
    prepared = prepare(cfg)
    if not is_sweep:  # whose combinations may leave something out
        check_overrides(cfg, job.overrides.task)
    return run(prepared, f"sweep-{Path(job.sweep.dir).name}" if is_sweep else None)


if __name__ == "__main__":
    sys.exit(exit_status(main))
