"""Fine-tuning a denoiser towards given predictions: the loop that ESD, SalUn and others share.

A method says what each optimiser step is to teach (`Lesson`): states, the prompts that they are
seen with, and what the prediction there is to become; mean squared error, Adam. The network is Phi
in its own parameterisation. In half precision the trained weights are float32 with autocast, while
whatever only looks is in the model's own dtype.
"""

from __future__ import annotations

import logging
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from baselines.checkpoint import Checkpoint, Progress
from cad.checks import check, flag, one_of, positive, seed, steps, whole
from cad.components import matching_weights, text_projections
from cad.concepts import Concept
from cad.edits import Edit
from cad.errors import UserError
from cad.identity import digest, immaterial
from cad.instrument import Cost, measure
from cad.models.base import DiffusionModel, check_gradient_checkpointing, checkpointed_gradients
from cad.models.conditioning import Conditioning
from cad.weight_edit import Change, Replace, WeightEdit

log = logging.getLogger(__name__)

PARAMETERS = {  # what is trained: regular expressions over the denoiser's parameter names
    "noxattn": r"^(?!.*\.attn2\.)",  # ESD-u: all but cross-attention
    "xattn": r"\.attn2\.",  # ESD-x: cross-attention
    "xattn_kv": r"\.attn2\.(to_k|to_v)\.",  # what reads the prompt alone
    "selfattn": r"\.attn1\.",
    "full": r"",
}

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Lesson:
    """What an optimiser step teaches, of L states; `target(part)` are those of a slice of them."""

    x_t: Tensor  # (L, C, h, w), as the network takes it
    t: Tensor  # (L,)
    c: Conditioning  # (L, ...), with which the trained network predicts
    target: Callable[[slice], Tensor]  # (l, C, h, w) float32, without gradient
    weight: Tensor | None = None  # (L,) of each state's error; None: 1


@dataclass(frozen=True)
class Course:
    """All lessons, by the step's number and the weights as they are then; {name: mask} of some."""

    lesson: Callable[[int, Weights], Lesson]
    masks: Weights = field(default_factory=dict)  # what gradients are multiplied by


@dataclass(frozen=True, kw_only=True)
class Trained(Edit):
    """A method that fine-tunes; UserError for a value that is not allowed.

    An optimiser step ("iteration") sees batch_size * accumulation states of a kind. With
    `checkpoints`, a folder, a killed training goes on where it last wrote its state, which stays
    until `clean_up`.
    """

    parameters: str  # a key of PARAMETERS
    iterations: int = 1000  # optimiser steps
    lr: float = 1e-5  # Adam's
    steps: int = 50  # levels of noise: DDIM steps from noise to image
    batch_size: int = 1  # states whose gradient is taken at once
    accumulation: int = 1  # batches per optimiser step
    seed: int = 0
    gradient_checkpointing: bool = False  # less memory, more time, the same gradients
    checkpoint_every: int = immaterial(100)  # iterations
    checkpoints: str | None = immaterial(None)  # folder of their folders; None: there are none

    def __post_init__(self) -> None:
        counts = ("iterations", "batch_size", "accumulation", "checkpoint_every")
        check(self, "edit", **dict.fromkeys(counts, whole(1)))
        check(self, "edit", parameters=one_of(PARAMETERS), gradient_checkpointing=flag)
        check(self, "edit", seed=seed, lr=positive, steps=steps)

    @property
    def states(self) -> int:
        """M, the states of a kind in an optimiser step."""
        return self.batch_size * self.accumulation

    @abstractmethod
    def texts(self, concepts: Sequence[Concept]) -> list[str]:
        """All prompts that are trained on; those that are too long are refused."""

    @abstractmethod
    def course(
        self, model: DiffusionModel, concepts: Sequence[Concept], originals: Weights
    ) -> Course:
        """What is taught; asked for once, before the training. `originals` will be trained."""

    def make(self, model: DiffusionModel, concepts: Sequence[Concept]) -> WeightEdit:
        weights = trained_weights(model, self.parameters)
        model.sampler(self.steps, "ddim", eta=0.0)  # these refuse what could not work
        model.check_prompts(self.texts(concepts))
        wanted = self.gradient_checkpointing
        check_gradient_checkpointing(model, wanted, "edit.gradient_checkpointing")
        checkpoint = self._checkpoint(model, concepts)
        saved = checkpoint.read() if checkpoint else None
        checkpointing = checkpointed_gradients(model.denoiser, wanted)
        with measure(model.device) as meter, checkpointing, logging_redirect_tqdm():
            training = Training(self, model, weights, concepts)
            history = []
            if saved is not None:
                training.load(saved)
                history, meter.cost = saved.history, saved.cost
                saved = None  # several times as large as the model
            for i in tqdm(range(len(history), self.iterations), self.name, disable=None):
                history.append({"step": i + 1, "loss": float(f"{training.step(i):.6g}")})
                if checkpoint and (i + 1) % self.checkpoint_every == 0 and i + 1 < self.iterations:
                    with meter.paused():
                        checkpoint.write(training.progress(history, meter.cost))
            changes = training.changes()
        return WeightEdit(changes, cost=meter.cost, history=tuple(history))

    def clean_up(self, model: DiffusionModel, concepts: Sequence[Concept]) -> None:
        if checkpoint := self._checkpoint(model, concepts):
            checkpoint.remove()

    def _checkpoint(self, model: DiffusionModel, concepts: Sequence[Concept]) -> Checkpoint | None:
        if self.checkpoints is None:
            return None
        return Checkpoint(Path(self.checkpoints) / digest(self.provenance(model, concepts)))


class Training:
    """The trained weights, with Adam. The model keeps its own all along.

    `weights` are float32 copies, in the denoiser's place only while the trained model predicts.
    """

    def __init__(
        self,
        settings: Trained,
        model: DiffusionModel,
        originals: Mapping[str, nn.Parameter],
        concepts: Sequence[Concept],
    ) -> None:
        self._settings, self._model, self._originals = settings, model, originals
        self._dtype = model.dtype  # asked now: inside `with_weights` it would be another
        self._course = settings.course(model, concepts, originals)
        self.weights = {}  # float32, or wider if the originals are
        for name, weight in originals.items():
            dtype = torch.promote_types(weight.dtype, torch.float32)
            self.weights[name] = weight.detach().to(dtype, copy=True).requires_grad_()
        # Fused, because the GPU's default works on temporary copies of all weights.
        fused = model.device.type == "cuda"
        self._adam = torch.optim.Adam(self.weights.values(), lr=settings.lr, fused=fused)
        self._scaler = torch.amp.GradScaler(model.device.type, enabled=self._dtype == torch.float16)

    def step(self, i: int) -> float:
        """One optimiser step. Returns the mean loss of its states, before the step.

        All its random numbers come from the seed and i. UserError for a loss that is not finite.
        """
        # In the model's dtype, as the finished edit will be used; float32 weights are not copied.
        weights = {name: weight.detach().to(self._dtype) for name, weight in self.weights.items()}
        lesson = self._course.lesson(i, weights)
        del weights
        loss = 0.0
        for start in range(0, len(lesson.x_t), self._settings.batch_size):
            part = slice(start, start + self._settings.batch_size)
            work = self._backward, i, lesson, part, lesson.target(part)
            loss += with_weights(self._model.denoiser, self.weights, *work)
        for name, mask in self._course.masks.items():
            if (gradient := self.weights[name].grad) is not None:
                gradient.mul_(mask)
        self._scaler.step(self._adam)
        self._scaler.update()
        self._adam.zero_grad()
        return loss

    def progress(self, history: Sequence[dict[str, float]], cost: Cost) -> Progress:
        """Everything that `load` takes up again. Shares memory with the training."""
        tensors = {f"weight/{name}": weight.detach() for name, weight in self.weights.items()}
        for index, moments in self._adam.state_dict()["state"].items():
            tensors |= {f"adam/{index}/{key}": tensor for key, tensor in moments.items()}
        return Progress(tensors, self._scaler.state_dict(), list(history), cost)

    def load(self, saved: Progress) -> None:
        """Goes on from where the progress was written down."""
        moments: dict[int, dict[str, Tensor]] = {}
        for label, tensor in saved.tensors.items():
            kind, name, *key = label.split("/")
            if kind == "weight":
                self.weights[name].data.copy_(tensor)
            else:
                moments.setdefault(int(name), {})[key[0]] = tensor
        self._adam.load_state_dict(self._adam.state_dict() | {"state": moments})
        self._scaler.load_state_dict(saved.scaler)

    def changes(self) -> dict[str, Change]:
        """The trained weights in the model's dtype, without those that did not change in it."""
        changes: dict[str, Change] = {}
        for name, original in self._originals.items():
            values = self.weights[name].detach().to(original.dtype)
            if not values.isfinite().all():
                raise self._diverged(f"trained {name} is not finite")
            if not torch.equal(values, original):
                changes[name] = Replace(values)
        if not changes:
            name = self._settings.name
            log.warning("edit=%s changed nothing: its steps vanish in %s", name, self._dtype)
        return changes

    def _backward(self, i: int, lesson: Lesson, part: slice, target: Tensor) -> float:
        """Adds a batch's share of the gradient; returns its share of the loss.

        The backward belongs inside `with_weights`: gradient checkpointing runs the denoiser again
        there.
        """
        half = self._dtype in (torch.float16, torch.bfloat16)
        with torch.enable_grad():
            with torch.autocast(self._model.device.type, self._dtype, enabled=half):
                prediction = self._model.predict(lesson.x_t[part], lesson.t[part], lesson.c[part])
            if lesson.weight is None:
                loss = F.mse_loss(prediction.float(), target) / self._settings.accumulation
            else:
                errors = (prediction.float() - target).square().flatten(1).mean(dim=1)  # (l,)
                loss = (lesson.weight[part] * errors).sum() / self._settings.states
            if not loss.isfinite():
                raise self._diverged(f"the loss of iteration {i + 1} is {loss.item()}")
            torch.autograd.backward(self._scaler.scale(loss))
        return loss.item()

    def _diverged(self, found: str) -> UserError:
        return UserError(
            f"{found}: training diverges with edit.lr={self._settings.lr:g}, or model="
            f"{self._model.name} overflows in dtype={self._dtype}. Lower edit.lr, or use "
            "dtype=bfloat16 or float32; check the weights."
        )


def trained_weights(model: DiffusionModel, parameters: str) -> dict[str, nn.Parameter]:
    """The weights that a key of PARAMETERS chooses, by parameter name, in the denoiser's order.

    UserError if there is none, or no cross-attention where the choice is about it.
    """
    if "xattn" in parameters:
        text_projections(model)  # only to hear its complaint
    weights = matching_weights(model, re.compile(PARAMETERS[parameters]))
    if not weights:
        raise UserError(
            f"edit.parameters={parameters} chooses no weight of model={model.name}. Choose "
            f"another: {', '.join(PARAMETERS)}."
        )
    return weights


def with_weights(
    denoiser: nn.Module, weights: Weights, work: Callable[..., Any], *args: Any
) -> Any:
    """work(*args) while the denoiser has these weights; afterwards it has its own again."""
    named = {f"denoiser.{name}": weight for name, weight in weights.items()}
    return functional_call(_Host(denoiser), named, (work, *args))


@torch.no_grad()
def seen(
    model: DiffusionModel, weights: Weights, x_t: Tensor, t: Tensor, c: Conditioning
) -> Tensor:
    """Phi(x_t, c, t) with the weights as they are now, (N, C, h, w) float32, without gradient."""
    prediction: Tensor = with_weights(model.denoiser, weights, model.predict, x_t, t, c)
    return prediction.float()


class _Host(nn.Module):
    """Lets `functional_call` do any work with the denoiser, not its forward alone."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, work: Callable[..., Any], *args: Any) -> Any:
        return work(*args)
