"""Engines: whichever samples the batches, a set has the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, call

import hydra
import pytest
import torch
from killed_worker import PROMPTS, SETTINGS
from omegaconf import OmegaConf
from toy_model import ToyModel, ToyPretrained, contents, knock_out

from cad.errors import UserError
from evaluation import image_sets, ray_engine
from evaluation.generation import generate
from evaluation.ray_engine import RayEngine, describe_origin, sample_task
from evaluation.sampler import Engine

CONF = Path(__file__).resolve().parents[2] / "conf"


class FakeRay:
    """Ray's interface in one process: the latest task ends first, those that are `dead` never."""

    class RayError(Exception):
        pass

    def __init__(self, cpus: int = 2, dead: Sequence[int] = (), running: bool = False) -> None:
        self.exceptions = self
        self.cpus, self.dead, self.running = cpus, dead, running
        self.sessions = self.most = 0
        self.tasks: list[Callable[[], Any]] = []

    def is_initialized(self) -> bool:
        return self.running

    def init(self, **options: Any) -> None:
        self.sessions, self.running = self.sessions + (not self.running), True

    def shutdown(self) -> None:
        self.running = False

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": self.cpus}

    def put(self, value: object) -> object:
        return value

    def remote(self, **options: Any) -> Callable[[Callable[..., Any]], Any]:
        def submit(function: Callable[..., Any], *args: Any) -> int:
            self.tasks.append(partial(function, *args))
            return len(self.tasks) - 1

        return lambda function: SimpleNamespace(remote=partial(submit, function))

    def wait(self, tasks: list[int], num_returns: int) -> tuple[list[int], list[int]]:
        self.most = max(self.most, len(tasks))
        return tasks[-1:], tasks[:-1]

    def get(self, task: int) -> Any:
        if task in self.dead:
            raise self.RayError("the node died")
        try:
            return self.tasks[task]()
        except UserError as error:
            raise self.RayError(str(error)) from error


@pytest.fixture
def model() -> ToyModel:
    return ToyModel()


@pytest.fixture
def alone(model: ToyModel, tmp_path: Path) -> dict[str, bytes]:
    """The set as one process makes it."""
    return contents(generate(model, PROMPTS, SETTINGS, tmp_path / "alone"))


def on_ray(
    monkeypatch: pytest.MonkeyPatch, ray: FakeRay | None, seed: int = 0, batches: int = 1
) -> Engine:
    monkeypatch.setattr(ray_engine, "ray", ray)
    monkeypatch.setattr(ray_engine, "warm_models", {})
    return RayEngine(ToyPretrained(seed), None, batches, cpus_per_task=1, max_retries=3)


def test_tasks_make_the_bytes_of_one_process_and_few_are_in_flight(model, tmp_path, monkeypatch):
    ray = FakeRay(cpus=1)
    with knock_out(model).applied(model), on_ray(monkeypatch, ray) as engine:
        edited = contents(generate(model, PROMPTS, SETTINGS, tmp_path / "alone"))
        for _ in range(2):  # made, then found
            images = generate(model, PROMPTS, SETTINGS, tmp_path / "ray", engine=engine)
            assert contents(images) == edited
    assert len(ray.tasks) == 6  # batches
    assert ray.most == 2


def test_a_block_is_one_session_and_workers_keep_their_model(model, tmp_path, monkeypatch):
    ray, load = FakeRay(), Mock(return_value=ToyModel())
    monkeypatch.setattr(ToyPretrained, "load", load)
    with on_ray(monkeypatch, ray, batches=4) as engine:
        assert not ray.running  # as long as nothing is to be made
        plain = generate(model, PROMPTS, SETTINGS, tmp_path, engine=engine)
        with knock_out(model).applied(model):
            edited = generate(model, PROMPTS, SETTINGS, tmp_path, engine=engine)
    assert plain.folder != edited.folder
    assert (ray.sessions, ray.running, len(ray.tasks), load.call_count) == (1, False, 4, 1)


def test_what_tasks_leave_out_is_made_here_and_said_so(model, alone, tmp_path, monkeypatch, caplog):
    engine = on_ray(monkeypatch, FakeRay(dead=[0, 2]), batches=2)
    assert contents(generate(model, PROMPTS, SETTINGS, tmp_path, engine=engine)) == alone
    assert caplog.messages == [
        "tasks for images failed: the node died",  # once
        "14 images are missing after all tasks; making them here",
    ]


def test_a_worker_that_would_make_other_images_refuses(model, alone, tmp_path, monkeypatch, caplog):
    engine = on_ray(monkeypatch, FakeRay(), seed=1, batches=8)
    with pytest.raises(UserError, match=r"other images.* another fingerprint. Every machine"):
        sample_task(ToyPretrained(seed=1), describe_origin(model), 1, (), SETTINGS, [])
    assert contents(generate(model, PROMPTS, SETTINGS, tmp_path, engine=engine)) == alone
    assert "22 images are missing after all tasks" in caplog.text


def test_tasks_compute_with_the_threads_of_this_process_and_wait_for_a_device(
    model, tmp_path, monkeypatch, caplog
):
    set_threads = Mock()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch, "set_num_threads", set_threads)
    engine = on_ray(monkeypatch, FakeRay(cpus=0))
    generate(model, PROMPTS[:8], SETTINGS, tmp_path, engine=engine)
    assert set_threads.call_args_list == 2 * [call(7)]
    assert "Ray has no cpu at present: the images wait" in caplog.text


def test_a_session_ends_when_an_image_cannot_be_written(model, tmp_path, monkeypatch):
    ray = FakeRay()
    monkeypatch.setattr(image_sets.ImageWriter, "put", Mock(side_effect=UserError("no")))
    with pytest.raises(UserError, match="no"), on_ray(monkeypatch, ray) as engine:
        generate(model, PROMPTS, SETTINGS, tmp_path, engine=engine)
    assert (ray.sessions, ray.running) == (1, False)


@pytest.mark.parametrize("path", sorted((CONF / "engine").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_engine_is_chosen_by_name(path, monkeypatch):
    monkeypatch.setattr(ray_engine, "ray", FakeRay())
    adapter = {"_target_": "toy_model.ToyPretrained"}
    cfg = OmegaConf.create({"engine": OmegaConf.load(path), "model": {"adapter": adapter}})
    assert isinstance(hydra.utils.instantiate(cfg.engine, _convert_="all"), Engine)


@pytest.mark.parametrize(
    ("ray", "batches", "message"),
    [
        (None, 8, r"engine=ray needs Ray.*pip install -e '\.\[ray\]'"),
        (FakeRay(running=True), 8, r"hydra/launcher=ray.* Choose one"),
        (FakeRay(), 0, r"engine\.batches_per_task=0 is not allowed"),
    ],
)
def test_ray_is_refused_where_it_cannot_work(ray, batches, message, monkeypatch):
    with pytest.raises(UserError, match=message):
        on_ray(monkeypatch, ray, batches=batches)
