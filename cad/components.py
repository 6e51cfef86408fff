"""Groups of components: which weights of a denoiser are attributed and edited (paper Table 7).

A model's adapter names its groups as regular expressions over parameter names
(`DiffusionModel.components`); the ones of UNets (SD 1.x, 2.x, XL) and of joint-attention
transformers (SD 3, 3.5) stand here.

In such a transformer image and text tokens attend to all of both. The paper's names are carried
over by what the weights read and write. "attn1" is what image tokens are projected with, and the
attention among image tokens alone that some blocks have besides (SD 3.5 medium: 13 blocks, where it
is called `attn2`); "attn2" is what text tokens are projected with, the way on which the prompt
comes in. "ff" are the feed-forward layers of both.
"""

from __future__ import annotations

import re

from torch import nn

from cad.errors import UserError
from cad.models.base import DiffusionModel

_ATTENTION = r"\.transformer_blocks\.\d+\.{}\.(to_q|to_k|to_v|to_out\.0)\.weight$"
_JOINT_BLOCK = r"^transformer_blocks\.\d+\."

UNET_COMPONENTS = {
    "ff": r"\.transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)\.weight$",
    "attn1": _ATTENTION.format("attn1"),  # self-attention
    "attn2": _ATTENTION.format("attn2"),  # cross-attention
    "residual": r"\.resnets\.\d+\.(conv1|conv2|conv_shortcut)\.weight$",
}
UNET_TEXT_PROJECTIONS = r"\.attn2\.(to_k|to_v)\.weight$"

JOINT_COMPONENTS = {
    "ff": _JOINT_BLOCK + r"(ff|ff_context)\.net\.(0\.proj|2)\.weight$",
    "attn1": _JOINT_BLOCK + r"(attn|attn2)\.(to_q|to_k|to_v|to_out\.0)\.weight$",
    "attn2": _JOINT_BLOCK + r"attn\.(add_q_proj|add_k_proj|add_v_proj|to_add_out)\.weight$",
}
NO_JOINT_COMPONENTS = {"residual": "a transformer has no residual blocks of convolutions"}


def matching_weights(model: DiffusionModel, pattern: re.Pattern[str]) -> dict[str, nn.Parameter]:
    """The denoiser's parameters in whose name the pattern is found, in its order; maybe none."""
    return {
        name: weight for name, weight in model.denoiser.named_parameters() if pattern.search(name)
    }


def text_projections(model: DiffusionModel) -> dict[str, nn.Parameter]:
    """The key and value projections of the cross-attentions, (out, D), in the denoiser's order.

    They are all that a UNet reads the prompt's states (N, L, D) with. Raises UserError for a model
    without cross-attention (SD 3.5: what is called `attn2` there reads the image).
    """
    pattern = model.text_projections
    weights = {} if pattern is None else matching_weights(model, re.compile(pattern))
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
    who = f"model={model.name} ({type(model.denoiser).__name__})"
    groups = ", ".join(model.components)
    if component not in model.components:
        reason = model.no_components.get(component, "there is no such group")
        raise UserError(f"component={component} is not allowed for {who}: {reason}; use {groups}.")
    weights = matching_weights(model, re.compile(model.components[component]))
    if not weights:
        raise UserError(f"component={component} is empty for {who}; use {groups}.")
    return weights
