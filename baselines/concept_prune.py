"""ConceptPrune (Chavhan et al. 2025): zeroes feed-forward weights that are skilled at a concept.

Pairs of prompts, one with the concept and one without, are sampled from the same noise. At each of
the first t steps, the second linear layer of every feed-forward block gets two Wanda scores,
|W_ij| * ||a_j||_2 with a its input: one for the concept prompts, one for the base prompts. A weight
is skilled at a step if it is among the top k of its row for the concept and its concept score
exceeds its base score. Pruned are the weights that are skilled at more than m * t steps.

Where the publication leaves a choice: the sampler is DDIM without fresh noise; what guides it, the
prediction without a prompt, is not recorded; k is rounded down; "more than" is strict; several
concepts lose together what each would lose alone.
"""

from __future__ import annotations

import logging
import math
import re
import string
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from baselines.checks import check_count, checked_number
from cad.components import component_weights
from cad.concepts import Concept, with_article
from cad.edits import Edit, Made
from cad.errors import UserError
from cad.instrument import measure
from cad.models.base import Conditioning, DiffusionModel
from cad.sampling import draw_noise, guide, make_generators
from cad.selection import floor_share
from cad.weight_edit import Change, Zero

log = logging.getLogger(__name__)

_SECOND_LINEAR = re.compile(r"(^|\.)ff\.net\.2\.weight$")


@dataclass(frozen=True, eq=False, kw_only=True)
class ConceptPrune(Edit):
    """The method with its settings; UserError for a value that is not allowed.

    Each filler makes one pair of prompts and takes the place of {filler} in both templates; a
    concept template without it tells the same prompt against every base prompt.
    {concept} stands for the concept's text ("French horn"), {a_concept} for that with its article,
    {prompt} for its prompt ("naked").
    """

    name = "concept_prune"

    base_template: str  # "a {filler}"
    concept_template: str  # "a {concept} in a {filler}"
    fillers: Sequence[str]  # "forest", "kitchen", ...; one image each
    ratio: float  # k as a fraction of a row, in (0, 1]
    first_steps: int  # t, the denoising steps that count
    majority: float  # m, a fraction of the first steps, in [0, 1)
    steps: int = 50  # of the sampler
    guidance: float = 7.5  # classifier-free guidance of the sampler
    seed: int = 0  # of the noise
    batch_size: int = 5  # pairs at once, two images each; changes nothing but float rounding

    def __post_init__(self) -> None:
        _check_template("base_template", self.base_template)
        _check_template(
            "concept_template", self.concept_template, ("concept", "a_concept", "prompt")
        )
        _check_fillers(self.fillers)
        for key in ("first_steps", "steps", "batch_size"):
            check_count(f"edit.{key}", getattr(self, key), 1)
        check_count("edit.seed", self.seed, 0)
        if self.first_steps > self.steps:
            raise UserError(
                f"edit.first_steps={self.first_steps} is not allowed: the sampler takes "
                f"edit.steps={self.steps}."
            )
        rules: dict[str, tuple[Callable[[float], bool], str]] = {
            "ratio": (lambda x: 0 < x <= 1, "a ratio lies in (0, 1]"),
            "majority": (lambda x: 0 <= x < 1, "it lies in [0, 1)"),
            "guidance": (math.isfinite, "it is a finite number"),
        }
        for key, rule in rules.items():
            number = checked_number(f"edit.{key}", getattr(self, key), *rule)
            object.__setattr__(self, key, number)
        object.__setattr__(self, "fillers", list(self.fillers))

    def settings(self, concepts: Sequence[Concept]) -> Mapping[str, Any]:
        return asdict(self)

    def make(self, model: DiffusionModel, concepts: Sequence[Concept]) -> Made:
        try:
            weights = second_linears(model)
            self._check(model, weights, concepts)
        except UserError as error:
            raise UserError(f"edit={self.name}: {error}") from error
        changes: dict[str, Change] = {}
        with measure(model.device) as meter, torch.no_grad(), logging_redirect_tqdm():
            found = [self._pruned(model, weights, concept) for concept in concepts]
            for name in weights:
                indices = torch.cat([each[name] for each in found]).unique()  # (n,), ascending
                if indices.numel():
                    changes[name] = Zero(indices.to(torch.int32))
        return Made(changes, meter.cost)

    def prompts(self, concept: Concept) -> tuple[list[str], list[str]]:
        """Base prompts and concept prompts; those at one place are a pair."""
        text = concept.text
        words = {"concept": text, "a_concept": with_article(text), "prompt": concept.prompt}
        base = [self.base_template.format(filler=filler) for filler in self.fillers]
        told = [self.concept_template.format(filler=filler, **words) for filler in self.fillers]
        return base, told

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
        model.sampler(self.steps, "ddim", eta=0.0)
        for concept in concepts:
            for prompts in self.prompts(concept):
                model.check_prompts(prompts)

    def _pruned(
        self, model: DiffusionModel, weights: Mapping[str, Tensor], concept: Concept
    ) -> dict[str, Tensor]:
        """What one concept costs each weight (out, in): flat indices (n,) int64, maybe none."""
        squares = self._squares(model, weights, concept)
        _check_finite(squares, model)
        most = floor_share(self.majority, self.first_steps)  # steps that a weight may be skilled at
        pruned = {}
        for name, weight in weights.items():
            k = floor_share(self.ratio, weight.shape[1])
            counts = count_skilled(weight, squares[name].sqrt(), k)  # (out, in)
            pruned[name] = (counts > most).flatten().nonzero().squeeze(1)
        total = sum(indices.numel() for indices in pruned.values())
        level = logging.INFO if total else logging.WARNING
        log.log(level, "%s: %d weights are skilled at %s", self.name, total, concept.name)
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
        batches = [pairs[i : i + self.batch_size] for i in pairs[:: self.batch_size]]
        base, told = self.prompts(concept)
        with tqdm(
            total=self.first_steps * len(batches), desc=self.name, unit="step", disable=None
        ) as progress:
            for batch in batches:
                chosen = slice(batch.start, batch.stop)
                c = model.encode_prompts(base[chosen] + told[chosen])  # (2N, ...)
                for _ in self._walk(model, batch, c, squares):
                    progress.update()
        return squares

    def _walk(
        self,
        model: DiffusionModel,
        batch: Sequence[int],
        c: Conditioning,
        squares: Mapping[str, Tensor],
    ) -> Iterator[int]:
        """Samples N pairs for the first steps and adds to `squares`; yields after each step."""
        sampler = model.sampler(self.steps, "ddim", eta=0.0)
        unconditional = model.encode_prompts([""]).expand(len(c))
        noise = draw_noise(model, make_generators(batch, salt=f"{self.name}-{self.seed}"))
        x_t = torch.cat([noise, noise]) * sampler.init_sigma  # (2N, C, h, w)
        for step, t in enumerate(sampler.timesteps[: self.first_steps]):
            x_in = sampler.scale(x_t, t)
            with recorded(model.denoiser, {name: each[step] for name, each in squares.items()}):
                prediction = model.predict(x_in, t, c)
            yield step
            if step + 1 == self.first_steps:
                return
            if self.guidance != 1.0:
                phi_u = model.predict(x_in, t, unconditional)
                prediction = guide(phi_u, prediction, self.guidance)
            x_t = sampler.step(prediction, t, x_t, None)


def second_linears(model: DiffusionModel) -> dict[str, nn.Parameter]:
    """The second linear weight (out, in) of every feed-forward block, in the denoiser's order.

    Raises UserError for a model without any. Of a joint transformer, those of the image alone.
    """
    weights = {
        name: weight
        for name, weight in component_weights(model, "ff").items()
        if _SECOND_LINEAR.search(name)
    }
    if not weights:
        raise UserError(
            f"model={model.name} ({type(model.denoiser).__name__}) has no weight ff.net.2, the "
            "second linear layer of a feed-forward block, which is all that this method prunes."
        )
    return weights


@contextmanager
def recorded(denoiser: nn.Module, squares: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block, every forward adds the squares of its layers' inputs to `squares`.

    {name of a linear weight: (2, in)}; the first half of a batch counts for the first row, the
    second for the second. The hooks are gone afterwards, also after an exception.
    """
    hooks = []
    try:
        for name, sums in squares.items():
            layer = denoiser.get_submodule(name.removesuffix(".weight"))
            hooks.append(layer.register_forward_pre_hook(_adding_to(sums)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _adding_to(sums: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def add(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sums.add_(column_squares(inputs[0]).unflatten(0, (2, -1)).sum(dim=1))  # (2, in)

    return add


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


def _check_finite(squares: Mapping[str, Tensor], model: DiffusionModel) -> None:
    bad = [name for name, sums in squares.items() if not sums.isfinite().all()]
    if bad:
        raise UserError(
            f"edit={ConceptPrune.name}: the inputs of {len(bad)} layers of model={model.name} are "
            f"NaN or infinite (first: {bad[0]}): they overflow in dtype={model.dtype}. Use "
            "dtype=float32 or bfloat16; check the weights."
        )


def _check_template(key: str, template: object, concept: Collection[str] = ()) -> None:
    """A template names {filler}, or one of `concept` if there are any, and nothing else."""
    if not isinstance(template, str):
        raise UserError(f"edit.{key}={template!r} is not a text.")
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"edit.{key}={template!r} is not a template: {error}.") from error
    found = {field for _, field, _, _ in parts if field is not None}
    allowed = ", ".join(f"{{{name}}}" for name in ("filler", *concept))
    if unknown := found - {"filler", *concept}:
        raise UserError(
            f"edit.{key}={template!r} must not name {{{min(unknown)}}}; allowed: {allowed}."
        )
    if not concept and "filler" not in found:
        raise UserError(f"edit.{key}={template!r} lacks {{filler}}, which tells the pairs apart.")
    if concept and not found & set(concept):
        raise UserError(
            f"edit.{key}={template!r} does not name the concept: write {{concept}} for its text or "
            "{prompt} for its prompt."
        )


def _check_fillers(fillers: object) -> None:
    if isinstance(fillers, str) or not isinstance(fillers, Sequence) or not fillers:
        raise UserError(
            f"edit.fillers={fillers!r} is not allowed: it is a list of words, at least one, "
            "such as [forest, kitchen]."
        )
    for filler in fillers:
        if not isinstance(filler, str) or not filler.strip():
            raise UserError(f"edit.fillers has {filler!r}; each is a text that is not empty.")
