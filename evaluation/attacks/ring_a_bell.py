"""Ring-A-Bell (Tsai et al. 2024, arXiv 2310.10012): prompts found by the text encoder alone.

With f(P) the states of all L positions of a prompt P, and N pairs of prompts with and without the
concept c:

    c_hat = 1/N sum_i [f(P_i^c) - f(P_i^not-c)]             the concept's vector
    P_hat = argmin || f(P_hat) - (f(P) + eta c_hat) ||^2    over prompts of K tokens

by a genetic algorithm. No denoiser is asked, so a prompt is for every model with this encoder.

A generation: each of the kept candidates mates with another at the rate of crossover, two children
that swap tails; parents and children have one token replaced at the rate of mutation; the best of
all are kept, half as many as the population. Departures from the released search: parents stay
beside their mutated copies, so the loss never rises; equal candidates count once; and, because what
is found is used as a text, candidates whose text is read otherwise are dropped.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from tqdm import tqdm

from cad.checks import check, share, whole
from cad.errors import UserError
from cad.identity import Identified
from cad.models.conditioning import FIRST, TokenSpace

VERSION = 1  # raise it when equal settings find something else


@dataclass(frozen=True)
class Genetics(Identified):
    """How a prompt is searched for. Raises UserError for values out of range."""

    tokens: int  # K
    population: int  # candidates at first; half as many are kept of each generation
    generations: int
    crossover: float  # rate, in [0, 1]
    mutation: float  # rate, in [0, 1]

    def __post_init__(self) -> None:
        check(self, "search", tokens=whole(1), population=whole(2), generations=whole(0))
        check(self, "search", crossover=share, mutation=share)


@dataclass(frozen=True)
class Found:
    """The best prompt of a search."""

    text: str
    tokens: list[int]  # K ids, which the tokenizer reads from the text
    losses: list[float]  # the least of the first candidates, then of each generation


def concept_vector(space: TokenSpace, pairs: Sequence[tuple[str, str]]) -> Tensor:
    """c_hat of (with, without) pairs of prompts: the mean difference of states, (L, D) float32.

    Prompts are cut where they are longer than the encoder takes. Raises UserError for no pairs.
    """
    if not pairs:
        raise UserError("there are no pairs of prompts, so the concept has no vector: set pairs")
    having = _states(space, space.ids([pair[0] for pair in pairs]))  # (N, L, D)
    lacking = _states(space, space.ids([pair[1] for pair in pairs]))  # (N, L, D)
    return (having - lacking).mean(dim=0)


def target_states(space: TokenSpace, prompt: str, c_hat: Tensor, eta: float) -> Tensor:
    """f(P) + eta c_hat, (L, D) float32; the prompt is cut where it is too long."""
    return _states(space, space.ids([prompt]))[0] + eta * c_hat


def whole_words(space: TokenSpace, avoid: Collection[str] = ()) -> Tensor:
    """(W,) ids of the tokens that are printable words, read back from their text as they are.

    Those whose text is among `avoid` are left out, in upper or lower case. Raises UserError where
    nothing is left.
    """
    ids = space.usable[:, None]  # (U, 1)
    banned = {"", *(word.casefold() for word in avoid)}
    texts = space.decode(ids)
    fit = torch.tensor([t.isprintable() and t.casefold() not in banned for t in texts])  # (U,)
    words = space.usable[fit & _survive(space, ids)]
    if not len(words):
        raise UserError("the tokenizer has no token that is a word of its own, beside `avoid`")
    return words


class RingABell:
    """The genetic search for prompts of one text encoder, which it leaves as found."""

    def __init__(self, space: TokenSpace, words: Tensor, genetics: Genetics) -> None:
        """`words` (W,) are the ids to choose from. UserError for more tokens than fit."""
        self._space, self._words, self._genetics = space, words, genetics
        space.prepend([""], genetics.tokens)  # refuses what does not fit

    def search(
        self, target: Tensor, generator: Generator, progress: tqdm[Any] | None = None
    ) -> Found:
        """The prompt that is found nearest to `target` (L, D); the same for the same generator.

        `progress` counts generations. Raises UserError where none of the first candidates survives
        as a text.
        """
        count, k = self._genetics.population, self._genetics.tokens
        kept, losses = self._selected(*self._measured(self._drawn((count, k), generator), target))
        if not len(kept):
            raise UserError(
                f"none of the first {count} candidates of {k} tokens is read back from its text: "
                "raise search.population, or lower search.tokens"
            )
        history = [float(losses[0])]
        for _ in range(self._genetics.generations):
            new, theirs = self._measured(self._offspring(kept, generator), target)
            kept, losses = self._selected(torch.cat([kept, new]), torch.cat([losses, theirs]))
            history.append(float(losses[0]))
            if progress is not None:
                progress.update()
        (text,) = self._space.decode(kept[:1])
        return Found(text, kept[0].tolist(), history)

    def _offspring(self, parents: Tensor, generator: Generator) -> Tensor:
        """The newcomers of a generation with parents (n, K): children and mutants, (m, K)."""
        n, k = parents.shape
        mates = parents[torch.randint(n, (n,), generator=generator)]  # (n, K)
        mating = torch.rand(n, generator=generator) < self._genetics.crossover  # (n,)
        cut = torch.randint(1, max(k, 2), (n, 1), generator=generator)
        head = torch.arange(k) < cut  # (n, K)
        one, other = torch.where(head, parents, mates), torch.where(head, mates, parents)
        everyone = torch.cat([parents, one[mating], other[mating]])  # (m', K)
        m = len(everyone)
        mutating = torch.rand(m, generator=generator) < self._genetics.mutation  # (m',)
        place = torch.randint(k, (m, 1), generator=generator)
        mutants = everyone.scatter(1, place, self._drawn((m, 1), generator))  # (m', K)
        new = mutating | (torch.arange(m) >= n)
        return torch.where(mutating[:, None], mutants, everyone)[new]  # (m, K)

    def _drawn(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        """Ids of words, each as likely as any other."""
        return self._words[torch.randint(len(self._words), shape, generator=generator)]

    def _measured(self, candidates: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the candidates (m, K) that survive as a text, (n, K), and their losses, (n,)."""
        if len(candidates):
            candidates = candidates[_survive(self._space, candidates)]  # (n, K)
        if not len(candidates):
            return candidates, torch.zeros(0)
        errors = _states(self._space, _framed(self._space, candidates)) - target  # (n, L, D)
        return candidates, errors.square().sum(dim=(1, 2)).cpu()

    def _selected(self, candidates: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
        """The best of different candidates, half as many as the population, the best one first."""
        unique, places = candidates.unique(dim=0, return_inverse=True)  # (u, K), (m,)
        least = torch.full((len(unique),), torch.inf).scatter_reduce(0, places, losses, "amin")
        order = least.argsort(stable=True)[: self._genetics.population // 2]
        return unique[order], least[order]


def _framed(space: TokenSpace, tokens: Tensor) -> Tensor:
    """(n, L) ids of whole texts, padded, of (n, K) tokens."""
    k = tokens.shape[1]
    rows = space.prepend([""], k).repeat(len(tokens), 1)
    rows[:, FIRST : FIRST + k] = tokens
    return rows


def _survive(space: TokenSpace, tokens: Tensor) -> Tensor:
    """(n,) bool: whether the tokenizer reads (n, K) tokens back from their text, n > 0."""
    return (space.reread(tokens) == _framed(space, tokens)).all(dim=1)


def _states(space: TokenSpace, ids: Tensor) -> Tensor:
    """f of (n, L) ids: (n, L, D) float32."""
    return space.encode_ids(ids).tensors["states"].float()
