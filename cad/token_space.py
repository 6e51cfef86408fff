"""Prompts as tokens and token embeddings of one text encoder, for attacks that search for prompts.

A text is <start> tokens <end> padding, L positions. Whatever the padding is (the end token again in
SD 1.x, "!" in SD 2.x), it follows the first end token, and the encoder's mask is causal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cad.errors import UserError
from cad.models.conditioning import Conditioning, TextEncoder, visiting

FIRST = 1  # the position after the start token


class TokenSpace:
    """The vocabulary of a text encoder, and its way from token ids or embeddings to a conditioning.

    For encoders whose last hidden states are the whole conditioning (Stable Diffusion 1.x, 2.x).
    Ids are int64. The network is left without gradients of its own, and without hooks.
    """

    def __init__(self, name: str, text: TextEncoder, device: torch.device) -> None:
        """`name` is the model's, for messages; `device` is where the network works."""
        self._name, self._text, self._device = name, text, device
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
                f"{self._name} takes 1 to {self.length - 2} beside start and end."
            )
        for prompt in () if truncate else prompts:
            length = self._text.count(prompt)
            if length + count > self.length:
                raise UserError(
                    f"the prompt {prompt!r} has {length} tokens and leaves no room for {count} "
                    f"more: the text encoder of model={self._name} takes {self.length}, with start "
                    "and end. Shorten it, or use fewer adversarial tokens."
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
