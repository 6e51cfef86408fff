"""Missing runs as Hydra multiruns of `run.py`: as few as there are cartesian blocks among them."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from cad.errors import UserError
from experiments.config import REPOSITORY, short_hash
from experiments.items.item import Item
from experiments.items.plan import Overrides, Run, cartesian_blocks, of_configuration
from experiments.results import read_json
from experiments.sweep import LINK

PROGRAM = "run.py"
OVERRIDES = Path(".hydra") / "overrides.yaml"  # in a job's folder
SLURM, RAY = "submitit_slurm", "ray"  # launchers whose jobs may run on other machines than this
RAY_ADDRESS = "hydra.launcher.ray.init.address="  # without it Ray is this machine alone
PLUGINS = {  # launcher: what Hydra needs for it, and the extra that has it
    SLURM: ("hydra_submitit_launcher", "slurm"),
    "submitit_local": ("hydra_submitit_launcher", "slurm"),
    RAY: ("hydra_ray_launcher", "ray"),
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Block:
    """Runs that one multirun makes."""

    runs: tuple[Run, ...]
    sweep: Overrides  # "edit=uce,rece": every key with its values

    def command(self, sweeps: Path, launcher: str | None) -> list[str]:
        """What to execute, in the repository's root; its jobs leave their traces in `folder`."""
        chosen = [f"hydra/launcher={launcher}"] if launcher else []
        place = f"hydra.sweep.dir={self.folder(sweeps)}"
        return [sys.executable, PROGRAM, "-m", *self.sweep, *chosen, place]

    def folder(self, sweeps: Path) -> Path:
        return sweeps / short_hash(list(self.sweep))


def blocks(runs: Sequence[Run]) -> Iterator[Block]:
    """The runs in blocks: those whose overrides have the same keys, in cartesian products."""
    by_keys: dict[Overrides, dict[Overrides, Run]] = {}
    for run in runs:
        pairs = [override.partition("=") for override in run.overrides]
        keys, values = tuple(key for key, *_ in pairs), tuple(value for *_, value in pairs)
        by_keys.setdefault(keys, {})[values] = run
    for keys, found in by_keys.items():
        for block in cartesian_blocks(found):
            members = [
                run
                for values, run in found.items()
                if all(value in place for value, place in zip(values, block, strict=True))
            ]
            sweep = tuple(f"{k}={','.join(place)}" for k, place in zip(keys, block, strict=True))
            yield Block(tuple(members), sweep)


def launch(block: Block, sweeps: Path, launcher: str | None) -> dict[Overrides, str]:
    """Run a block and wait for it. Returns why runs failed, by their overrides.

    Its output is shown as it comes. A failed run keeps the others from nothing. Raises UserError
    for a launcher that is not installed.
    """
    check_launcher(launcher)
    command = block.command(sweeps, launcher)
    logger.info("%d run%s: %s", len(block.runs), "s"[: len(block.runs) > 1], " ".join(command[1:]))
    finished = subprocess.run(command, cwd=REPOSITORY, check=False)
    told = _told_failures(block.folder(sweeps), block.runs)
    failed = {}
    for run in block.runs:
        if run.looked_up().state != run.state:
            continue
        log = f"see above, or the logs in {block.folder(sweeps)}"
        otherwise = f"it left no result (exit status {finished.returncode}; {log})"
        failed[run.overrides] = told.get(run.overrides, otherwise)
    return failed


def is_for_gpus_elsewhere(item: Item, config: DictConfig) -> bool:
    """Whether the item's runs get a cluster's GPUs, so that this machine needs none."""
    on_ray = config.launcher == RAY and RAY_ADDRESS in config.overrides
    return (config.launcher == SLURM or on_ray) and not item.sweep.is_miniature


def check_launcher(launcher: str | None) -> None:
    """Raise UserError where the launcher's plugin is one that can be installed, and is not."""
    plugin, extra = PLUGINS.get(launcher or "", ("", ""))
    if plugin and importlib.util.find_spec(f"hydra_plugins.{plugin}") is None:
        raise UserError(
            f"launcher={launcher} needs {plugin.replace('_', '-')}, which is not installed: "
            f".venv/bin/pip install -e '.[{extra}]'"
        )


def _told_failures(folder: Path, runs: Sequence[Run]) -> dict[Overrides, str]:
    """The messages that the jobs left in their folders."""
    told: dict[Overrides, str] = {}
    for link in folder.glob(f"*/{LINK}"):
        error = read_json(link)["error"]
        job = link.parent / OVERRIDES
        if error is None or not job.exists():
            continue
        given = {str(override) for override in OmegaConf.load(job)}
        told |= {
            run.overrides: str(error)
            for run in runs
            if given >= set(of_configuration(run.overrides))
        }
    return told
