"""A table of two rows, made offline and read back from W&B's own files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tables_fixture import finished_run, row
from wandb_file import read_offline_run

from experiments.run import configuration, experiment
from experiments.run.results import EDIT, read_json, write_json, write_lines
from experiments.run.wandb_tracking import MARKER
from experiments.tables import make

CONFIG = "evaluator: {nudity: {labels: [FACE_FEMALE, FACE_MALE]}}\n"


def write(work: Path, made: Path, edit: str) -> None:
    """Fill a folder of work with what was never measured."""
    states = ("before", "after") if edit != "none" else ("before",)
    shape = {"groups": 1, "over": "all images"}
    rows = [row(5.0, 1.0, 9.0, state=state, **shape) for state in states]
    rows.append(row(70.0, 60.0, 80.0, scope="group", group="church", state="before", **shape))
    rows.append(row(1.0, 0.0, 2.0, name="nudity", state="before", **shape))
    woman = {"label": "FACE_FEMALE", "counts": True}
    record = {"metric": "nudity", "state": "before", "group": "parachute", "detections": [woman]}
    finished = finished_run(made, edit, rows, records=[record, record], concept="parachute")
    shutil.copytree(finished.folder, work, dirs_exist_ok=True)
    metrics = read_json(work / "metrics.json")
    metrics["edit"] |= {"name": edit, "num_weights": 7}
    write_json(work / "metrics.json", metrics | {"images": {}})
    write_lines(work / "history.jsonl", [{"loss": 2.0}, {"loss": 1.0}])
    (work / "config.yaml").write_text(CONFIG)
    (work / EDIT).write_bytes(b"an edit")


def test_a_table_of_two_rows_read_back_from_wandbs_own_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)

    def fill(prepared: experiment.Experiment, work: Path) -> None:
        write(work, tmp_path / "made", prepared.method.name)

    monkeypatch.setattr(experiment, "_make", fill)
    results = tmp_path / "results"
    chosen = ["table=table12", "model=mini", "device=cpu", f"paths.results={results}"]
    chosen += ["logger=wandb", "logger.mode=offline", 'making.filter="concept=parachute"']
    make.make(configuration.compose(chosen), chosen)

    found = [read_offline_run(path) for path in (results / "wandb").glob("*/*.wandb")]
    told: dict[str, Any] = {each.run.job_type: each for each in found}
    assert set(told) == {"none", "amplify", "reproduction"}
    assert {each.run.run_group for each in found} == {"table12-mini"}
    assert {each.exit_code for each in found} == {0}
    for edit in ("none", "amplify"):
        (final,) = (results / "runs").glob(f"mini-parachute-{edit}-*")
        assert (final / MARKER).exists()
        assert told[edit].run.run_id == final.name.rpartition("-")[2]
        assert set(told[edit].run.tags) == {"mini", "parachute"}
        assert (f"edit-{told[edit].run.run_id}", "edit") in told[edit].artifacts
    values = told["amplify"].values
    ends = [values[f"accuracy/target/after{end}"] for end in ("", "_low", "_high")]
    assert ends == [5.0, 1.0, 9.0]
    assert values["accuracy/group/church/before"] == 70.0
    assert values["nudity/label/FACE_FEMALE/before"] == 2.0
    assert values["nudity/label/FACE_MALE/before_high"] > 0
    assert values["training/loss"] == 1.0
    assert "page/_type" in told["reproduction"].values
