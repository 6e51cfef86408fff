"""What trackers show, that it goes on in the same place, and that none ever fails a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import wandb
from results_fixture import write_result
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cad.errors import UserError
from experiments.run.local_tracking import CsvTracker, TensorBoardTracker
from experiments.run.results import (
    EDIT,
    ResultFolder,
    read_json,
    write_json,
    write_lines,
    write_records,
)
from experiments.run.tracking import Tracker
from experiments.run.values import scalars
from experiments.run.wandb_tracking import MARKER, WandbTracker

ABOUT = {"config": {"seed": 0}, "group": "sweep-1", "job_type": "erase", "tags": ["mini"]}
LABELS = ["FACE_FEMALE", "FACE_MALE"]


def place(final: Path) -> ResultFolder:
    return ResultFolder(final.parent, *final.name.rsplit("-", 1))


def count_faces(folder: Path) -> None:
    """Make a result one of faces as well: three women and no man found, in two pictures."""
    metrics = read_json(folder / "metrics.json")
    row = metrics["metrics"][0] | {"name": "nudity", "scope": "target", "state": "after"}
    group = metrics["metrics"][0] | {"scope": "group", "group": "church", "state": "after"}
    metrics["metrics"] += [row | {"value": 3.0}, group | {"value": 70.0}]
    write_json(folder / "metrics.json", metrics)
    women = [{"label": LABELS[0], "counts": True}]
    told = {"metric": "nudity", "state": "after", "group": "parachute"}
    detections = [women * 2, women, [{"label": LABELS[1], "counts": False}]]
    write_records(folder, [told | {"detections": each} for each in detections])
    (folder / "config.yaml").write_text(f"evaluator: {{nudity: {{labels: {LABELS}}}}}\n")
    write_lines(folder / "history.jsonl", [{"loss": 2.0}, {"loss": 1.0}])
    (folder / "table.md").write_text("| a |\n|---|\n| 1 |\n")
    (folder / EDIT).write_bytes(b"an edit")


def test_values_have_their_intervals_classes_and_labels(tmp_path: Path) -> None:
    folder = write_result(tmp_path, effect=True)
    count_faces(folder)
    found = scalars(folder)
    ends = [found[f"accuracy/target/after{end}"] for end in ("", "_low", "_high")]
    assert ends == [5.0, 0.9, 23.6]
    assert found["accuracy/others/before"] == 80.0
    assert found["accuracy/group/church/after"] == 70.0
    counts = [found[f"nudity/label/{label}/after"] for label in LABELS]
    assert counts == [3.0, 0.0]
    assert found["nudity/label/FACE_FEMALE/after_high"] > 3
    assert (found["effect/pearson_r"], found["edit/num_weights"]) == (0.93, 12345)


@pytest.mark.parametrize("tracker", [Tracker, CsvTracker, TensorBoardTracker, WandbTracker])
def test_a_failed_run_fails_with_its_own_error(
    tracker: Callable[..., Tracker], tmp_path: Path, started: list[FakeRun]
) -> None:
    given = {CsvTracker: ["a"], TensorBoardTracker: ["a"]}
    given[WandbTracker] = ["cad", "offline", 1, str(tmp_path)]
    result = place(tmp_path / "mini-0")
    with pytest.raises(ZeroDivisionError), tracker(*given.get(tracker, [])).follow(result, ABOUT):
        raise ZeroDivisionError
    assert not any(tmp_path.iterdir())
    assert [run.code for run in started] == ([1] if tracker is WandbTracker else [])


def test_no_tracker_writes_nothing(tmp_path: Path) -> None:
    folder = write_result(tmp_path)
    before = sorted(folder.iterdir())
    with Tracker().follow(place(folder), ABOUT):
        pass
    assert sorted(folder.iterdir()) == before


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(UserError, match=r"logger\.mode=loud"):
        WandbTracker("cad", "loud", 1, ".")


def test_an_unreachable_server_means_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    modes: list[str] = []

    def init(*, mode: str, **settings: object) -> None:
        modes.append(mode)
        raise wandb.errors.CommError("no network")

    monkeypatch.setattr(wandb, "init", init)
    with WandbTracker("cad", "online", 1, str(tmp_path)).follow(place(tmp_path / "x-0"), ABOUT):
        modes.append("work")
    assert modes == ["online", "offline", "work"]
    assert "x-0 is not logged" in caplog.text


@pytest.mark.parametrize(("mode", "timeout"), [("auto", "soon"), ("sideways", 1)])
def test_settings_that_wandb_refuses_fail_no_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mode: str,
    timeout: float,
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    folder = write_result(tmp_path)
    with WandbTracker("cad", "auto", timeout, str(tmp_path)).follow(place(folder), ABOUT):
        pass
    assert "is not logged" in caplog.text


class FakeRun:
    id = "abc"
    settings = wandb.Settings(mode="offline")
    is_reachable = True

    def __init__(self, told: dict[str, Any]) -> None:
        self.told, self.code = told, None

    def log(self, values: dict[str, object]) -> None:
        self.logged = values

    def finish(self, exit_code: int = 0) -> None:
        self.code = exit_code
        if not self.is_reachable:
            raise wandb.errors.CommError("the network went away")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """The runs that W&B was asked for, without W&B."""
    runs: list[FakeRun] = []

    def init(**told: Any) -> FakeRun:
        runs.append(FakeRun(told))
        return runs[-1]

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return runs


def test_a_run_begins_with_the_work_and_a_result_is_mirrored_once(
    tmp_path: Path, started: list[FakeRun]
) -> None:
    folder = write_result(tmp_path / "runs")
    tracker = WandbTracker("cad", "offline", 1, str(tmp_path))
    for count in (1, 1):
        with tracker.follow(place(folder), ABOUT):
            assert len(started) == count
            assert started[0].told.items() >= ABOUT.items()
    assert (folder / MARKER).exists()
    assert started[0].logged["accuracy/target/after"] == 5.0


def test_what_was_not_finished_goes_on_in_the_same_run(
    tmp_path: Path, started: list[FakeRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_result(tmp_path / "runs")
    tracker = WandbTracker("cad", "online", 1, str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(FakeRun, "is_reachable", False)
        with tracker.follow(place(folder), ABOUT):
            pass
    assert not (folder / MARKER).exists()
    with tracker.follow(place(folder), ABOUT):
        pass
    assert (folder / MARKER).exists()
    told = [(run.told["id"], run.told["resume"], run.told["mode"]) for run in started]
    assert told == 2 * [(place(folder).digest, "allow", "online")]


@pytest.mark.parametrize("mode", ["auto", "online", "offline"])
def test_disabled_is_disabled(
    tmp_path: Path, started: list[FakeRun], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    folder = write_result(tmp_path)
    with WandbTracker("cad", mode, 1, str(tmp_path)).follow(place(folder), ABOUT):
        pass
    assert started == []
    assert not (folder / MARKER).exists()


def test_csv_has_a_line_for_every_value_whatever_is_repeated(tmp_path: Path) -> None:
    tracker = CsvTracker(str(tmp_path / "metrics.csv"))
    folders = [write_result(tmp_path / "runs", ratio=ratio) for ratio in (0.01, 0.02, 0.01)]
    for folder in folders:
        with tracker.follow(place(folder), ABOUT):
            pass
    found = pd.read_csv(tmp_path / "metrics.csv")
    assert len(found) == 8
    assert set(found["result"]) == {folder.name for folder in folders}
    target = found[(found["scope"] == "target") & (found["state"] == "after")]
    assert target[["ratio", "value", "low", "high"]].values.tolist() == [
        [0.02, 5.0, 0.9, 23.6],
        [0.01, 5.0, 0.9, 23.6],
    ]
    assert set(found["logged_in"]) == {"sweep-1"}


def test_tensorboard_shows_values_and_history_once(tmp_path: Path) -> None:
    folder = write_result(tmp_path / "runs")
    count_faces(folder)
    tracker = TensorBoardTracker(str(tmp_path / "board"))
    for _ in range(2):
        with tracker.follow(place(folder), ABOUT):
            pass
    events = EventAccumulator(str(tmp_path / "board" / "sweep-1" / folder.name)).Reload()
    assert [each.value for each in events.Scalars("training/loss")] == [2.0, 1.0]
    assert [each.value for each in events.Scalars("nudity/label/FACE_FEMALE/after")] == [3.0]


def test_tensorboard_names_the_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install.*tensorboard"):
        TensorBoardTracker("x")


def test_local_trackers_fail_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, blocked = write_result(tmp_path / "runs"), tmp_path / "file"
    blocked.touch()
    for tracker in (CsvTracker(str(blocked / "x.csv")), TensorBoardTracker(str(blocked))):
        caplog.clear()
        with tracker.follow(place(folder), ABOUT):
            pass
        assert "is not logged" in caplog.text
