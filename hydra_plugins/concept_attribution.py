"""The package in which Hydra looks for plugins: the launchers of `experiments.launchers`."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.plugins.search_path_plugin import SearchPathPlugin

from experiments import launchers


class SlurmLauncher(launchers.SlurmLauncher):
    """hydra/launcher=submitit_slurm."""


class LocalLauncher(launchers.LocalLauncher):
    """hydra/launcher=submitit_local."""


class RayLauncher(launchers.RayLauncher):
    """hydra/launcher=ray."""


class OwnConfigurations(SearchPathPlugin):
    """Those of conf/hydra/launcher stand for the ones of the same name that come with plugins.

    Else Hydra would take the latter for their schemas, and refuse the keys that these lack.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        registered = ConfigStore.instance().repo.get("hydra", {}).get("launcher", {})
        for name in ("submitit_slurm.yaml", "submitit_local.yaml", "ray.yaml"):
            registered.pop(name, None)
