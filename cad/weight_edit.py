"""An edit of a model as a value: which weights, what becomes of them, and where it came from.

File format: a file of `cad.store` with a tensor per changed weight (indices or values) under the
weight's name.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cad.errors import UserError
from cad.identity import tensors_digest
from cad.instrument import Cost
from cad.models.adapters import adapt
from cad.models.base import DTYPES, DiffusionModel
from cad.store import DamagedFileError, read_tensors, write_tensors

FORMAT = "cad-weight-edit/1"
NO_EDIT = "none"  # fingerprint of an edit that changes nothing
ORIGIN = ("model", "rounded")  # of provenance: mappings
IDENTITY = ("id", "revision", "dtype", "fingerprint")  # of provenance.model: what a misfit names


@dataclass(frozen=True, eq=False)
class Change(ABC):
    """A change of one weight. `tensor` is stored: flat indices (k,) or new values, on the CPU."""

    tensor: Tensor
    kind: ClassVar[str]
    indexed: ClassVar[bool] = True
    factor: ClassVar[float | None] = None  # the number stored beside the tensor, if there is one

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensor", self.tensor.detach().cpu().contiguous())

    @property
    def canonical(self) -> Tensor:
        """The tensor with positions as int64: its form in fingerprints."""
        return self.tensor.long() if self.indexed else self.tensor

    @property
    def num_weights(self) -> int:
        return self.tensor.numel()

    @abstractmethod
    def misfit(self, weight: Tensor) -> str | None:
        """Why the change cannot be made to this weight; None if it can."""

    @abstractmethod
    def where(self, weight: Tensor) -> Any:
        """The index of the elements that change: weight[index] has exactly those."""

    @abstractmethod
    def values(self, old: Tensor) -> Tensor:
        """The elements' new values, from those that they had."""


class _Indexed(Change):
    """A change of single elements, at flat indices (k,), int32 or int64, into the weight."""

    def __post_init__(self) -> None:
        if self.tensor.dtype not in (torch.int32, torch.int64) or self.tensor.dim() != 1:
            raise ValueError(f"indices must be (k,) integers, got {tuple(self.tensor.shape)}")
        super().__post_init__()

    def misfit(self, weight: Tensor) -> str | None:
        if not self.num_weights:
            return None
        low, high = int(self.tensor.min()), int(self.tensor.max())
        if low < 0 or high >= weight.numel():
            return f"indices {low} to {high} do not fit into shape {tuple(weight.shape)}"
        return None

    def where(self, weight: Tensor) -> tuple[Tensor, ...]:
        """One (k,) tensor per dimension: right for every memory layout, unlike a flat view."""
        flat = self.tensor.to(weight.device, torch.int64)
        return torch.unravel_index(flat, weight.shape)


class Zero(_Indexed):
    """The elements become 0: a component is knocked out (paper Sec. 4.1)."""

    kind = "zero"

    def values(self, old: Tensor) -> Tensor:
        return torch.zeros_like(old)


@dataclass(frozen=True, eq=False)
class Scale(_Indexed):
    """The elements are multiplied by `factor` (paper Table 11)."""

    factor: float  # type: ignore[misc]  # the other changes have none
    kind = "scale"

    def values(self, old: Tensor) -> Tensor:
        return old * self.factor


class Replace(Change):
    """The whole tensor becomes the stored values (fine-tuning, closed forms)."""

    kind = "replace"
    indexed = False

    def misfit(self, weight: Tensor) -> str | None:
        if weight.shape != self.tensor.shape:
            return f"shape {tuple(self.tensor.shape)} is not the model's {tuple(weight.shape)}"
        return None

    def where(self, weight: Tensor) -> Any:
        return ...

    def values(self, old: Tensor) -> Tensor:
        return self.tensor


KINDS: dict[str, type[Change]] = {each.kind: each for each in (Zero, Scale, Replace)}


@dataclass(frozen=True)
class WeightEdit:
    """Changes of a denoiser's weights by parameter name, with their provenance.

    `provenance` is JSON-able; its "model" is `DiffusionModel.provenance()` of the model that the
    edit was made for, and "rounded" has the fingerprints of the same weights in half precision:
    loaded as such, they take the edit too. `cost` and `history`, a record per training step, are
    not stored.
    """

    changes: Mapping[str, Change]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    history: Sequence[Mapping[str, float]] = ()

    @property
    def num_weights(self) -> int:
        return sum(change.num_weights for change in self.changes.values())

    @cached_property  # ESD's edits have gigabytes, and every image set asks
    def fingerprint(self) -> str:
        """SHA-256 of the changes alone: the edit's identity in keys; "none" if nothing changes."""
        if not self.num_weights:
            return NO_EDIT
        return tensors_digest(
            (f"{name}|{each.kind}|{each.factor}", each.canonical)
            for name, each in self.changes.items()
            if each.num_weights
        )

    def __repr__(self) -> str:
        given = self.provenance
        concepts = ", ".join(each["name"] for each in given.get("concepts", ()))
        made = f"{given.get('edit', 'edit')} {concepts}".strip()
        model = given.get("model", {}).get("id", "no model")
        return f"WeightEdit({made}: {self.num_weights:,} weights of {model})"

    @contextmanager
    def applied(self, model: Any) -> Iterator[None]:
        """Edits the model inside the block; bit for bit as before after it, also if it raises.

        `model` is a `DiffusionModel` or a diffusers pipeline (`cad.models.adapters.adapt`). Edits
        nest: `model.edits` has those that are applied and change something, innermost last.
        Raises UserError, with the model untouched, if the edit was made for another.
        """
        adapter = model if isinstance(model, DiffusionModel) else adapt(model)
        weights = self._checked_weights(adapter)
        outer = adapter.edits
        saved: dict[str, Tensor] = {}
        try:
            self._change(weights, saved)
            if self.num_weights:
                adapter.edits = (*outer, self)
            yield
        finally:
            adapter.edits = outer
            with torch.no_grad():
                for name, original in saved.items():
                    weights[name][self.changes[name].where(weights[name])] = original

    def apply_for_good(self, pipeline: Any) -> None:
        """Edits a diffusers pipeline without a way back. Raises what `applied` raises."""
        self._change(self._checked_weights(adapt(pipeline)), {})

    @torch.no_grad()
    def _change(self, weights: Mapping[str, nn.Parameter], saved: dict[str, Tensor]) -> None:
        """Changes the weights, and puts what was there before into `saved`."""
        for name, change in self.changes.items():
            index = change.where(weights[name])
            saved[name] = weights[name][index].clone()
            weights[name][index] = change.values(saved[name])

    def save(self, path: Path | str) -> None:
        """Writes one safetensors file, atomically. Equal edits give equal bytes."""
        header = {
            "fingerprint": self.fingerprint,
            "changes": {name: [each.kind, each.factor] for name, each in self.changes.items()},
            "provenance": dict(self.provenance),
        }
        # Clones, because safetensors refuses tensors that share memory.
        tensors = {name: change.tensor.clone() for name, change in self.changes.items()}
        write_tensors(Path(path), tensors, header, FORMAT, hashed=False)

    @classmethod
    def load(cls, path: Path | str) -> WeightEdit:
        """Reads what `save` wrote. UserError if the file is missing, foreign, or damaged."""
        if not Path(path).is_file():
            raise UserError(f"there is no edit at {path}; an edit is a .safetensors file.")
        header, tensors = read_tensors(Path(path), FORMAT, hashed=False)
        try:
            written, kinds = header["fingerprint"], header["changes"]
            changes = {name: _change(tensor, *kinds[name]) for name, tensor in tensors.items()}
            edit = cls(changes, dict(header["provenance"]))
            if not all(isinstance(edit.provenance.get(key, {}), dict) for key in ORIGIN):
                raise TypeError(f"its provenance has no keys in {' or '.join(ORIGIN)}")
            if edit.fingerprint != written:
                raise ValueError(f"its content hashes to {edit.fingerprint}, not to {written}")
        except (LookupError, TypeError, ValueError) as error:
            raise DamagedFileError(
                f"the edit at {path} is damaged: {type(error).__name__}: {error}; make it again."
            ) from error
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
        if made_for["fingerprint"] != given["fingerprint"] and not self._is_rounded(model):
            theirs, ours = ({key: each[key] for key in IDENTITY} for each in (made_for, given))
            raise UserError(
                f"the edit was made for other weights than model={model.name}: {theirs}, and this "
                f"is {ours}. Load that one, or make the edit again for this one."
            )

    def _is_rounded(self, model: DiffusionModel) -> bool:
        """Whether the model's weights are those of the edit's, one of the two in half precision."""
        made_for, ours = self.provenance["model"], str(model.dtype).removeprefix("torch.")
        if ours == made_for["dtype"] or made_for["dtype"] not in DTYPES:
            return False
        if ours == "float32":
            return bool(model.rounded_fingerprint(made_for["dtype"]) == made_for["fingerprint"])
        rounded = self.provenance.get("rounded", {}).get(ours)
        return bool(rounded == model.provenance()["fingerprint"])


def _change(tensor: Tensor, kind: str, factor: float | None) -> Change:
    """The change of a stored kind. KeyError, TypeError or ValueError where there is none such."""
    change = KINDS[kind](tensor, *([] if factor is None else [float(factor)]))
    if not (tensor.isfinite().all() and math.isfinite(change.factor or 0)):
        raise ValueError("its values or a factor are not finite")
    if change.indexed and len(tensor.unique()) < len(tensor):
        raise ValueError("an index stands in it twice")
    return change
