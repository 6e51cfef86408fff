"""A program's configuration for weights that are built in a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig
from weights import write_weights

from experiments.run.configuration import compose


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("miniature"))


@pytest.fixture
def configure(miniature: Path, tmp_path: Path) -> Callable[..., DictConfig]:
    """configure(name, *overrides): results go below the test's folder."""
    places = [f"paths.miniature={miniature}", f"paths.results={tmp_path}"]

    def configure(name: str, *overrides: str) -> DictConfig:
        return compose([*places, "device=cpu", *overrides], name=f"programs/benchmark_{name}")

    return configure
