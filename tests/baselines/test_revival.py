"""Zeroed weights come back by low-rank completion, and noise in their place hides them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from baselines.afterwards import edited_weights
from baselines.revival import Refilled, Revived, soft_impute
from cad.edits import Edit, NoEdit
from cad.errors import UserError
from cad.identity import parameter_digest
from cad.store import Store
from cad.weight_edit import NO_EDIT, WeightEdit, Zero

NAME = "mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight"
BIAS = NAME.replace("weight", "bias")


class Pruned(Edit):
    """Zeroes every seventh weight of a matrix, and a whole bias."""

    name = "pruned"

    def settings(self, concepts):
        return {}

    def make(self, model, concepts):
        weights = dict(model.denoiser.named_parameters())
        places = torch.arange(0, weights[NAME].numel(), 7)
        return WeightEdit({NAME: Zero(places), BIAS: Zero(torch.arange(weights[BIAS].numel()))})


def after(method, model, concept):
    """The matrix (out, in) after the method, and where it had zeros without."""
    edit = method(model, concept)
    zeros = edited_weights(model, Pruned()(model, concept))[NAME] == 0
    return edited_weights(model, edit)[NAME], zeros


def test_entries_of_a_low_rank_matrix_are_found_again():
    generator = torch.Generator().manual_seed(0)
    low, high = (torch.randn(*size, generator=generator).double() for size in ((20, 2), (2, 30)))
    whole = low @ high
    missing = torch.rand(whole.shape, generator=generator) < 0.1
    found = soft_impute(whole.masked_fill(missing, 0), missing, 0.9, 500, 1e-9)
    torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[~missing], whole[~missing], rtol=0, atol=0)


def test_soft_impute_step_by_step():
    """The published loop, in numpy."""
    generator = np.random.default_rng(0)
    matrix, missing = generator.normal(size=(5, 7)), generator.random((5, 7)) < 0.2
    filled = np.where(missing, np.nan, matrix)
    filled = np.where(missing, np.nanmean(filled, axis=0), filled)
    for _ in range(3):
        u, values, v = np.linalg.svd(filled, full_matrices=False)
        shrunk = u @ np.diag(np.maximum(values - values.min(), 0)) @ v
        filled = np.where(missing, shrunk, matrix)
    found = soft_impute(torch.from_numpy(matrix), torch.from_numpy(missing), 0.0, 3, 0.0)
    np.testing.assert_allclose(found.numpy(), filled)


def test_revived_weights_have_their_rows_largest_magnitude(tiny_model, church):
    before = parameter_digest(tiny_model.denoiser)
    found, zeros = after(Revived(Pruned(), iterations=3), tiny_model, church)
    original = tiny_model.denoiser.get_parameter(NAME)
    assert torch.equal(found[~zeros], original[~zeros])
    most = original.masked_fill(zeros, 0).abs().amax(dim=1, keepdim=True).expand_as(found)[zeros]
    back = found[zeros] != 0
    assert back.sum() == int(0.6 * zeros.sum())
    torch.testing.assert_close(found[zeros][back].abs(), most[back])
    assert parameter_digest(tiny_model.denoiser) == before


def test_the_control_differs_in_signs_alone(tiny_model, church):
    found, _ = after(Revived(Pruned(), iterations=3), tiny_model, church)
    control, _ = after(Revived(Pruned(), iterations=3, signs="random"), tiny_model, church)
    assert torch.equal(found.abs(), control.abs())
    assert 0.2 < (found != control).sum() / (found != 0).sum() / (1 / 7 * 0.6) < 0.8


def test_noise_hides_the_zeros(tiny_model, church):
    refilled = Refilled(Pruned())
    found, zeros = after(refilled, tiny_model, church)
    assert not (found == 0).any()
    original = tiny_model.denoiser.get_parameter(NAME)
    assert torch.equal(found[~zeros], original[~zeros])
    assert found[zeros].std() / original[~zeros].std() == pytest.approx(1, abs=0.1)
    revived = Revived(refilled)(tiny_model, church)
    assert revived.fingerprint == refilled(tiny_model, church).fingerprint
    assert Revived(NoEdit())(tiny_model, church).fingerprint == NO_EDIT


def test_a_chain_is_an_edit_with_its_inner_ones_identity(tiny_model, church, tmp_path):
    chain = Refilled(Revived(Pruned(), iterations=1, seed=1), store=Store(tmp_path))
    assert chain.name == "pruned+revived+refilled"
    assert isinstance(chain.innermost, Pruned)
    identity = chain.identity([church])
    assert identity["settings"]["inner"]["settings"]["seed"] == 1
    assert identity["settings"]["inner"]["settings"]["inner"]["edit"] == "pruned"
    assert "store" not in identity["settings"]
    assert chain(tiny_model, church).cost.seconds > 0
    assert list(tmp_path.glob("*.safetensors"))  # the inner one's


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        (Revived, "iterations", 0),
        (Revived, "tolerance", -1),
        (Revived, "keep", 0),
        (Revived, "shrinkage", 1.5),
        (Revived, "magnitude", "mean"),
        (Revived, "signs", "true"),
        (Refilled, "scale", 0),
        (Refilled, "seed", -1),
    ],
)
def test_bad_values_are_named(method, key, value):
    with pytest.raises(UserError, match=rf"after\.{method.step}\.{key}="):
        method(NoEdit(), **{key: value})
