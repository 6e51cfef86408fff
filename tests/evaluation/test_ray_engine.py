"""engine=ray on a cluster of this machine, of which a node dies at work."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import hydra
import pytest
import torch
from weights import write_weights

from cad.models.base import DiffusionModel
from cad.weight_edit import WeightEdit, Zero
from evaluation.engines import on_ray
from evaluation.engines.base import Engine, Order
from evaluation.generation import SamplerSettings
from evaluation.prompts import ObjectPrompts, build_prompts
from experiments.config import REPOSITORY, plain, register_resolvers
from experiments.experiment import ModelBuild

pytest.importorskip("ray")
pytestmark = pytest.mark.ray

SETTINGS = SamplerSettings(steps=15, guidance=2.0, kind="default", batch_size=2)
PROMPTS = build_prompts(ObjectPrompts({"church": "church", "face": "face"}, 12, seed=0))
DEADLINE = 300  # seconds


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that runs no task, and two nodes that run one at a time."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> ModelBuild:
    weights = write_weights(tmp_path_factory.mktemp("miniature"))
    register_resolvers()
    overrides = [f"paths.miniature={weights}", "device=cpu", "dtype=float32"]
    with hydra.initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        return ModelBuild(json.dumps(plain(hydra.compose("config", overrides).model.adapter)))


def configured(address: str) -> Engine:
    overrides = ["engine=ray", f"engine.address={address}", "engine.batches_per_task=2"]
    with hydra.initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        cfg = hydra.compose("config", overrides)
    engine: Engine = hydra.utils.instantiate(cfg.engine, _convert_="all")
    return engine


def orders(model: DiffusionModel, root: Path) -> list[Order]:
    """An unedited and an edited set of 24 images, twelve batches each."""
    name = next(name for name, weight in model.denoiser.named_parameters() if weight.dim() == 2)
    changes = ({}, {name: Zero(torch.arange(50))})
    edits = [WeightEdit(each, {"model": model.provenance()}) for each in changes]
    return [Order(edit, tuple(PROMPTS), SETTINGS, root) for edit in edits]


def contents(root: Path) -> dict[str, bytes]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def test_a_node_that_dies_changes_no_byte(
    cluster: Any,
    build: ModelBuild,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = build("cpu")
    for order in orders(model, tmp_path / "alone"):
        order.generate(model)
    shared, seen = tmp_path / "shared", list[int]()

    def kill_a_node() -> None:
        deadline = time.monotonic() + DEADLINE
        while len(list(shared.rglob("*.png"))) < 12 and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append(len(list(shared.rglob("*.png"))))
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)

    killer = threading.Thread(target=kill_a_node)
    killer.start()
    with caplog.at_level(logging.WARNING):
        configured(cluster.address).make(model, build, orders(model, shared))
    killer.join()
    assert 12 <= seen[0] < 48
    assert not caplog.messages  # nothing was left for this process
    assert contents(shared) == contents(tmp_path / "alone")

    def session(address: str) -> NoReturn:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(on_ray, "_session", session)
    configured(cluster.address).make(model, build, orders(model, shared))
