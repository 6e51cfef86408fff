"""From prompts to what a denoiser is told: text encoders, and the conditioning that they give.

A text is <start> tokens <end> padding, L positions. Whatever the padding is (the end token again in
SD 1.x, "!" in SD 2.x), it follows the first end token, and CLIP's mask is causal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cad.errors import UserError

T5_TOKENS = 256  # the pipelines' default
FIRST = 1  # the position after the start token


@dataclass(frozen=True)
class Conditioning:
    """What a denoiser is told about N prompts: named tensors, each (N, ...).

    Which names there are is the adapter's business ("states"; "pooled" and "time_ids" for XL).
    """

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def __getitem__(self, index: slice | Tensor) -> Conditioning:
        """The prompts of a slice or of a (M,) int64 tensor, in that order."""
        return Conditioning({name: tensor[index] for name, tensor in self.tensors.items()})

    def split(self) -> list[Conditioning]:
        """Each prompt by itself, (1, ...)."""
        return [self[i : i + 1] for i in range(len(self))]

    def expand(self, n: int) -> Conditioning:
        """One prompt for n images, without copying: (1, ...) -> (n, ...)."""
        return Conditioning(
            {name: tensor.expand(n, *tensor.shape[1:]) for name, tensor in self.tensors.items()}
        )

    def to(self, device: torch.device | str) -> Conditioning:
        """The same prompts on a device; tensors that are there are not copied."""
        return Conditioning({name: tensor.to(device) for name, tensor in self.tensors.items()})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Prompts of several conditionings one after another: (N_1 + N_2 + ..., ...)."""
        names = parts[0].tensors
        return Conditioning({name: torch.cat([p.tensors[name] for p in parts]) for name in names})


class TextEncoder:
    """One of a pipeline's text encoders with its tokenizer."""

    def __init__(self, model: str, pipeline: Any, suffix: str) -> None:
        """`suffix` ends its names in the pipeline: "", "_2" or "_3"; `model` is for messages."""
        self.model, self.suffix = model, suffix
        self.tokenizer = getattr(pipeline, f"tokenizer{suffix}")
        self.network = getattr(pipeline, f"text_encoder{suffix}").eval().requires_grad_(False)
        # Positions, with the tokens that start and end a text; T5 has no end of them.
        positions = getattr(self.network.config, "max_position_embeddings", T5_TOKENS)
        self.max_tokens = int(positions)

    def count(self, prompt: str) -> int:
        """Tokens of a prompt, not cut, with those that start and end it."""
        return len(self.tokenizer(prompt, verbose=False).input_ids)

    def check(self, prompts: Sequence[str]) -> None:
        """UserError if a prompt is longer than the network takes. Runs no network."""
        for prompt in prompts:
            length = self.count(prompt)
            if length > self.max_tokens:
                raise UserError(
                    f"the prompt {prompt!r} has {length} tokens; the text encoder of model="
                    f"{self.model} takes {self.max_tokens}, with start and end. Shorten it (for a "
                    "concept: concept.prompt and concept.base_prompt)."
                )

    def token_ids(self, prompts: Sequence[str]) -> Tensor:
        """(N, L) int64, each prompt padded or cut to L = max_tokens."""
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.max_tokens,
            truncation=True,
            return_tensors="pt",
        )
        ids: Tensor = tokens.input_ids
        return ids

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        device: torch.device,
        layer: int | None = None,
        *,
        truncate: bool,
        apart: bool,
    ) -> Conditioning:
        """The "states" (N, L, D) and, if the network embeds whole texts, these as "pooled" (N, P).

        The states are the last ones, or those of a `layer` from the end, -2 for the last but one.
        The network works on `device`. The rest is as in `DiffusionModel.encode_prompts`.
        """
        if not truncate:
            self.check(prompts)
        encoded = []
        with visiting(self.network, device):
            for piece in [[prompt] for prompt in prompts] if apart else [prompts]:
                ids = self.token_ids(piece).to(device)  # (N or 1, L)
                output = self.network(ids, output_hidden_states=layer is not None)
                states = output.last_hidden_state if layer is None else output.hidden_states[layer]
                pooled = {"pooled": output.text_embeds} if "text_embeds" in output else {}
                encoded.append(Conditioning({"states": states, **pooled}))
        return Conditioning.cat(encoded)


class TokenSpace:
    """The vocabulary of a text encoder, and its way from token ids or embeddings to a conditioning.

    For encoders whose last hidden states are the whole conditioning (Stable Diffusion 1.x, 2.x).
    Ids are int64. The network is left without gradients of its own, and without hooks.
    """

    def __init__(self, text: TextEncoder, device: torch.device) -> None:
        """`device` is where the network works."""
        self._text, self._device = text, device
        special = set(text.tokenizer.all_special_ids)
        self.length = text.max_tokens  # L, with the tokens that start and end a text
        # (U,) ids that an adversarial prompt may hold: no start, end or padding.
        self.usable = torch.tensor([i for i in range(len(text.tokenizer)) if i not in special])

    @property
    def vocabulary(self) -> Tensor:
        """The embeddings of all tokens, (V, D), in the network's dtype."""
        weight: Tensor = self._table.weight.detach()
        return weight.to(self._device)

    def ids(self, prompts: Sequence[str]) -> Tensor:
        """(N, L) ids, each prompt padded to L, or cut where it is longer."""
        return self._text.token_ids(prompts)

    def prepend(self, prompts: Sequence[str], count: int, *, truncate: bool = False) -> Tensor:
        """(N, L) ids of prompts with `count` places right after the start token.

        The places hold any usable token, for the caller to replace. Raises UserError for a prompt
        that leaves no room for them, unless `truncate`: then it loses its last tokens.
        """
        if not 1 <= count <= self.length - 2:
            raise UserError(
                f"{count} adversarial tokens are not allowed: the text encoder of model="
                f"{self._text.model} takes 1 to {self.length - 2} beside start and end; "
                "attack.tokens, or search.tokens, says how many."
            )
        for prompt in () if truncate else prompts:
            length = self._text.count(prompt)
            if length + count > self.length:
                raise UserError(
                    f"the prompt {prompt!r} has {length} tokens and leaves no room for {count} "
                    f"more: the text encoder of model={self._text.model} takes {self.length}, with "
                    "start and end. Shorten it, or use fewer adversarial tokens."
                )
        ids = self.ids(prompts)  # (N, L)
        places = self.usable[:1].expand(len(ids), count)
        longer = torch.cat([ids[:, :FIRST], places, ids[:, FIRST:]], dim=1)  # (N, L + count)
        cut = longer[:, : self.length].clone()  # (N, L)
        end = self._text.tokenizer.eos_token_id
        cut[~(cut == end).any(dim=1), -1] = end
        return cut

    @torch.no_grad()
    def encode_ids(self, ids: Tensor) -> Conditioning:
        """The conditioning of (N, L) ids, without gradient, as `DiffusionModel.encode_prompts`."""
        return self._encoded(ids)

    def encode(self, ids: Tensor, embeddings: Tensor, position: int = FIRST) -> Conditioning:
        """The conditioning of (N, L) ids with `embeddings` (N, k, D) in place of k tokens.

        They take the places from `position` on. Differentiable in them. A model that is offloaded
        needs a `DiffusionModel.encoding` block around this and the backward pass.
        """
        after = position + embeddings.shape[1]

        def replace(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            given = embeddings.to(output.device, output.dtype)
            return torch.cat([output[:, :position], given, output[:, after:]], dim=1)  # (N, L, D)

        handle = self._table.register_forward_hook(replace)
        try:
            return self._encoded(ids)
        finally:
            handle.remove()

    def decode(self, ids: Tensor) -> list[str]:
        """The texts of (N, any length) ids, each up to its end token, without special tokens."""
        tokenizer = self._text.tokenizer
        end = tokenizer.eos_token_id
        rows = [row[: [*row, end].index(end)] for row in ids.tolist()]
        return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in rows]

    def reread(self, ids: Tensor) -> Tensor:
        """The (N, L) ids that the tokenizer reads from the texts of (N, any length) ids.

        They may be others: tokens "chu" and "rch" have the text of the token "church".
        """
        return self.ids(self.decode(ids))

    @property
    def _table(self) -> Any:
        return self._text.network.get_input_embeddings()

    def _encoded(self, ids: Tensor) -> Conditioning:
        with visiting(self._text.network, self._device):
            states = self._text.network(ids.to(self._device)).last_hidden_state  # (N, L, D)
        return Conditioning({"states": states})


@contextmanager
def visiting(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The module is on the device inside the block; then it is as it was, without a copy back."""
    tensors = [*module.parameters(), *module.buffers()]
    home = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device)
        yield
    finally:
        for tensor, data in zip(tensors, home, strict=True):
            tensor.data = data
