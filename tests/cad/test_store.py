"""Scores and edits on disk: made once, told apart, made again when damaged, by one process only."""

from __future__ import annotations

import copy
import errno
import fcntl
import json
import logging
import multiprocessing
import os
import time
from dataclasses import replace

import pytest
import torch
from linear_toy import LinearObjective, LinearToyModel
from safetensors import SafetensorError

from cad import attribution, store
from cad.attribution import Attribution, attribute
from cad.edits import Edit, make_edit
from cad.errors import UserError
from cad.files import locked
from cad.identity import describe_runtime
from cad.instrument import Cost
from cad.objectives import EraseObjective
from cad.store import DamagedFileError, Store, read_tensors, write_tensors
from cad.weight_edit import WeightEdit, Zero

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor([1, 2])}
SETTINGS = Attribution(steps=2, samples=1)


class Counting(Edit):
    """Zeroes as many weights of the first parameter as `count` says; counts how often."""

    name = "counting"

    def __init__(self, count):
        self.count = count
        self.calls = self.cleaned = 0

    def settings(self, concepts):
        return {"count": self.count}

    def clean_up(self, model, concepts):
        self.cleaned += 1

    def make(self, model, concepts):
        self.calls += 1
        name = next(name for name, _ in model.denoiser.named_parameters())
        history = ({"step": 1, "loss": 0.5},)
        return WeightEdit({name: Zero(torch.arange(self.count))}, {}, Cost(7.0, 3.0), history)


def toy_scores(root, concept):
    return attribute(LinearToyModel(), LinearObjective(concept), SETTINGS, Store(root))


def suffixes(folder):
    return sorted(path.suffix for path in folder.iterdir())


def damages(whole: bytes) -> dict[str, bytes]:
    return {
        "truncated": whole[: len(whole) // 2],
        "tensor": whole[:-1] + bytes([whole[-1] ^ 1]),
        "header": whole.replace(b"noted", b"toned"),
        "foreign": b"something else",
        "empty": b"",
    }


def test_a_file_has_the_same_bytes_whatever_the_order_and_comes_back(tmp_path):
    write_tensors(tmp_path / "one" / "file", TENSORS, {"y": [1, None], "x": 0.1}, "test/1")
    turned = {name: TENSORS[name].clone() for name in reversed(TENSORS)}
    write_tensors(tmp_path / "two", turned, {"x": 0.1, "y": (1, None)}, "test/1")
    assert (tmp_path / "one" / "file").read_bytes() == (tmp_path / "two").read_bytes()
    header, tensors = read_tensors(tmp_path / "two", "test/1")
    assert header == {"x": 0.1, "y": [1, None], "format": "test/1"}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    with pytest.raises(DamagedFileError, match=r"is not a test/2 file: its format is 'test/1'"):
        read_tensors(tmp_path / "two", "test/2")


@pytest.mark.parametrize("damage", damages(b" "))
def test_altered_files_are_refused(tmp_path, damage):
    path = tmp_path / "file"
    write_tensors(path, TENSORS, {"key": "noted"}, "test/1")
    path.write_bytes(damages(path.read_bytes())[damage])
    with pytest.raises(DamagedFileError, match="damaged"):
        read_tensors(path, "test/1")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("disk is full")]
)
def test_a_full_disk_is_told_with_a_remedy(tmp_path, parachute, monkeypatch, error):
    def refuse(*_):
        raise error

    monkeypatch.setattr(store, "save_file", refuse)
    with pytest.raises(UserError, match=r"cannot write to .*(No space|full).*paths\.results=DIR"):
        toy_scores(tmp_path, parachute)
    assert suffixes(tmp_path) == [".lock"]


def test_scores_are_computed_once_and_keep_their_cost(tmp_path, parachute, monkeypatch):
    first = toy_scores(tmp_path, parachute)
    monkeypatch.setattr(Attribution, "scores", None)  # calling it would be an error
    again = toy_scores(tmp_path, parachute)
    assert torch.equal(again.scores["weight"], first.scores["weight"])
    assert again.cost == replace(first.cost, cached=True)
    assert suffixes(tmp_path) == [".json", ".lock", ".safetensors"]
    noted = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert noted["key"]["attribution"] == SETTINGS.settings()


@pytest.mark.parametrize("damage", ["truncated", "tensor", "foreign", "empty", "notes"])
def test_damaged_scores_are_reported_and_made_again(tmp_path, parachute, caplog, damage):
    first = toy_scores(tmp_path, parachute)
    path = next(tmp_path.glob("*.json" if damage == "notes" else "*.safetensors"))
    whole = path.read_bytes()
    path.write_bytes(b"[]" if damage == "notes" else damages(whole)[damage])
    with caplog.at_level(logging.WARNING):
        again = toy_scores(tmp_path, parachute)
    assert "damaged" in caplog.text
    assert not again.cost.cached
    assert torch.equal(again.scores["weight"], first.scores["weight"])
    assert toy_scores(tmp_path, parachute).cost.cached


def test_the_key_of_scores_holds_all_that_matters(
    tmp_path, tiny_model, parachute, church, monkeypatch
):
    monkeypatch.setattr(Attribution, "scores", lambda *_: {"w": torch.ones(1)})

    def made(model=tiny_model, concept=parachute, weighting="model", **settings):
        objective = EraseObjective(concept, weighting)
        attribute(model, objective, replace(SETTINGS, **settings), Store(tmp_path))
        return len(list(tmp_path.glob("*.safetensors")))

    larger = copy.copy(tiny_model)
    larger.resolution, larger.latent_shape = 128, (4, 16, 16)
    others = [
        {},
        {"concept": church},
        {"concept": replace(parachute, base_prompt="a photo")},
        {"model": LinearToyModel()},
        {"model": larger},
        {"weighting": "epsilon"},
        {"seed": 1},
        {"steps": 3},
        {"component": "attn1"},
        {"trajectory": "restart"},
    ]
    for count, other in enumerate(others, start=1):
        assert made(**other) == count
    assert made(concept=replace(parachute, name="chute")) == count  # the prompts are what counts
    for changed in ({"device": "cuda"}, {"versions": {"torch": "0"}}):
        there = describe_runtime("cpu") | changed
        monkeypatch.setattr(attribution, "describe_runtime", lambda device, there=there: there)
        count += 1
        assert made() == count


def test_an_edit_is_made_once_with_its_cost_and_history(tmp_path, tiny_model, church):
    method, kept = Counting(3), Store(tmp_path)
    made, path = make_edit(method, tiny_model, [church], kept)
    again, same = make_edit(method, tiny_model, [church], kept)
    assert (method.calls, path) == (1, same)
    assert method.cleaned == 2  # also where a process was killed before it
    assert again.fingerprint == made.fingerprint
    assert (made.cost, again.cost) == (Cost(7.0, 3.0), Cost(7.0, 3.0, cached=True))
    assert json.dumps(again.history) == json.dumps(made.history) == '[{"step": 1, "loss": 0.5}]'
    alone, nowhere = make_edit(method, tiny_model, [church])
    assert (alone.fingerprint, nowhere) == (made.fingerprint, None)


def test_all_that_determines_an_edit_is_in_its_place(tmp_path, tiny_model, church, parachute):
    newer = Counting(3)
    newer.version = 2
    kept = Store(tmp_path)
    places = {make_edit(method, tiny_model, [church], kept)[1] for method in (Counting(4), newer)}
    for concepts in ([church], [parachute], [church, parachute]):
        places.add(make_edit(Counting(3), tiny_model, concepts, kept)[1])
    assert len(places) == 5


@pytest.mark.parametrize("damage", ["edit", "notes", "notes_gone"])
def test_a_damaged_edit_is_made_again(tmp_path, tiny_model, church, damage, caplog):
    method, kept = Counting(3), Store(tmp_path)
    made, path = make_edit(method, tiny_model, [church], kept)
    notes = path.with_suffix(".json")
    if damage == "edit":
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    elif damage == "notes":
        notes.write_text("{}")
    else:
        notes.unlink()
    again, _ = make_edit(method, tiny_model, [church], kept)
    assert method.calls == 2
    assert again.fingerprint == made.fingerprint
    assert ("damaged" in caplog.text) == (damage != "notes_gone")


def until(condition):
    while not condition():
        time.sleep(0.01)


def take(root, name):
    """Take a file from a store, or note that this process makes it, and wait for `go`."""
    logging.basicConfig(filename=root / f"{name}.log", level=logging.INFO, force=True)

    def make():
        with (root / "made").open("a") as file:
            file.write(f"{name} ")
        until((root / "go").exists)
        return f"made by {name}"

    def write(path, text):
        path.write_text(text)
        return {}

    found, _ = Store(root / "store").get_or_make({}, "it", lambda p, _: p.read_text(), make, write)
    (root / f"{name}.found").write_text(found)


@pytest.mark.parametrize("killed", [False, True])
def test_of_two_processes_one_makes_it_and_a_killed_one_keeps_nobody_waiting(tmp_path, killed):
    fork, log = multiprocessing.get_context("fork"), tmp_path / "second.log"
    first, second = (fork.Process(target=take, args=(tmp_path, n)) for n in ("first", "second"))
    first.start()
    until((tmp_path / "made").exists)
    second.start()
    until(lambda: log.exists() and "waiting for it" in log.read_text())
    if killed:
        first.kill()
    (tmp_path / "go").touch()
    for process in (first, second):
        process.join()
    assert [first.exitcode, second.exitcode] == [-9 if killed else 0, 0]
    assert (tmp_path / "made").read_text() == ("first second " if killed else "first ")
    assert (tmp_path / "second.found").read_text() == f"made by {'second' if killed else 'first'}"
    assert log.read_text().count("waiting for it") == 1
    assert suffixes(tmp_path / "store") == [".json", ".lock", ".safetensors"]  # nothing half-made


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def refuse(handle, kind):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    told = pytest.raises(UserError, match=r"No locks available.*paths\.results=DIR.*flock")
    with told, locked(tmp_path / "lock", ""):
        pass


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*file"), locked(tmp_path / "file/l", ""):
        pass
