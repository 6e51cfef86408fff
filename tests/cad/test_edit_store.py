"""Finished edits are made once, and read back only while they are whole."""

from __future__ import annotations

import logging

import pytest
import torch

from cad.edit_store import EditStore
from cad.edits import Edit, Made
from cad.files import link_or_copy
from cad.instrument import Cost
from cad.weight_edit import Zero


class Counting(Edit):
    """Zeroes as many weights of the first parameter as `count` says; counts how often."""

    name = "counting"

    def __init__(self, count: int) -> None:
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
        return Made({name: Zero(torch.arange(self.count))}, Cost(7.0, 3.0), history)


@pytest.fixture
def store(tmp_path) -> EditStore:
    return EditStore(tmp_path)


def test_an_edit_is_made_once_with_its_cost_and_history(store, tiny_model, church):
    method = Counting(3)
    made, path = store.edit(method, tiny_model, [church])
    again, same = store.edit(method, tiny_model, [church])
    assert (method.calls, method.cleaned, path) == (1, 1, same)
    assert again.fingerprint == made.fingerprint
    assert (made.cost, again.cost) == (Cost(7.0, 3.0), Cost(7.0, 3.0, cached=True))
    assert again.history == made.history == ({"step": 1, "loss": 0.5},)


def test_what_determines_the_edit_is_in_its_place(store, tiny_model, church, parachute):
    places = {
        store.path(Counting(3), tiny_model, [church]),
        store.path(Counting(4), tiny_model, [church]),
        store.path(Counting(3), tiny_model, [parachute]),
        store.path(Counting(3), tiny_model, [church, parachute]),
    }
    newer = Counting(3)
    newer.version = 2
    assert len(places | {store.path(newer, tiny_model, [church])}) == 5


@pytest.mark.parametrize("damage", ["edit", "notes", "notes_gone"])
def test_what_is_damaged_is_made_again(store, tiny_model, church, damage, caplog):
    method = Counting(3)
    made, path = store.edit(method, tiny_model, [church])
    notes = path.with_suffix(".json")
    if damage == "edit":
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    elif damage == "notes":
        notes.write_text("{}")
    else:
        notes.unlink()
    with caplog.at_level(logging.WARNING):
        again, _ = store.edit(method, tiny_model, [church])
    assert method.calls == 2
    assert again.fingerprint == made.fingerprint
    assert ("damaged" in caplog.text) == (damage != "notes_gone")


def test_a_link_is_the_file_and_a_copy_where_there_are_none(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.write_text("edit")
    link_or_copy(source, tmp_path / "linked")
    assert (tmp_path / "linked").samefile(source)

    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr("cad.files.os.link", refuse)
    link_or_copy(source, tmp_path / "copied")
    assert (tmp_path / "copied").read_text() == "edit"
    assert not (tmp_path / "copied").samefile(source)
    assert len(list(tmp_path.iterdir())) == 3  # nothing half-made is left
