"""Edits as values: applied and taken back bit for bit, stored, refused where they do not fit."""

from __future__ import annotations

import copy

import pytest
import torch

from cad.components import component_weights
from cad.digests import parameter_digest
from cad.errors import UserError
from cad.weight_edit import NO_EDIT, Replace, Scale, WeightEdit, Zero


@pytest.fixture
def names(tiny_model):
    return [*component_weights(tiny_model, "ff")][:2] + [
        *component_weights(tiny_model, "residual")
    ][:1]


@pytest.fixture
def edit(tiny_model, names):
    """One change of each kind; the one of the convolution replaces it."""
    convolution = tiny_model.denoiser.get_parameter(names[2])
    return WeightEdit(
        {
            names[0]: Zero(torch.tensor([0, 5, 40], dtype=torch.int32)),
            names[1]: Scale(torch.tensor([3, 7]), 1.5),
            names[2]: Replace(torch.full_like(convolution, 0.25)),
        },
        {"model": tiny_model.provenance(), "seed": 0},
    )


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


def test_restored_after_an_exception(tiny_model, edit):
    before = parameter_digest(tiny_model.denoiser)
    with pytest.raises(ZeroDivisionError), edit.applied(tiny_model):
        raise ZeroDivisionError
    assert parameter_digest(tiny_model.denoiser) == before


def test_restored_after_an_exception_while_applying(tiny_model, edit, names, monkeypatch):
    before = parameter_digest(tiny_model.denoiser)

    def fail(weight):
        weight.zero_()
        raise ZeroDivisionError

    object.__setattr__(edit.changes[names[2]], "write", fail)
    with pytest.raises(ZeroDivisionError), edit.applied(tiny_model):
        pass
    assert parameter_digest(tiny_model.denoiser) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_restored_in_half_precision_with_odd_bits(tiny_model, names, dtype):
    tiny_model.denoiser.to(dtype)
    weight = tiny_model.denoiser.get_parameter(names[0])
    weight.data.view(-1)[:3] = torch.tensor([-0.0, float("inf"), 1e-7], dtype=dtype)
    before = parameter_digest(tiny_model.denoiser)
    edit = WeightEdit({names[0]: Scale(torch.arange(6), 3.0)}, {"model": tiny_model.provenance()})
    with edit.applied(tiny_model):
        assert parameter_digest(tiny_model.denoiser) != before
    assert parameter_digest(tiny_model.denoiser) == before


def test_weights_in_another_memory_layout_are_edited_in_place(tiny_model, names):
    tiny_model.denoiser.to(memory_format=torch.channels_last)
    weight = tiny_model.denoiser.get_parameter(names[2])
    assert not weight.is_contiguous()
    edit = WeightEdit({names[2]: Zero(torch.tensor([1]))}, {"model": tiny_model.provenance()})
    before = weight.clone()
    with edit.applied(tiny_model):
        assert (weight != before).nonzero().tolist() == [[0, 0, 0, 1]]
    assert torch.equal(weight, before)


def test_edits_nest(tiny_model, names):
    provenance = {"model": tiny_model.provenance()}
    before = parameter_digest(tiny_model.denoiser)
    outer = WeightEdit({names[0]: Scale(torch.tensor([0]), 2.0)}, provenance)
    inner = WeightEdit({names[0]: Zero(torch.tensor([0, 1]))}, provenance)
    with outer.applied(tiny_model):
        between = parameter_digest(tiny_model.denoiser)
        with inner.applied(tiny_model):
            pass
        assert parameter_digest(tiny_model.denoiser) == between
    assert parameter_digest(tiny_model.denoiser) == before


def test_round_trip_through_a_file(tiny_model, edit, tmp_path):
    edit.save(tmp_path / "a" / "edit.safetensors")
    loaded = WeightEdit.load(tmp_path / "a" / "edit.safetensors")
    assert loaded.fingerprint == edit.fingerprint
    assert loaded.provenance == edit.provenance
    assert loaded.num_weights == edit.num_weights
    with edit.applied(tiny_model):
        expected = parameter_digest(tiny_model.denoiser)
    with loaded.applied(tiny_model):
        assert parameter_digest(tiny_model.denoiser) == expected
    loaded.save(tmp_path / "again.safetensors")
    first, again = tmp_path / "a" / "edit.safetensors", tmp_path / "again.safetensors"
    assert first.read_bytes() == again.read_bytes()
    assert [path.name for path in first.parent.iterdir()] == ["edit.safetensors"]


def test_an_empty_edit_round_trips(tmp_path, tiny_model):
    WeightEdit({}, {}).save(tmp_path / "none.safetensors")
    loaded = WeightEdit.load(tmp_path / "none.safetensors")
    assert loaded.fingerprint == NO_EDIT
    with loaded.applied(tiny_model):
        pass


def test_the_fingerprint_is_of_the_changes_alone():
    def fingerprint(change):
        return WeightEdit({"w": change}, {}).fingerprint

    zero = fingerprint(Zero(torch.tensor([1, 2])))
    assert zero == fingerprint(Zero(torch.tensor([1, 2], dtype=torch.int32)))
    others = [Zero(torch.tensor([1, 3])), Scale(torch.tensor([1, 2]), 2.0)]
    others += [Scale(torch.tensor([1, 2]), 3.0), Replace(torch.tensor([1.0, 2.0]))]
    assert len({zero, *map(fingerprint, others)}) == 5
    assert fingerprint(Zero(torch.tensor([], dtype=torch.int64))) == NO_EDIT


def test_a_permanent_edit_makes_another_model(tiny_model, edit):
    before = tiny_model.provenance()["fingerprint"]
    edit.apply_permanently(tiny_model)
    assert tiny_model.provenance()["fingerprint"] != before
    with pytest.raises(UserError, match="made for other weights"), edit.applied(tiny_model):
        pass


def test_other_weights_are_refused(tiny_model, edit):
    other = copy.deepcopy(tiny_model)
    next(other.denoiser.parameters()).data += 1
    other.forget_digests()
    with pytest.raises(UserError, match=r"made for other weights than model=tiny.*fingerprint"):
        edit.apply_permanently(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Zero(torch.tensor([10**6])), "indices 1000000 to 1000000 do not fit"),
        (Zero(torch.tensor([-1])), "indices -1 to -1 do not fit"),
        (Replace(torch.zeros(2, 2)), r"shape \(2, 2\) is not the model's"),
    ],
)
def test_changes_that_do_not_fit_are_refused(tiny_model, names, change, message):
    edit = WeightEdit({names[0]: change}, {"model": tiny_model.provenance()})
    with pytest.raises(UserError, match=message), edit.applied(tiny_model):
        pass


def test_unknown_weights_and_origins_are_refused(tiny_model, names):
    zero = Zero(torch.tensor([0]))
    with pytest.raises(UserError, match="'nowhere', which model=tiny lacks"):
        WeightEdit({"nowhere": zero}, {}).apply_permanently(tiny_model)
    with pytest.raises(UserError, match="does not say which model"):
        WeightEdit({names[0]: zero}, {}).apply_permanently(tiny_model)


@pytest.mark.parametrize(
    "header",
    [
        "{",
        "[]",
        '{"format": "cad-weight-edit/1"}',
        '{"format": "cad-weight-edit/1", "fingerprint": "", "changes": {}, "provenance": {}}',
        '{"format": "cad-weight-edit/1", "fingerprint": "", "changes": {"w": ["zero"]}, '
        '"provenance": {}}',
        '{"format": "cad-weight-edit/1", "fingerprint": "", "changes": {"w": ["zero", null]}, '
        '"provenance": {}}',
        '{"format": "cad-weight-edit/1", "fingerprint": "", "changes": {"w": ["replace", null]}, '
        '"provenance": 3}',
    ],
)
def test_damaged_headers_are_refused(tmp_path, header):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, tmp_path / "edit.safetensors", {"cad": header})
    with pytest.raises(UserError, match=r"damaged|not an edit"):
        WeightEdit.load(tmp_path / "edit.safetensors")


def test_files_that_are_no_edits_are_refused(tmp_path, edit):
    from safetensors.torch import save_file

    with pytest.raises(UserError, match="there is no edit"):
        WeightEdit.load(tmp_path / "missing.safetensors")
    (tmp_path / "text.safetensors").write_text("not an edit")
    with pytest.raises(UserError, match="damaged"):
        WeightEdit.load(tmp_path / "text.safetensors")
    save_file({"w": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="not an edit of this package"):
        WeightEdit.load(tmp_path / "foreign.safetensors")
    (tmp_path / "cut.safetensors").touch()
    with pytest.raises(UserError, match="damaged"):
        WeightEdit.load(tmp_path / "cut.safetensors")
    edit.save(tmp_path / "flipped.safetensors")
    content = bytearray((tmp_path / "flipped.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "flipped.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="damaged: its content hashes to"):
        WeightEdit.load(tmp_path / "flipped.safetensors")
