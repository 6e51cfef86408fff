"""Groups of components: which weights of a denoiser are attributed and edited (paper Table 7).

A model's adapter names its groups as regular expressions over parameter names
(`DiffusionModel.components`); the ones of UNets (SD 1.x, 2.x, XL) stand here.
"""

from __future__ import annotations

import re

from torch import nn

from cad.errors import UserError
from cad.models.base import DiffusionModel

_ATTENTION = r"\.transformer_blocks\.\d+\.{}\.(to_q|to_k|to_v|to_out\.0)\.weight$"

UNET_COMPONENTS = {
    "ff": r"\.transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)\.weight$",
    "attn1": _ATTENTION.format("attn1"),  # self-attention
    "attn2": _ATTENTION.format("attn2"),  # cross-attention
    "residual": r"\.resnets\.\d+\.(conv1|conv2|conv_shortcut)\.weight$",
}


_TEXT_PROJECTION = re.compile(r"\.attn2\.(to_k|to_v)\.weight$")


def matching_weights(model: DiffusionModel, pattern: re.Pattern[str]) -> dict[str, nn.Parameter]:
    """The denoiser's parameters in whose name the pattern is found, in its order; maybe none."""
    return {
        name: weight for name, weight in model.denoiser.named_parameters() if pattern.search(name)
    }


def text_projections(model: DiffusionModel) -> dict[str, nn.Parameter]:
    """The key and value projections of the cross-attentions, (out, D), in the denoiser's order.

    They are all that a UNet reads the prompt's states (N, L, D) with. Raises UserError for a model
    without cross-attention (SD 3.5 attends to image and text jointly).
    """
    weights = matching_weights(model, _TEXT_PROJECTION)
    if not weights:
        raise UserError(
            f"model={model.name} ({type(model.denoiser).__name__}) has no cross-attention, so "
            "methods that change how it reads the prompt cannot be used on it."
        )
    return weights


def component_weights(model: DiffusionModel, component: str) -> dict[str, nn.Parameter]:
    """The weights of a group by parameter name, in the denoiser's order.

    Linear weights (out, in), convolutions (out, in, kh, kw). Raises UserError for a group that the
    model's family does not have or that is empty in this model.
    """
    if component not in model.components:
        raise UserError(
            f"component={component!r} is unknown for model={model.name}; "
            f"allowed: {', '.join(model.components)}."
        )
    weights = matching_weights(model, re.compile(model.components[component]))
    if not weights:
        raise UserError(
            f"component={component} is empty: no weight of model={model.name} "
            f"({type(model.denoiser).__name__}) belongs to it. Choose another group: "
            f"{', '.join(model.components)}."
        )
    return weights
