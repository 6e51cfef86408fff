"""Nothing is computed by two processes at once, and a killed one keeps nobody waiting."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from cad.errors import UserError
from cad.locks import locked, locked_if_free

TIMEOUT = 170  # seconds
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def races(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    finished = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).parent / "racing_worker.py"),
            str(tmp_path_factory.mktemp("races")),
        ],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    found: dict[str, Any] = json.loads(finished.stdout)
    return found


@pytest.mark.parametrize("kind", ["scores", "edit"])
def test_of_two_processes_one_computes_and_the_other_finds(
    races: dict[str, Any], kind: str
) -> None:
    race = races[kind]
    assert race["computed"] == ["first"]
    assert (race["found"], race["told"], race["exits"]) == (True, 1, [0, 0])


@pytest.mark.parametrize("kind", ["scores", "edit"])
def test_a_killed_holder_lets_the_other_compute(races: dict[str, Any], kind: str) -> None:
    race = races[f"{kind}, killed"]
    assert race["computed"] == ["first", "second"]
    assert (race["found"], race["told"], race["exits"]) == (False, 1, [-9, 0])
    assert race["kept"] == races[kind]["kept"]  # the files of both, and nothing half-made


def test_shared_holders_keep_out_one_who_wants_it_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / ".lock"
    with (
        locked(path, "", shared=True),
        locked(path, "", shared=True),
        locked_if_free(path) as alone,
    ):
        assert not alone
    with locked_if_free(path) as alone:
        assert alone
        with locked_if_free(path) as second:
            assert not second


def test_waiting_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    path = tmp_path / "lock"
    order: list[str] = []

    def wait() -> None:
        with locked(path, "somebody is busy"):
            order.append("second")

    second = threading.Thread(target=wait)  # flock tells file handles apart, as it does processes
    with locked(path, "first"):
        second.start()
        while "waiting" not in caplog.text and second.is_alive():
            pass
        order.append("first")
    second.join()
    assert order == ["first", "second"]
    assert caplog.messages == ["somebody is busy, waiting for it"]


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: object, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(UserError, match=r"No locks available.*paths\.results=DIR.*flock"),
        locked(tmp_path / "lock", ""),
    ):
        pass


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"cannot write to .*file"),
        locked(tmp_path / "file" / "lock", ""),
    ):
        pass
