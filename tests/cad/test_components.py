"""The groups of components of the published architectures, at full size and without memory."""

from __future__ import annotations

import re

import pytest
import torch

from cad.components import JOINT_COMPONENTS, UNET_COMPONENTS, UNET_TEXT_PROJECTIONS
from cad.models.random_weights import construct_part, load_architecture


def names_of(architecture: str, part: str) -> list[str]:
    with torch.device("meta"):
        denoiser = construct_part(load_architecture(architecture)["parts"][part])
    return [name for name, _ in denoiser.named_parameters()]


def count(pattern: str, names: list[str]) -> int:
    return sum(re.search(pattern, name) is not None for name in names)


@pytest.mark.parametrize(
    ("architecture", "blocks", "convolutions"),
    [
        ("sd14", 16, 2 * 22 + 14),  # 22 residual blocks, of which 14 change the width
        ("sd21", 16, 2 * 22 + 14),
        ("sdxl", 70, 2 * 17 + 11),
    ],
)
def test_unets(architecture, blocks, convolutions):
    names = names_of(architecture, "unet")
    counts = [count(pattern, names) for pattern in UNET_COMPONENTS.values()]
    assert list(UNET_COMPONENTS) == ["ff", "attn1", "attn2", "residual"]
    assert counts == [2 * blocks, 4 * blocks, 4 * blocks, convolutions]
    assert count(UNET_TEXT_PROJECTIONS, names) == 2 * blocks


@pytest.mark.parametrize(
    ("architecture", "blocks", "dual"), [("sd35_medium", 24, 13), ("sd35_large", 38, 0)]
)
def test_joint_attention_transformers(architecture, blocks, dual):
    """The last block writes no text: it has neither `ff_context` nor `to_add_out`."""
    names = names_of(architecture, "transformer")
    counts = [count(pattern, names) for pattern in JOINT_COMPONENTS.values()]
    assert list(JOINT_COMPONENTS) == ["ff", "attn1", "attn2"]
    assert counts == [4 * blocks - 2, 4 * blocks + 4 * dual, 4 * blocks - 1]
