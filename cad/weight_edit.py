"""An edit of a model as a value: which weights, what becomes of them, and where it came from.

File format: one safetensors file, a tensor per changed weight (indices or values) under the
weight's name, and one metadata entry with JSON. One entry only, because safetensors writes several
in random order, and equal edits are to be equal files.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cad.digests import tensors_digest
from cad.errors import UserError
from cad.files import atomic_path
from cad.instrument import Cost
from cad.models.base import DiffusionModel

FORMAT = "cad-weight-edit/1"
NO_EDIT = "none"  # fingerprint of an edit that changes nothing
IDENTITY = ("id", "revision", "dtype", "fingerprint")  # of provenance.model: what a misfit names


class Change(ABC):
    """What becomes of one weight tensor."""

    kind: ClassVar[str]
    factor: float | None = None  # the number stored beside the tensor, if the change has one

    @property
    @abstractmethod
    def tensor(self) -> Tensor:
        """What is stored: flat indices (k,) or new values, on the CPU."""

    @property
    def canonical(self) -> Tensor:
        """The stored tensor in the one form that a fingerprint is made of."""
        return self.tensor

    @property
    def num_weights(self) -> int:
        return self.tensor.numel()

    @abstractmethod
    def misfit(self, weight: Tensor) -> str | None:
        """Why the change cannot be made to this weight; None if it can."""

    @abstractmethod
    def read(self, weight: Tensor) -> Tensor:
        """A copy of exactly those elements that `write` changes."""

    @abstractmethod
    def restore(self, weight: Tensor, saved: Tensor) -> None:
        """Puts back, in place and bit for bit, what `read` returned."""

    @abstractmethod
    def write(self, weight: Tensor) -> None:
        """Makes the change in place."""


@dataclass(frozen=True, eq=False)
class _Indexed(Change):
    """A change of single elements: `indices` (k,), int32 or int64, flat into the weight."""

    indices: Tensor

    def __post_init__(self) -> None:
        if self.indices.dtype not in (torch.int32, torch.int64) or self.indices.dim() != 1:
            raise ValueError(f"indices must be (k,) integers, got {tuple(self.indices.shape)}")
        object.__setattr__(self, "indices", self.indices.detach().cpu())

    @property
    def tensor(self) -> Tensor:
        return self.indices

    @property
    def canonical(self) -> Tensor:
        return self.indices.long()  # equal positions are equal, int32 or int64

    def misfit(self, weight: Tensor) -> str | None:
        if not self.num_weights:
            return None
        low, high = int(self.indices.min()), int(self.indices.max())
        if low < 0 or high >= weight.numel():
            return f"indices {low} to {high} do not fit into shape {tuple(weight.shape)}"
        return None

    def read(self, weight: Tensor) -> Tensor:
        return weight[self._positions(weight)]  # (k,); advanced indexing copies

    def restore(self, weight: Tensor, saved: Tensor) -> None:
        weight.index_put_(self._positions(weight), saved)

    def _positions(self, weight: Tensor) -> tuple[Tensor, ...]:
        """One (k,) tensor per dimension: right for every memory layout, unlike a flat view."""
        flat = self.indices.to(weight.device, torch.int64)
        return torch.unravel_index(flat, weight.shape)


@dataclass(frozen=True, eq=False)
class Zero(_Indexed):
    """The elements become 0: a component is knocked out (paper Sec. 4.1)."""

    kind: ClassVar[str] = "zero"

    def write(self, weight: Tensor) -> None:
        weight.index_put_(self._positions(weight), weight.new_zeros(()))


@dataclass(frozen=True, eq=False)
class Scale(_Indexed):
    """The elements are multiplied by `factor` (paper Table 11)."""

    factor: float = field()  # a bare annotation would inherit the base class's None as default
    kind: ClassVar[str] = "scale"

    def write(self, weight: Tensor) -> None:
        weight.index_put_(self._positions(weight), self.read(weight) * self.factor)


@dataclass(frozen=True, eq=False)
class Replace(Change):
    """The whole tensor becomes `values`, of the weight's shape (fine-tuning, closed forms)."""

    values: Tensor
    kind: ClassVar[str] = "replace"

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", self.values.detach().cpu().contiguous())

    @property
    def tensor(self) -> Tensor:
        return self.values

    def misfit(self, weight: Tensor) -> str | None:
        if weight.shape != self.values.shape:
            return f"shape {tuple(self.values.shape)} is not the model's {tuple(weight.shape)}"
        return None

    def read(self, weight: Tensor) -> Tensor:
        return weight.clone()

    def restore(self, weight: Tensor, saved: Tensor) -> None:
        weight.copy_(saved)

    def write(self, weight: Tensor) -> None:
        weight.copy_(self.values)


@dataclass(frozen=True, eq=False)
class WeightEdit:
    """Changes of a denoiser's weights by parameter name, with their provenance.

    `provenance` is JSON-able; its "model" is `DiffusionModel.provenance()` of the model that the
    edit was made for. `cost` is what making it took (`cad.instrument`), `history` how it went, a
    record per training step (none for most methods); these two are not stored.
    """

    changes: Mapping[str, Change]
    provenance: Mapping[str, Any]
    cost: Cost = field(default_factory=Cost)
    history: Sequence[Mapping[str, float]] = ()

    @property
    def num_weights(self) -> int:
        return sum(change.num_weights for change in self.changes.values())

    @cached_property  # ESD's edits have gigabytes, and every task of an engine asks
    def fingerprint(self) -> str:
        """SHA-256 of the changes alone: the edit's identity in keys; "none" if nothing changes."""
        if not self.num_weights:
            return NO_EDIT
        return tensors_digest(
            (f"{name}|{change.kind}|{change.factor}", change.canonical)
            for name, change in self.changes.items()
            if change.num_weights
        )

    @contextmanager
    def applied(self, model: DiffusionModel) -> Iterator[None]:
        """Edits the model inside the block; bit for bit as before after it, also if it raises.

        Edits nest. Raises UserError, with the model untouched, if the edit was made for another.
        """
        weights = self._checked_weights(model)
        saved: dict[str, Tensor] = {}
        try:
            with torch.no_grad():
                for name, change in self.changes.items():
                    saved[name] = change.read(weights[name])
                    change.write(weights[name])
            yield
        finally:
            with torch.no_grad():
                for name, original in saved.items():
                    self.changes[name].restore(weights[name], original)

    def apply_permanently(self, model: DiffusionModel) -> None:
        """Edits the model for good; its fingerprint changes. Raises UserError as `applied`."""
        weights = self._checked_weights(model)
        with torch.no_grad():
            for name, change in self.changes.items():
                change.write(weights[name])
        model.forget_digests()

    def save(self, path: Path) -> None:
        """Writes one safetensors file, atomically. Equal edits give equal bytes."""
        header = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "changes": {n: [c.kind, c.factor] for n, c in sorted(self.changes.items())},
            "provenance": dict(self.provenance),
        }
        # Clones, because safetensors refuses tensors that share memory.
        tensors = {name: change.tensor.clone() for name, change in self.changes.items()}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, {"cad": json.dumps(header, sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> WeightEdit:
        """Reads what `save` wrote. UserError if the file is missing, foreign, or damaged."""
        if not path.is_file():
            raise UserError(f"there is no edit at {path}; an edit is a .safetensors file.")
        try:
            header, tensors = _read(path)
            written, kinds = str(header["fingerprint"]), dict(header["changes"])
            changes = {name: _change(kinds[name], tensor) for name, tensor in tensors.items()}
            edit = cls(changes, dict(header["provenance"]))
        except (SafetensorError, LookupError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"the edit at {path} is damaged ({reason}); make it again.") from error
        if edit.fingerprint != written:
            raise UserError(
                f"the edit at {path} is damaged: its content hashes to {edit.fingerprint}, "
                f"written was {written}; make it again."
            )
        return edit

    def _checked_weights(self, model: DiffusionModel) -> dict[str, nn.Parameter]:
        """The weights to change. UserError if the edit was made for other weights."""
        weights = dict(model.denoiser.named_parameters())
        for name, change in self.changes.items():
            if name not in weights:
                raise UserError(f"the edit changes {name!r}, which model={model.name} lacks.")
            misfit = change.misfit(weights[name])
            if misfit is not None:
                raise UserError(f"the edit of {name!r} does not fit model={model.name}: {misfit}.")
        if self.changes:
            self._check_origin(model)
        return weights

    def _check_origin(self, model: DiffusionModel) -> None:
        made_for, given = self.provenance.get("model"), model.provenance()
        if not isinstance(made_for, Mapping) or not made_for.keys() >= set(IDENTITY):
            raise UserError("the edit does not say which model it was made for: provenance.model.")
        if made_for["fingerprint"] != given["fingerprint"]:
            raise UserError(
                f"the edit was made for other weights than model={model.name}: "
                f"{_describe(made_for)}, and this is {_describe(given)}. Load that model, "
                "revision and dtype, or make the edit again for this one."
            )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {}).get("cad", "{}"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else header
        raise UserError(
            f"{path} is not an edit of this package: its format is {found!r}, "
            f"{FORMAT!r} is allowed."
        )
    return header, tensors


def _change(stored: tuple[str, float | None], tensor: Tensor) -> Change:
    kind, factor = stored
    if kind == Zero.kind:
        return Zero(tensor)
    if kind == Scale.kind and isinstance(factor, int | float):
        return Scale(tensor, factor)
    if kind == Replace.kind:
        return Replace(tensor)
    raise UserError(
        f"the edit has a change of unknown kind {kind!r}; allowed: zero, scale, replace."
    )


def _describe(provenance: Mapping[str, Any]) -> str:
    return (
        f"{provenance['id']} at revision {provenance['revision']} in {provenance['dtype']} "
        f"(fingerprint {provenance['fingerprint'][:12]})"
    )
