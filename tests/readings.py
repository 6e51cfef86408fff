"""The published methods read in a few lines each, on diffusers' and transformers' own modules.

Nothing here calls the project's mathematics: a model lends its tokenizer, text encoder, denoiser
and scheduler, and noise is given. Weights and states are float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]
Pair = tuple[Tensor, Tensor]  # of states (n, D): of a text to erase, of its guide


def embed(model: Any, text: str) -> tuple[Tensor, int]:
    """A text's states (L, D), and the position of its last token."""
    tokens = model.tokenizer([text], padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        states = model.text_encoder(tokens.input_ids)[0][0]
    return states.double(), int(tokens.attention_mask.sum()) - 2


def from_last(model: Any, text: str, guide: str) -> Pair:
    """The states from the last tokens on, cut to as many as the shorter text has (UCE, RECE)."""
    (c, last), (g, last_of_guide) = embed(model, text), embed(model, guide)
    n = min(len(c) - last, len(g) - last_of_guide)
    return c[last : last + n], g[last_of_guide : last_of_guide + n]


def projections(model: Any) -> Weights:
    """The keys and values of cross-attention, (out, D)."""
    names = ("attn2.to_k.weight", "attn2.to_v.weight")
    weights = model.denoiser.state_dict().items()
    return {name: weight.double() for name, weight in weights if name.endswith(names)}


def uce(
    weights: Weights, pairs: Sequence[Pair], kept: Sequence[Tensor], scales: tuple[float, ...]
) -> Weights:
    """Gandikota et al. 2024, Eq. 7, with sums over states; scales: s_e, s_p, lambda."""
    s_e, s_p, near = scales
    width = next(iter(weights.values())).shape[1]
    system, identity = near * torch.eye(width).double(), torch.eye(width).double()
    inputs = near * identity
    for c, g in pairs:
        system, inputs = system + s_e * c.T @ c, inputs + s_e * g.T @ c
    for k in kept:
        system, inputs = system + s_p * k.T @ k, inputs + s_p * k.T @ k
    return {name: w @ inputs @ torch.linalg.inv(system) for name, w in weights.items()}


def rece(
    weights: Weights, original: Weights, concepts: Sequence[Tensor], guide: Tensor, near: float
) -> Weights:
    """One round of Gong et al. 2024: find what reads like each concept did (Eq. 8), erase it.

    concepts and guide (L, D); the released update has s_e 1, s_p 0.1 and lambda 0.1, and keeps the
    guide, once for each concept.
    """
    identity = torch.eye(guide.shape[1]).double()
    system = near * identity + sum(w.T @ w for w in weights.values())
    crossed = sum(w.T @ original[name] for name, w in weights.items())
    found = [c @ (torch.linalg.inv(system) @ crossed).T for c in concepts]
    return uce(weights, [(c, guide) for c in found], [guide] * len(found), (1.0, 0.1, 0.1))


def ddim(model: Any, steps: int) -> DDIMScheduler:
    """The pipeline's noise process, walked along by diffusers' own DDIM."""
    scheduler = DDIMScheduler.from_config(model._scheduler.config)
    scheduler.set_timesteps(steps)
    return scheduler


def guided(model: Any, x: Tensor, t: Tensor, text: str, guidance: float) -> Tensor:
    """Both predictions in one batch, without the prompt first, as in diffusers' pipeline."""
    states = torch.stack([embed(model, "")[0], embed(model, text)[0]]).float()
    without, prompted = model.denoiser(torch.cat([x, x]), t, states).sample.chunk(2)
    return without + guidance * (prompted - without)


@torch.no_grad()
def walked(model: Any, x: Tensor, text: str, guidance: float, steps: int, stop: int) -> Tensor:
    """x_t after the first `stop` of the steps from the noise x (1, C, h, w)."""
    scheduler = ddim(model, steps)
    for t in scheduler.timesteps[:stop]:
        x = scheduler.step(guided(model, x, t, text, guidance), t, x).prev_sample
    return x


def noised(
    model: Any, latents: Tensor, steps: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, int]:
    """One of the pictures (K, R, C, h, w) with noise: x_t, t, v there, and the number of its K."""
    k, r, step = (
        int(torch.randint(end, (1,), generator=generator)) for end in (*latents.shape[:2], steps)
    )
    x_0, scheduler = latents[k, r][None], ddim(model, steps)
    noise, t = torch.randn(x_0.shape, generator=generator), scheduler.timesteps[step]
    alpha = scheduler.alphas_cumprod[t].sqrt()
    sigma = (1 - alpha**2).sqrt()
    return alpha * x_0 + sigma * noise, t, alpha * noise - sigma * x_0, k


@torch.no_grad()
def skilled(
    model: Any, prompts: Sequence[Sequence[str]], x: Tensor, first: Sequence[Any], m: float
) -> Weights:
    """ConceptPrune (Chavhan et al. 2025): what it zeroes, {name: (out, in) bool}, as released.

    prompts: base prompts, then the concept's; x (1, C, h, w), the noise of all; first: k as a
    fraction, steps t, steps of the sampler, guidance. All that passes a layer is recorded.
    """
    k, t, steps, guidance = first
    norms = [[_column_norms(model, p, x, t, steps, guidance) for p in each] for each in prompts]
    masks = {}
    for name, weight in model.denoiser.state_dict().items():
        if not name.endswith("ff.net.2.weight"):
            continue
        counts = torch.zeros_like(weight)
        for step in range(t):
            base, told = (sum(p[step][name] for p in each).sqrt() * weight.abs() for each in norms)
            top = told.argsort(dim=1, descending=True)[:, : int(k * weight.shape[1])]
            counts += torch.zeros_like(weight).scatter(1, top, 1) * (told > base)
        masks[name] = counts > m * t
    return masks


def _column_norms(
    model: Any, prompt: str, x: Tensor, t: int, steps: int, guidance: float
) -> list[Mapping[str, Tensor]]:
    """For each step, the squared norms (in,) of every layer's columns, its tokens normalised."""
    scheduler, found = ddim(model, steps), []
    for timestep in scheduler.timesteps[:t]:
        with _inputs(model.denoiser) as seen:
            prediction = guided(model, x, timestep, prompt, guidance)
        x = scheduler.step(prediction, timestep, x).prev_sample
        rows = {name: F.normalize(a.flatten(0, -2), dim=1) for name, a in seen.items()}
        found.append({name: each.square().sum(dim=0) for name, each in rows.items()})
    return found


@contextmanager
def _inputs(denoiser: Any) -> Iterator[dict[str, Tensor]]:
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(
            lambda _module, args, _out, name=f"{name}.weight": seen.update({name: args[0]})
        )
        for name, module in denoiser.named_modules()
        if name.endswith("ff.net.2")
    ]
    yield seen
    for hook in hooks:
        hook.remove()
