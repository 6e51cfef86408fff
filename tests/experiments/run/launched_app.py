"""A program of conf/config.yaml whose jobs do next to nothing: what becomes of them is tested.

The concept says what: tench dies (SIGKILL), golf_ball is refused, gas_pump has a bug; the others
leave `seen.json` in the job's folder.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cad.errors import UserError
from experiments.run.command_line import exit_status


@hydra.main(version_base="1.3", config_path="../../../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    if cfg.concept.name == "tench":
        os.kill(os.getpid(), signal.SIGKILL)
    if cfg.concept.name == "golf_ball":
        raise UserError("golf balls are refused")
    if cfg.concept.name == "gas_pump":
        raise ValueError("a bug")
    if cfg.concept.name == "chain_saw":
        raise KeyboardInterrupt
    folder = Path(HydraConfig.get().runtime.output_dir)
    (folder / "seen.json").write_text(json.dumps({"ratio": cfg.ratio.value}))


if __name__ == "__main__":
    sys.exit(exit_status(main))
