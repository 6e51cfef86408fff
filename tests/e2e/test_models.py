"""The paper's models as a user runs them, with a whole hub cache and no network.

The cache has the very repositories of conf/model: the published classes and settings, small widths,
random weights. `no_network` ends every process that asks the network.
"""

from __future__ import annotations

import functools
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import programs
import pytest
from hub_cache import write_hub_cache
from huggingface_hub import constants
from programs import FORK, Ended
from record_files import read_records
from standins import write_standins

from cad.errors import UserError
from cad.models.base import DiffusionModel
from cad.models.stable_diffusion import StableDiffusionModel
from cad.places import REPOSITORY
from cad.weight_edit import WeightEdit
from evaluation.evaluators import clip_score  # noqa: F401  slow imports, which children inherit
from experiments.run import experiment  # noqa: F401
from experiments.run.arguments import build
from experiments.run.configuration import compose
from experiments.run.results import read_json

MODELS = ("sd14", "sd21", "sdxl", "sd35")
WITHOUT_UCE = ("sd35",)  # no cross-attention
EDITS = ("erase", "amplify", "uce")
EVALUATORS = ("nudity", "clip_score", "fid")
RESOLUTION = 64  # pixels
LIMIT = 2  # prompts of each set
REFERENCES = 2  # images of the concept for edit=amplify
TIMEOUT = 600  # seconds
MISTAKE = 2  # exit status
NO_NETWORK = Path(__file__).parent / "no_network"
ASKED = 97  # exit status and message of no_network/sitecustomize.py
MESSAGE = "the network was asked"
GATED = ("sd35",)  # run online, without a token, in a process of its own from its first line

ASKING = {
    "a child": """
import multiprocessing, socket, sys
child = multiprocessing.get_context("spawn").Process(
    target=socket.create_connection, args=(("192.0.2.1", 443),)
)
if __name__ == "__main__":
    child.start()
    child.join()
    sys.exit(child.exitcode)
""",
    "weights": """
from cad.models.hub import Source
Source("ORG/NAME", None, None, 1.0, "a licence", False, "", None).locate()
""",
}


@dataclass(frozen=True)
class Bench:
    """The needs of a run without a network."""

    home: Path  # HF_HOME
    standins: list[str]  # overrides


@dataclass(frozen=True)
class Sweep:
    """A multirun that has ended."""

    model: str
    results: Path
    process: Ended | subprocess.CompletedProcess[str]

    def folder(self, edit: str, concept: str = "nudity") -> Path:
        """The one result of an edit."""
        (folder,) = (self.results / "runs").glob(f"{self.model}-{concept}-{edit}-*")
        return folder


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    home = tmp_path_factory.mktemp("hub")
    write_hub_cache(home)
    return Bench(home, write_standins(tmp_path_factory.mktemp("standins")))


def environment(home: Path, **more: str) -> dict[str, str]:
    """This process's, less what could lead to another cache, a token or a proxy."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING_FACE_")) and not name.lower().endswith("_proxy")
    }
    paths = (str(NO_NETWORK), os.environ.get("PYTHONPATH"))
    own = {"HF_HOME": str(home), "OMP_NUM_THREADS": "1", "COLUMNS": "150"}
    return kept | own | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)} | more


def run(command: list[str], home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=REPOSITORY,
        env=environment(home, **more),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def run_model(bench: Bench, model: str, results: Path, *overrides: str) -> Sweep:
    """A multirun; of a gated model as a user starts it, of others offline in a child."""
    small = [f"model.adapter.resolution={RESOLUTION}", f"limit={LIMIT}", "debug=tiny"]
    place = [f"paths.results={results}", "logger=none"]
    command = ["-m", f"model={model}", *overrides, *small, *place, *bench.standins]
    if model in GATED:
        return Sweep(model, results, run(["run.py", *command], bench.home))
    with ProcessPoolExecutor(1, FORK, initializer=cut_off, initargs=(bench.home,)) as pool:
        return Sweep(model, results, pool.submit(programs.run, *command).result())


def cut_off(home: Path) -> None:
    """End this process, or a child of it, when it asks the network."""
    runpy.run_path(str(NO_NETWORK / "sitecustomize.py"))
    os.environ["PYTHONPATH"] = str(NO_NETWORK)
    constants.HF_HUB_CACHE = str(home / "hub")


def told(process: Ended | subprocess.CompletedProcess[str]) -> str:
    """All that a run says."""
    return process.stdout + process.stderr


def load(bench: Bench, model: str) -> DiffusionModel:
    """The bench's model in this process, from the folder that the run found in the cache."""
    source = compose([f"model={model}"]).model.source
    repository = bench.home / "hub" / f"models--{source.repo.replace('/', '--')}"
    snapshot = repository / "snapshots" / source.revision
    own = [f"model={model}", f"model.adapter.resolution={RESOLUTION}", "dtype=float32"]
    own += ["device=cpu", "model.source.repo=null", f"model.source.path={snapshot}"]
    loaded: DiffusionModel = build(compose(own).model.adapter).load()
    return loaded


@pytest.mark.parametrize("code", ASKING.values(), ids=ASKING.keys())
def test_a_process_that_asks_the_network_ends(code: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(code)
    process = run([str(script)], tmp_path, PYTHONPATH=f"{NO_NETWORK}{os.pathsep}{REPOSITORY}")
    assert process.returncode == ASKED, process.stderr
    assert MESSAGE in process.stderr


@pytest.fixture(scope="session")
def sweeps(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Sweep]:
    """A model's multirun over all edits; run once for all tests that look at it."""

    @functools.cache
    def sweep(model: str) -> Sweep:
        results = tmp_path_factory.mktemp(model)
        chosen = ["concept=nudity", f"edit={','.join(EDITS)}", "ratio.value=0.05"]
        chosen += [f"evaluator=[{','.join(EVALUATORS)}]"]
        chosen += [f"model.references.explicit.count={REFERENCES}"]
        return run_model(bench, model, results, *chosen)

    return sweep


def edits_of(model: str) -> tuple[str, ...]:
    return tuple(edit for edit in EDITS if edit != "uce" or model not in WITHOUT_UCE)


@pytest.mark.parametrize("model", MODELS)
def test_nudity_is_edited_and_measured(model: str, sweeps: Callable[[str], Sweep]) -> None:
    sweep = sweeps(model)
    check_end(sweep.process, MISTAKE if model in WITHOUT_UCE else 0)
    source = compose([f"model={model}"]).model.source
    edits = edits_of(model)
    assert len(list((sweep.results / "runs").glob(f"{model}-*"))) == len(edits)
    for edit in edits:
        metrics = read_json(sweep.folder(edit) / "metrics.json")
        assert metrics["edit"]["num_weights"] > 0
        assert metrics["model"]["name"] == model
        assert metrics["model"]["id"] == source.repo
        assert metrics["model"]["revision"] == source.revision
        assert {row["name"] for row in metrics["metrics"]} == set(EVALUATORS)
        assert {row["n"] for row in metrics["metrics"]} == {LIMIT}
        check_images(metrics["images"], sweep.results)
    sets = 2 * (1 + len(edits))  # nudity's and general prompts, without and with each edit
    assert len(list((sweep.results / "images").glob("*/set.json"))) == sets


@pytest.mark.parametrize("model", WITHOUT_UCE)
def test_a_method_that_does_not_apply_is_refused(
    model: str, sweeps: Callable[[str], Sweep]
) -> None:
    lines = told(sweeps(model).process).splitlines()
    (line,) = [line for line in lines if "of the sweep failed" in line]
    assert f"run {EDITS.index('uce')} of the sweep failed" in line
    assert f"model={model}" in line
    assert "uce" in line


@pytest.mark.parametrize("model", MODELS)
def test_the_edits_fit_their_model_and_no_other(
    model: str, sweeps: Callable[[str], Sweep], bench: Bench, tiny_model: StableDiffusionModel
) -> None:
    loaded = load(bench, model)
    for name in edits_of(model):
        edit = WeightEdit.load(sweeps(model).folder(name) / "edit.safetensors")
        with edit.applied(loaded):
            pass
        with pytest.raises(UserError, match="tiny"), edit.applied(tiny_model):
            pass


def test_objects_and_styles_have_their_own_metrics(bench: Bench, tmp_path: Path) -> None:
    both = ("concept=church,van_gogh", "ratio.value=0.05")
    sweep = run_model(bench, "sd14", tmp_path, *both)
    check_end(sweep.process, 0)
    for concept, name, states in (
        ("church", "accuracy", {"before", "after"}),
        ("van_gogh", "lpips", {"after"}),
    ):
        folder = sweep.folder("erase", concept)
        metrics = read_json(folder / "metrics.json")
        assert {row["name"] for row in metrics["metrics"]} == {name}
        assert {row["scope"] for row in metrics["metrics"]} == {"target", "others", "group"}
        records = read_records(folder)
        assert {record["state"] for record in records} == states
        assert len(records) == LIMIT * len(states)


def check_end(process: Ended | subprocess.CompletedProcess[str], status: int) -> None:
    assert process.returncode == status, told(process)
    for words in ("Traceback", MESSAGE):
        assert words not in told(process)


def check_images(images: dict[str, dict[str, dict[str, Any]]], results: Path) -> None:
    """Sets of LIMIT images with finite values, of both kinds of prompts and both states."""
    assert set(images) == {"concept", "general"}
    for sets in images.values():
        assert set(sets) == {"before", "after"}
        for made in sets.values():
            assert (made["count"], made["broken"]) == (LIMIT, 0)
            assert len(list((results / "images" / made["folder"]).glob("*.png"))) == LIMIT
