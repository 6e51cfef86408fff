"""A run that dies, or finds the disk full, at each of its writes, one after another, and goes on.

Every file is made by a rename (`cad.files`): each of them is met in a child of this process that
resumes what the one before left. In the end the results have the bytes of a run in peace.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from programs import FORK
from weights import write_weights

from experiments.run.command_line import find_mistake
from experiments.run.configuration import composer
from experiments.run.experiment import Experiment, prepare, run

KILLED, TOLD = 9, 2  # exit status of a child
WRITES = 22  # of the run below
SMALLEST = ("debug=tiny", "limit=2", "evaluator=[accuracy]", "prompts=objects", "logger=none")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("miniature"))


def planned(weights: Path, results: Path) -> Experiment:
    places = [f"paths.miniature={weights}", f"paths.results={results}", "device=cpu"]
    with composer() as compose:
        return prepare(compose([*SMALLEST, *places]))


def contents(results: Path) -> dict[str, bytes]:
    """The files of results that a repetition makes with the same bytes."""
    kept = [*(results / "images").rglob("*.png"), *(results / "images").rglob("*.jsonl")]
    for name in ("edit.safetensors", "records.jsonl", "metrics.json", "before_after.png"):
        kept += (results / "runs").glob(f"*/{name}")
    return {path.relative_to(results).as_posix(): path.read_bytes() for path in kept}


def meet(experiment: Experiment, results: Path, fatal: str, full: bool) -> int | None:
    """Run in a child that ends where `fatal` is to be written; its exit status."""

    def child() -> None:
        renamed = os.replace

        def replace(source: str, target: str) -> None:
            if str(target) == str(results / fatal):
                if not full:
                    os._exit(KILLED)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
            renamed(source, target)

        os.replace = replace  # type: ignore[assignment]
        try:
            run(experiment)
        except Exception as error:
            os._exit(TOLD if find_mistake(error) else 1)
        os._exit(0)

    process = FORK.Process(target=child)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("full", [False, True], ids=["killed", "full disk"])
def test_a_run_survives_an_end_at_each_of_its_writes(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    peace, disturbed = tmp_path / "peace", tmp_path / "disturbed"
    written: list[str] = []
    renamed = os.replace

    def note(source: str, target: str) -> None:
        written.append(Path(target).relative_to(peace).as_posix())
        renamed(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", note)
        run(planned(weights, peace))
    assert len(written) == len({*written}) == WRITES
    experiment = planned(weights, disturbed)
    for each in written:
        assert meet(experiment, disturbed, each, full) == (TOLD if full else KILLED), each
        if full:
            assert not list(disturbed.rglob(".*.tmp"))
    run(experiment)
    assert contents(disturbed) == contents(peace)
