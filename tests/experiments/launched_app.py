"""A program of conf/config.yaml whose jobs do next to nothing: what becomes of them is tested.

The concept says what: tench dies (SIGKILL), golf_ball raises; else `seen.json` in the job's folder
has the GPU that the job may see, and whether the multirun's launcher waited for it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from experiments.config import register_resolvers
from experiments.sweep import finish_sweep

register_resolvers()


@hydra.main(version_base="1.3", config_path="../../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    folder = Path(HydraConfig.get().runtime.output_dir)
    if cfg.concept.name == "tench":
        os.kill(os.getpid(), signal.SIGKILL)
    if cfg.concept.name == "golf_ball":
        raise ValueError("a bug")
    time.sleep(cfg.seed)  # seconds
    seen = {"gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "model": cfg.model.name}
    (folder / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    try:
        main()
    finally:
        failed = finish_sweep()
    sys.exit(2 if failed else 0)
