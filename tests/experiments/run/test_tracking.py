"""A mirror that cannot be reached never fails a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import wandb
from results_fixture import write_result

from cad.errors import UserError
from experiments.run.tracking import FOLDER, MARKER, Tracker, WandbTracker


def test_no_tracker_writes_nothing(tmp_path: Path) -> None:
    folder = write_result(tmp_path)
    before = sorted(folder.iterdir())
    Tracker().log(folder)
    assert sorted(folder.iterdir()) == before


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(UserError, match=r"logger\.mode=loud"):
        WandbTracker("cad", "loud", 1)


def test_an_unreachable_server_means_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    modes: list[str] = []

    def init(*, mode: str, **settings: object) -> None:
        modes.append(mode)
        raise wandb.errors.CommError("no network")

    monkeypatch.setattr(wandb, "init", init)
    WandbTracker("cad", "online", 1).log(write_result(tmp_path))
    assert modes == ["online", "offline"]
    assert "its files are complete" in caplog.text


@pytest.mark.parametrize(("mode", "timeout"), [("auto", "soon"), ("sideways", 1)])
def test_settings_that_wandb_refuses_fail_no_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mode: str,
    timeout: float,
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    WandbTracker("cad", "auto", timeout).log(write_result(tmp_path))
    assert "skipped" in caplog.text


class FakeRun:
    id = "abc"
    settings = wandb.Settings(mode="offline")
    is_reachable = True

    def log(self, values: dict[str, object]) -> None:
        self.logged = values

    def finish(self) -> None:
        if not self.is_reachable:
            raise wandb.errors.CommError("the network went away")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modes that W&B was started in, without W&B."""
    modes: list[str] = []

    def init(*, mode: str, **settings: object) -> FakeRun:
        modes.append(mode)
        return FakeRun()

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "finish", lambda exit_code=0: None)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return modes


def test_a_result_is_mirrored_once(tmp_path: Path, started: list[str]) -> None:
    folder = write_result(tmp_path)
    for _ in range(2):
        WandbTracker("cad", "offline", 1).log(folder)
    assert started == ["offline"]
    assert (folder / FOLDER / MARKER).exists()


def test_what_was_not_finished_is_mirrored_again(
    tmp_path: Path, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_result(tmp_path)

    with monkeypatch.context() as patch:
        patch.setattr(FakeRun, "is_reachable", False)
        WandbTracker("cad", "online", 1).log(folder)
    assert (folder / FOLDER).exists()
    WandbTracker("cad", "online", 1).log(folder)
    assert started == ["online", "online"]


@pytest.mark.parametrize("mode", ["auto", "online", "offline"])
def test_disabled_is_disabled(
    tmp_path: Path, started: list[str], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    folder = write_result(tmp_path)
    WandbTracker("cad", mode, 1).log(folder)
    assert started == []
    assert not (folder / FOLDER).exists()
