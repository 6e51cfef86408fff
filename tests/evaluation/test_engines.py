"""Engines: sets made by several processes are those of one, whoever dies."""

from __future__ import annotations

import logging
import sys
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import hydra
import numpy as np
import pytest
import torch
from killed_worker import PROMPTS, SETTINGS
from numpy.typing import NDArray
from toy_builds import Dying, another_model
from toy_model import NO_CHANGE, ToyModel, knock_out

from cad.errors import UserError
from evaluation.engines.base import Engine, Order
from evaluation.engines.local import LocalEngine
from evaluation.engines.on_ray import RayEngine
from experiments.config import REPOSITORY, register_resolvers
from experiments.identity import identity

CONF = REPOSITORY / "conf"


@pytest.fixture
def model() -> ToyModel:
    return ToyModel()


def orders(model: ToyModel, root: Path) -> list[Order]:
    """An unedited and an edited set of 22 images, six batches each."""
    edits = (NO_CHANGE, knock_out(model))
    return [Order(edit, tuple(PROMPTS), SETTINGS, root) for edit in edits]


def contents(root: Path) -> dict[str, bytes]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def forbid_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(process: SpawnProcess) -> NoReturn:
        raise AssertionError("a process was started")

    monkeypatch.setattr(SpawnProcess, "start", start)


def test_two_processes_make_the_bytes_of_one_though_one_dies(
    model: ToyModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for order in orders(model, tmp_path / "alone"):
        order.generate(model)
    engine, wanted = LocalEngine("cpu", processes=2), orders(model, tmp_path / "shared")
    with caplog.at_level(logging.WARNING):  # the second dies when its half of the first set is made
        first, second = engine.make(model, Dying(batches=3), wanted)
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")
    assert caplog.messages == [
        "process 2 of 2 (cpu) ended with exit code -9",
        f"{second.folder}: 10 images are missing after all processes ended; making them in this "
        "one",
    ]
    assert first.missing() == second.missing() == 0
    forbid_processes(monkeypatch)
    engine.make(model, Dying(batches=0), wanted)


def test_alone_it_is_the_plain_call(
    model: ToyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_processes(monkeypatch)
    shown: list[NDArray[np.uint8]] = []
    order = Order(NO_CHANGE, tuple(PROMPTS), SETTINGS, tmp_path, shown.append)
    (images,) = LocalEngine("cpu").make(model, another_model, [order])
    assert np.array_equal(np.concatenate(shown), np.stack([picture for _, picture in images]))


def test_each_visible_gpu_has_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert LocalEngine("cuda").devices() == ["cuda:0", "cuda:1"]
    assert LocalEngine("cuda", 3).devices() == ["cuda:0", "cuda:1", "cuda:0"]
    assert LocalEngine("cuda:1").devices() == ["cuda:1"]


def test_pieces_are_of_shards_that_lack_something(model: ToyModel, tmp_path: Path) -> None:
    order = orders(model, tmp_path)[0]
    pieces = order.pieces(model, 4)
    assert [(piece.shard, piece.missing) for piece in pieces] == [
        ((0, 4), 8),
        ((1, 4), 6),
        ((2, 4), 4),
        ((3, 4), 4),
    ]
    order.make_piece(model, pieces[1])
    assert [piece.shard[0] for piece in order.pieces(model, 4)] == [0, 2, 3]


def test_a_process_that_would_make_another_set_refuses(model: ToyModel, tmp_path: Path) -> None:
    order = orders(model, tmp_path)[0]
    (piece,) = order.pieces(model, 1)
    with pytest.raises(UserError, match=f"ordered were those of {piece.key}"):
        order.make_piece(another_model("cpu"), piece)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", sorted((CONF / "engine").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_engine_is_chosen_by_name_and_changes_no_result(path: Path) -> None:
    if path.stem == "ray":
        pytest.importorskip("ray")
    register_resolvers()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("config", ["device=cpu", "dtype=float32", f"engine={path.stem}"])
        default = hydra.compose("config", ["device=cpu", "dtype=float32"])
    assert isinstance(hydra.utils.instantiate(cfg.engine), Engine)
    assert identity(cfg) == identity(default)


def test_no_process_at_all_is_refused() -> None:
    with pytest.raises(UserError, match=r"engine\.processes=0 .* at least 1"):
        LocalEngine("cpu", processes=0)


@pytest.mark.parametrize(
    ("ray", "batches", "message"),
    [
        (None, 8, r"engine=ray needs Ray.*pip install -e '\.\[ray\]'"),
        (SimpleNamespace(is_initialized=lambda: True), 8, r"hydra/launcher=ray.* Choose one"),
        (SimpleNamespace(is_initialized=lambda: False), 0, r"engine\.batches_per_task=0 must be"),
    ],
)
def test_ray_is_refused_where_it_cannot_work(
    ray: object, batches: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(UserError, match=message):
        RayEngine(None, batches, cpus_per_task=1, max_retries=3)
