"""A user's mistake is one message, wherever it was raised; a bug keeps its traceback."""

from __future__ import annotations

import hydra
import pytest
from hydra.errors import ConfigCompositionException, InstantiationException

from cad.errors import UserError
from experiments.mistakes import find_mistake


def test_a_constructors_user_error_loses_its_wrapping() -> None:
    node = {"_target_": "cad.selection.Selection", "ratio": 7.0}
    with pytest.raises(InstantiationException) as caught:
        hydra.utils.instantiate({"inner": node})
    message = find_mistake(caught.value)
    assert message is not None
    assert message.startswith("ratio.value=7.0")
    assert "Error in call" not in message


def test_a_bug_inside_a_constructor_is_no_mistake() -> None:
    with pytest.raises(InstantiationException) as caught:
        hydra.utils.instantiate({"_target_": "cad.selection.Selection", "ratoi": 7.0})
    assert find_mistake(caught.value) is None


def test_user_errors_and_wrong_configurations_are_told_as_they_are() -> None:
    assert find_mistake(UserError("seed=-1")) == "seed=-1"
    assert find_mistake(ConfigCompositionException("no such key")) == "no such key"
    assert find_mistake(ValueError("a bug")) is None
