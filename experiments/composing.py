"""Configurations of conf/ inside a program: what `run.py` would be given for some overrides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from experiments.config import REPOSITORY, register_resolvers

CONF = REPOSITORY / "conf"

Compose = Callable[[str, Sequence[str]], DictConfig]
"""The configuration of a primary config's name and overrides."""


@contextmanager
def composer() -> Iterator[Compose]:
    """Composes configurations of conf/ as the programs do, also inside one of them."""
    register_resolvers()
    GlobalHydra.instance().clear()  # Hydra composes one program's configuration at a time
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        yield lambda name, overrides: hydra.compose(name, list(overrides))
