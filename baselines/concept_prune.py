"""ConceptPrune (Chavhan et al. 2025): zeroes feed-forward weights that are skilled at a concept.

Pairs of prompts, one with the concept and one without, are sampled from the same noise. At each of
the first t steps, the second linear layer of every feed-forward block gets two Wanda scores,
|W_ij| * ||a_j||_2 with a its input: one for the concept prompts, one for the base prompts. A weight
is skilled at a step if it is among the top k of its row for the concept and its concept score
exceeds its base score. Pruned are the weights that are skilled at more than m * t steps.

Where the publication leaves a choice the default is what was released: the prediction without a
prompt, which guides the sampler, is recorded too; all prompts start from one noise; the sampler is
the model's own; k is rounded down; "more than" is strict.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from baselines.prompt_pairs import PromptPairs
from cad.attribution import overflow
from cad.checks import check, finite, number, one_of, ratio, seed, steps, whole
from cad.components import component_weights
from cad.concepts import Concept
from cad.errors import UserError
from cad.instrument import measure
from cad.models.base import SAMPLERS, DiffusionModel
from cad.models.conditioning import Conditioning
from cad.sampling import draw_noise, guide, make_generators
from cad.selection import floor_share
from cad.weight_edit import Change, WeightEdit, Zero

log = logging.getLogger(__name__)

RECORDED = ("both", "prompted")  # predictions whose activations count
NOISES = ("shared", "own")  # where the pairs start from

_majority = number(lambda x: 0 <= x < 1, "a number in [0, 1)")
_SECOND_LINEAR = re.compile(r"(^|\.)ff\.net\.2\.weight$")


@dataclass(frozen=True, eq=False, kw_only=True)
class ConceptPrune(PromptPairs):
    """The method with its settings; UserError for a value that is not allowed."""

    name: ClassVar[str] = "concept_prune"

    ratio: float  # k as a fraction of a row, in (0, 1]
    first_steps: int  # t, the denoising steps that count
    majority: float  # m, a fraction of the first steps, in [0, 1)
    steps: int = 50  # of the sampler
    guidance: float = 7.5  # classifier-free guidance of the sampler
    kind: str = "default"  # of `DiffusionModel.sampler`: "default" | "ddim"
    # "both": of the predictions with the prompt and without, the guidance batch, as released |
    # "prompted": of the first alone, which at guidance 1 is all there is.
    record: str = "both"
    noise: str = "shared"  # by all pairs, as released | "own": each pair has its own
    seed: int = 0  # of the noise
    batch_size: int = 5  # pairs at once, two images each; changes nothing but float rounding

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "edit", first_steps=whole(1), steps=steps, batch_size=whole(1))
        check(self, "edit", ratio=ratio, majority=_majority, guidance=finite, seed=seed)
        check(self, "edit", record=one_of(RECORDED), noise=one_of(NOISES), kind=one_of(SAMPLERS))
        if self.first_steps > self.steps:
            raise UserError(
                f"edit.first_steps={self.first_steps} is not allowed: the sampler takes "
                f"edit.steps={self.steps}."
            )

    def make(self, model: DiffusionModel, concepts: Sequence[Concept]) -> WeightEdit:
        weights = second_linears(model)
        self._check(model, weights, concepts)
        changes: dict[str, Change] = {}
        with measure(model.device) as meter, torch.no_grad(), logging_redirect_tqdm():
            found = [self._pruned(model, weights, concept) for concept in concepts]
            for name in weights:
                indices = torch.cat([each[name] for each in found]).unique()  # (n,), ascending
                if indices.numel():
                    changes[name] = Zero(indices.to(torch.int32))
        return WeightEdit(changes, cost=meter.cost)

    def _check(
        self, model: DiffusionModel, weights: Mapping[str, Tensor], concepts: Sequence[Concept]
    ) -> None:
        """UserError for what cannot work on this model, before the work."""
        widest = max(weight.shape[1] for weight in weights.values())
        if floor_share(self.ratio, widest) == 0:
            raise UserError(
                f"edit.ratio={self.ratio} chooses nothing: a row of model={model.name} has at most "
                f"{widest} weights, so the ratio must be at least {1 / widest:.3g}."
            )
        model.sampler(self.steps, self.kind)
        for concept in concepts:
            for prompts in self.prompts(concept):
                model.check_prompts(prompts)

    def _pruned(
        self, model: DiffusionModel, weights: Mapping[str, Tensor], concept: Concept
    ) -> dict[str, Tensor]:
        """Flat indices (n,) int64 into each weight (out, in), maybe none, for one concept."""
        squares = self._squares(model, weights, concept)
        bad = [name for name, sums in squares.items() if not sums.isfinite().all()]
        if bad:
            raise overflow(model, f"inputs of {len(bad)} layers are not finite (first: {bad[0]})")
        most = floor_share(self.majority, self.first_steps)  # steps that a weight may be skilled at
        pruned = {}
        for name, weight in weights.items():
            k = floor_share(self.ratio, weight.shape[1])
            counts = count_skilled(weight, squares[name].sqrt(), k)  # (out, in)
            pruned[name] = (counts > most).flatten().nonzero().squeeze(1)
        if not any(indices.numel() for indices in pruned.values()):
            log.warning("%s: 0 weights are skilled at %s", self.name, concept.name)
        return pruned

    def _squares(
        self, model: DiffusionModel, weights: Mapping[str, Tensor], concept: Concept
    ) -> dict[str, Tensor]:
        """||a_j||_2^2 of each layer over all prompts, (t, 2, in) float64: base, then concept."""
        squares = {
            name: weight.new_zeros(self.first_steps, 2, weight.shape[1], dtype=torch.float64)
            for name, weight in weights.items()
        }
        pairs = range(len(self.fillers))
        base, told = self.prompts(concept)
        for i in tqdm(pairs[:: self.batch_size], self.name, unit="batch", disable=None):
            batch = slice(i, i + self.batch_size)
            c = model.encode_prompts(base[batch] + told[batch])  # (2N, ...)
            self._walk(model, pairs[batch], c, squares)
        return squares

    def _walk(
        self,
        model: DiffusionModel,
        batch: Sequence[int],
        c: Conditioning,
        squares: Mapping[str, Tensor],
    ) -> None:
        """Samples N pairs for the first steps and adds to `squares`."""
        sampler = model.sampler(self.steps, self.kind)
        unconditional = model.encode_prompts([""]).expand(len(c))
        starts = batch if self.noise == "own" else [0] * len(batch)
        generators = make_generators([*starts, *starts], salt=f"{self.name}-{self.seed}")
        x_t = draw_noise(model, generators) * sampler.init_sigma  # (2N, C, h, w), two halves alike
        guided = self.guidance != 1.0
        for step, t in enumerate(sampler.timesteps[: self.first_steps]):
            x_in = sampler.scale(x_t, t)
            with recorded(model.denoiser, {name: each[step] for name, each in squares.items()}):
                prediction = phi_c = model.predict(x_in, t, c)
                if guided and self.record == "both":
                    phi_u = model.predict(x_in, t, unconditional)
            if step + 1 == self.first_steps:
                break
            if guided:
                if self.record == "prompted":
                    phi_u = model.predict(x_in, t, unconditional)
                prediction = guide(phi_u, phi_c, self.guidance)
            x_t = sampler.step(prediction, t, x_t, generators)


def second_linears(model: DiffusionModel) -> dict[str, nn.Parameter]:
    """The second linear weight (out, in) of every feed-forward block, in the denoiser's order.

    Raises UserError for a model without any. A joint transformer's are those of the image alone.
    """
    layers = component_weights(model, "ff").items()
    weights = {name: weight for name, weight in layers if _SECOND_LINEAR.search(name)}
    if not weights:
        raise UserError(
            f"model={model.name} has no weight ff.net.2, the second linear layer of a feed-forward "
            "block, which is all that this method prunes."
        )
    return weights


@contextmanager
def recorded(denoiser: nn.Module, squares: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block, every forward adds the squares of its layers' inputs to `squares`.

    {name of a linear weight: (2, in)}; the first half of a batch counts for the first row, the
    second for the second. The hooks are gone afterwards, also after an exception.
    """

    def add(sums: Tensor, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sums.add_(column_squares(inputs[0]).unflatten(0, (2, -1)).sum(dim=1))  # (2, in)

    with ExitStack() as stack:
        for name, sums in squares.items():
            layer = denoiser.get_submodule(name.removesuffix(".weight"))
            stack.callback(layer.register_forward_pre_hook(partial(add, sums)).remove)
        yield


def column_squares(activations: Tensor) -> Tensor:
    """The squared column norms of each image's tokens, every token first brought to unit length.

    (N, ..., in) -> (N, in) float64. A token of zeros stays one.
    """
    rows, columns = activations.shape[0], activations.shape[-1]
    tokens = activations.detach().float().reshape(rows, -1, columns)  # (N, T, in)
    return F.normalize(tokens, dim=-1).square_().sum(dim=1).double()


def count_skilled(weight: Tensor, norms: Tensor, k: int) -> Tensor:
    """At how many steps each weight is skilled: (out, in) int16.

    weight (out, in); norms ||a_j||_2 (t, 2, in), of the base prompts and of the concept prompts.
    """
    size = weight.detach().float().abs()
    counts = torch.zeros_like(size, dtype=torch.int16)
    for base_norms, concept_norms in norms.float():  # (in,) each
        base, concept = size * base_norms, size * concept_norms  # (out, in), Wanda scores
        top = concept.topk(k, dim=1).indices  # (out, k)
        highest = torch.zeros_like(size, dtype=torch.bool).scatter_(1, top, True)
        counts += highest & (concept > base)
    return counts
