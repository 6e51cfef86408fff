"""engine=ray on a cluster of this machine, of which a node dies at work."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_model import ToyModel, ToyPretrained, knock_out

from evaluation.generation import generate
from evaluation.prompts import ObjectPrompts, build_prompts
from evaluation.ray_engine import RayEngine
from evaluation.sampler import SamplerSettings

pytest.importorskip("ray")
pytestmark = pytest.mark.ray

SETTINGS = SamplerSettings(steps=3, guidance=2.0, kind="default", batch_size=2)
PROMPTS = build_prompts(ObjectPrompts({"church": "church", "face": "face"}, 12, seed=0))
DEADLINE = 300  # seconds


@dataclass(frozen=True)
class LargeToy(ToyPretrained):
    """Slow, and of 256 x 256 pixels, so that results go through Ray's object store.

    Leaves a file in `loads` for each process that loads it.
    """

    loads: str = ""

    def load(self, device: str | None = None) -> ToyModel:
        (Path(self.loads) / str(os.getpid())).touch()
        model = super().load(device)
        decode = model.decode_latents

        def decode_latents(x_0: torch.Tensor) -> torch.Tensor:
            time.sleep(0.1)
            return decode(x_0).repeat_interleave(16, dim=2).repeat_interleave(16, dim=3)

        model.decode_latents = decode_latents  # type: ignore[method-assign]
        return model


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that runs no task, and two nodes that run one at a time."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        here, repository = Path(__file__).parent, Path(__file__).resolve().parents[2]
        patch.setenv("PYTHONPATH", f"{repository}{os.pathsep}{here}")  # of the workers
        cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        yield cluster
        cluster.shutdown()


def contents(root: Path) -> dict[str, bytes]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def test_a_node_that_dies_changes_no_byte(cluster, tmp_path, caplog):
    """An unedited and an edited set of 24 images, twelve batches each."""
    loads, alone, shared = (tmp_path / name for name in ("loads", "alone", "shared"))
    loads.mkdir()
    pretrained = LargeToy(loads=str(loads))
    model, seen = pretrained.load(), list[int]()

    def make_both(root: Path, engine: RayEngine | None = None) -> None:
        generate(model, PROMPTS, SETTINGS, root, engine=engine)
        with knock_out(model).applied(model):
            generate(model, PROMPTS, SETTINGS, root, engine=engine)

    def kill_a_node() -> None:
        deadline = time.monotonic() + DEADLINE
        while len(list(shared.rglob("*.png"))) < 12 and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append(len(list(shared.rglob("*.png"))))
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)

    make_both(alone)
    killer = threading.Thread(target=kill_a_node)
    killer.start()
    with (
        caplog.at_level(logging.WARNING),
        RayEngine(pretrained, cluster.address, 2, cpus_per_task=1, max_retries=3) as engine,
    ):
        make_both(shared, engine)
    killer.join()
    assert 12 <= seen[0] < 24
    assert not caplog.messages  # nothing was left for this process
    assert contents(shared) == contents(alone)
    assert 2 <= len(list(loads.iterdir())) <= 4  # this process's, and not one for each of 12 tasks
