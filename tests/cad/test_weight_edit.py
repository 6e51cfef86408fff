"""Edits as values: applied and taken back bit for bit, stored, refused where they do not fit."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import save_file

from cad.components import component_weights
from cad.errors import UserError
from cad.identity import parameter_digest
from cad.weight_edit import FORMAT, NO_EDIT, Replace, Scale, WeightEdit, Zero


@pytest.fixture
def names(tiny_model):
    linear, convolutions = (component_weights(tiny_model, each) for each in ("ff", "residual"))
    return [*linear][:2] + [*convolutions][:1]


@pytest.fixture
def edit(tiny_model, names):
    """One change of each kind; the one of the convolution replaces it."""
    convolution = tiny_model.denoiser.get_parameter(names[2])
    changes = {
        names[0]: Zero(torch.tensor([0, 5, 40], dtype=torch.int32)),
        names[1]: Scale(torch.tensor([3, 7]), 1.5),
        names[2]: Replace(torch.full_like(convolution, 0.25)),
    }
    return WeightEdit(changes, {"model": tiny_model.provenance(), "seed": 0})


def edit_of(model, name, change):
    return WeightEdit({name: change}, {"model": model.provenance()})


def test_changes_are_made_inside_and_undone_after(tiny_model, edit, names):
    before = parameter_digest(tiny_model.denoiser)
    old = [tiny_model.denoiser.get_parameter(name).clone().flatten() for name in names]
    with edit.applied(tiny_model):
        new = [tiny_model.denoiser.get_parameter(name).flatten() for name in names]
        assert new[0][[0, 5, 40]].tolist() == [0, 0, 0]
        assert (new[0] != old[0]).sum() == 3
        assert torch.equal(new[1][[3, 7]], old[1][[3, 7]] * 1.5)
        assert (new[1] != old[1]).sum() == 2
        assert (new[2] == 0.25).all()
    assert parameter_digest(tiny_model.denoiser) == before


@pytest.mark.parametrize("amid", [False, True])
def test_restored_after_an_exception_also_amid_applying(tiny_model, edit, names, amid):
    def fail(old):
        raise ZeroDivisionError

    before = parameter_digest(tiny_model.denoiser)
    if amid:
        object.__setattr__(edit.changes[names[2]], "values", fail)
    with pytest.raises(ZeroDivisionError), edit.applied(tiny_model):
        raise ZeroDivisionError
    assert parameter_digest(tiny_model.denoiser) == before
    assert tiny_model.edits == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_restored_in_half_precision_with_odd_bits(tiny_model, names, dtype):
    tiny_model.denoiser.to(dtype)
    weight = tiny_model.denoiser.get_parameter(names[0])
    weight.data.view(-1)[:3] = torch.tensor([-0.0, float("inf"), 1e-7], dtype=dtype)
    before = parameter_digest(tiny_model.denoiser)
    with edit_of(tiny_model, names[0], Scale(torch.arange(6), 3.0)).applied(tiny_model):
        assert parameter_digest(tiny_model.denoiser) != before
    assert parameter_digest(tiny_model.denoiser) == before


def test_weights_in_another_memory_layout_are_edited_in_place(tiny_model, names):
    tiny_model.denoiser.to(memory_format=torch.channels_last)
    weight = tiny_model.denoiser.get_parameter(names[2])
    assert not weight.is_contiguous()
    before = weight.clone()
    with edit_of(tiny_model, names[2], Zero(torch.tensor([1]))).applied(tiny_model):
        assert (weight != before).nonzero().tolist() == [[0, 0, 0, 1]]
    assert torch.equal(weight, before)


def test_edits_nest_and_the_model_knows_them(tiny_model, names):
    before = parameter_digest(tiny_model.denoiser)
    outer = edit_of(tiny_model, names[0], Scale(torch.tensor([0]), 2.0))
    inner = edit_of(tiny_model, names[0], Zero(torch.tensor([0, 1])))
    nothing = edit_of(tiny_model, names[0], Zero(torch.tensor([], dtype=torch.int64)))
    assert tiny_model.edits == ()
    with outer.applied(tiny_model):
        between = parameter_digest(tiny_model.denoiser)
        with inner.applied(tiny_model), nothing.applied(tiny_model):
            assert tiny_model.edits == (outer, inner)  # one that changes nothing is none
        assert tiny_model.edits == (outer,)
        assert parameter_digest(tiny_model.denoiser) == between
    assert tiny_model.edits == ()
    assert parameter_digest(tiny_model.denoiser) == before


def test_round_trip_through_a_file(tiny_model, edit, tmp_path):
    first, again = tmp_path / "a" / "edit.safetensors", tmp_path / "again.safetensors"
    edit.save(first)
    loaded = WeightEdit.load(str(first))
    assert loaded.fingerprint == edit.fingerprint
    assert loaded.provenance == edit.provenance
    with edit.applied(tiny_model):
        expected = parameter_digest(tiny_model.denoiser)
    with loaded.applied(tiny_model):
        assert parameter_digest(tiny_model.denoiser) == expected
    loaded.save(str(again))
    assert first.read_bytes() == again.read_bytes()
    assert [path.name for path in first.parent.iterdir()] == ["edit.safetensors"]


def test_the_fingerprint_is_of_the_changes_alone():
    def fingerprint(change):
        return WeightEdit({"w": change}).fingerprint

    zero = fingerprint(Zero(torch.tensor([1, 2])))
    assert zero == fingerprint(Zero(torch.tensor([1, 2], dtype=torch.int32)))
    others = [Zero(torch.tensor([1, 3])), Scale(torch.tensor([1, 2]), 2.0)]
    others += [Scale(torch.tensor([1, 2]), 3.0), Replace(torch.tensor([1.0, 2.0]))]
    assert len({zero, *map(fingerprint, others)}) == 5
    assert fingerprint(Zero(torch.tensor([], dtype=torch.int64))) == NO_EDIT


def test_other_weights_are_refused(tiny_model, edit):
    other = copy.deepcopy(tiny_model)
    next(other.denoiser.parameters()).data += 1
    del other.digests
    told = pytest.raises(UserError, match=r"made for other weights than model=tiny.*fingerprint")
    with told, edit.applied(other):
        pass


@pytest.mark.parametrize(
    ("name", "change", "provenance", "message"),
    [
        (None, Zero(torch.tensor([10**6])), None, "indices 1000000 to 1000000 do not fit"),
        (None, Zero(torch.tensor([-1])), None, "indices -1 to -1 do not fit"),
        (None, Replace(torch.zeros(2, 2)), None, r"shape \(2, 2\) is not the model's"),
        ("nowhere", Zero(torch.tensor([0])), None, "'nowhere', which model=tiny lacks"),
        (None, Zero(torch.tensor([0])), {}, "does not say which model"),
    ],
)
def test_changes_that_do_not_fit_are_refused(tiny_model, names, name, change, provenance, message):
    if provenance is None:
        provenance = {"model": tiny_model.provenance()}
    edit = WeightEdit({name or names[0]: change}, provenance)
    with pytest.raises(UserError, match=message), edit.applied(tiny_model):
        pass
    assert tiny_model.edits == ()


WHOLE = {"format": FORMAT, "fingerprint": "", "changes": {}, "provenance": {}}


@pytest.mark.parametrize(
    "header",
    [
        "{",
        [],
        None,
        {"format": FORMAT},
        WHOLE,
        WHOLE | {"changes": {"w": ["zero"]}},
        WHOLE | {"changes": {"w": ["zero", None]}},
        WHOLE | {"changes": {"w": ["replace", 2]}},
        WHOLE | {"changes": {"w": ["other", None]}},
        WHOLE | {"changes": {"w": ["replace", None]}, "provenance": 3},
    ],
)
def test_damaged_headers_are_refused(tmp_path, header):
    text = header if isinstance(header, str) else json.dumps(header)
    metadata = None if header is None else {"cad": text}
    save_file({"w": torch.zeros(1)}, tmp_path / "edit.safetensors", metadata)
    with pytest.raises(UserError, match=rf"damaged|not a {FORMAT} file"):
        WeightEdit.load(tmp_path / "edit.safetensors")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (Zero(torch.tensor([4, 4])), "an index stands in it twice"),
        (Scale(torch.tensor([4]), float("nan")), "not finite"),
        (Replace(torch.tensor([float("nan")])), "not finite"),
    ],
)
def test_files_of_impossible_changes_are_refused(tmp_path, change, told):
    with pytest.raises(UserError, match="there is no edit"):
        WeightEdit.load(tmp_path / "edit.safetensors")
    WeightEdit({"w": change}).save(tmp_path / "edit.safetensors")
    with pytest.raises(UserError, match=told):
        WeightEdit.load(tmp_path / "edit.safetensors")
