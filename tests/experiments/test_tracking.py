"""A mirror that cannot be reached never fails a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import wandb
from results_fixture import write_result

from cad.errors import UserError
from experiments.tracking import FOLDER, MARKER, NoTracker, WandbTracker


def test_no_tracker_writes_nothing(tmp_path: Path) -> None:
    folder = write_result(tmp_path)
    before = sorted(folder.iterdir())
    NoTracker().log(folder)
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
    assert "the result folder is complete" in caplog.text


class FakeRun:
    id = "abc"

    def log(self, values: dict[str, object]) -> None:
        self.logged = values


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

    def fail(exit_code: int = 0) -> None:
        raise wandb.errors.CommError("the network went away")

    with monkeypatch.context() as patch:
        patch.setattr(wandb, "finish", fail)
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
