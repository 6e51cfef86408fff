"""A mirror that cannot be reached never fails a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import wandb
from results_fixture import write_result

from cad.errors import UserError
from experiments.tracking import FOLDER, NoTracker, WandbTracker


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


def test_a_result_is_mirrored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_result(tmp_path)
    (folder / FOLDER).mkdir()

    def init(**settings: object) -> None:
        raise AssertionError("mirrored twice")

    monkeypatch.setattr(wandb, "init", init)
    WandbTracker("cad", "offline", 1).log(folder)
