"""Result folders: whole or absent, checked on reuse, mended where damaged."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from record_files import read_records

from cad.errors import UserError
from evaluation.evaluators.base import Record
from experiments.run.results import (
    MANIFEST,
    RECORDS,
    ResultFolder,
    read_json,
    write_json,
    write_records,
)


def finish(folder: ResultFolder, **files: str) -> Path:
    work = folder.open()
    for name, text in files.items():
        (work / name).write_text(text)
    return folder.close()


@pytest.fixture
def folder(tmp_path: Path) -> ResultFolder:
    return ResultFolder(tmp_path / "runs", "mini-church-erase", "0123456789ab")


def test_it_exists_only_when_closed(folder: ResultFolder) -> None:
    work = folder.open()
    (work / "metrics.json").write_text("{}")
    assert not folder.final.exists()
    assert not folder.is_complete()
    assert folder.close() == folder.final
    assert folder.is_complete()
    assert not folder.work.exists()


@pytest.mark.parametrize("harm", ["alter", "delete", "{", "null", "[]", "{}", "5"])
def test_a_damaged_one_is_reopened_with_the_intact_files(folder: ResultFolder, harm: str) -> None:
    final = finish(folder, a="1", b="2")
    if harm == "alter":
        (final / "a").write_text("3")
    elif harm == "delete":
        (final / "a").unlink()
    else:
        (final / MANIFEST).write_text(harm)
    assert not folder.is_complete()
    work = folder.open()
    assert (work / "b").read_text() == "2"
    assert (work / "a").exists() == (harm not in ("alter", "delete"))


def test_a_damaged_one_is_replaced_by_what_an_earlier_attempt_finished(
    folder: ResultFolder,
) -> None:
    (folder.open() / "a").write_text("new")
    folder.final.mkdir()
    (folder.final / "a").write_text("damaged")
    (folder.final / "b").write_text("old")
    assert folder.open() == folder.work
    final = folder.close()
    assert folder.is_complete()
    assert (final / "a").read_text() == "new"
    assert not (final / "b").exists()
    assert [path.name for path in folder.work.parent.iterdir()] == []


def test_what_a_killed_writer_left_is_deleted(folder: ResultFolder) -> None:
    work = folder.open()
    (work / ".metrics.json.abc.tmp").write_text("{")
    assert [path.name for path in folder.open().iterdir()] == []


def test_a_second_process_waits_for_the_first(
    folder: ResultFolder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    order: list[str] = []

    def wait() -> None:
        with folder.locked():
            order.append("second, complete" if folder.is_complete() else "second")

    second = threading.Thread(target=wait)  # flock tells file handles apart, as it does processes
    with folder.locked():
        second.start()
        while "waiting for it" not in caplog.text and second.is_alive():
            time.sleep(0.01)
        order.append("first")
        finish(folder, a="1")
    second.join()
    assert order == ["first", "second, complete"]


def test_the_tracker_s_files_are_no_part_of_it(folder: ResultFolder) -> None:
    final = finish(folder, a="1")
    (final / "wandb").mkdir()
    (final / "wandb" / "run.log").write_text("x")
    assert folder.is_complete()
    assert list(read_json(final / MANIFEST)) == ["a"]


@pytest.mark.parametrize("name", ["../evil", "a/b", "", ".hidden", "a b"])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"model\.adapter\.name=.* is not allowed"):
        ResultFolder.of(tmp_path, {"model.adapter.name": name}, {})


def test_the_name_has_parts_and_the_identity_s_hash(tmp_path: Path) -> None:
    names = {"model.adapter.name": "sd14", "concept.name": "a+b", "edit": "uce"}
    one, other = (ResultFolder.of(tmp_path, names, {"seed": seed}) for seed in (0, 1))
    assert one.name.startswith("sd14-a+b-uce-")
    assert one.digest != other.digest


def test_json_refuses_nan_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "m.json", {"value": float("nan")})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "[]", "null", '{"a": ', "\xff"])
def test_damaged_json_is_named_with_what_to_do(tmp_path: Path, content: str) -> None:
    (tmp_path / "cost.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"cost\.json is damaged .*: delete it, and make it again"):
        read_json(tmp_path / "cost.json")


def test_records_are_lines_of_json_and_their_arrays_apart(tmp_path: Path) -> None:
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    records: list[Record] = [
        {"metric": "accuracy", "state": "before", "group": "é"},
        {"metric": "fid", "state": "before", "features": rows[0]},
        {"metric": "fid", "state": "before", "features": rows[1]},
    ]
    write_records(tmp_path, records)
    lines = (tmp_path / RECORDS).read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == records[0]
    assert json.loads(lines[1]) == {"metric": "fid", "state": "before"}
    found = read_records(tmp_path)
    assert found[0] == records[0]
    assert [row.tolist() for row in (found[1]["features"], found[2]["features"])] == rows.tolist()


def test_records_without_arrays_are_one_file(tmp_path: Path) -> None:
    write_records(tmp_path, [{"metric": "accuracy", "state": "before", "correct": True}])
    assert [path.name for path in tmp_path.iterdir()] == [RECORDS]
    assert read_records(tmp_path)[0]["correct"] is True
