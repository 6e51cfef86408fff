"""ESD (Gandikota et al. 2023, Erasing Concepts from Diffusion Models): fine-tunes the denoiser.

Its prediction for the concept's text c is to become what leads away from the concept,

    Phi(x_t, c, t) -> Phi*(x_t, "", t) - eta (Phi*(x_t, c, t) - Phi*(x_t, "", t)),

with Phi* the original model, mean squared error, Adam. x_t is where the model in training gets to
from pure noise, sampling the concept with guidance up to a random step.

Phi is the network in its own parameterisation. The target is an affine combination of predictions
at one x_t, and there v and epsilon differ by eps = alpha_t v + sigma_t x_t: the same x_0 is aimed
at; the squared error of v is that of epsilon divided by alpha_t^2, and that of the clean latent
by (alpha_t / sigma_t)^2.

All walks of an optimiser step are one batch, in which every element has its own noise, concept and
random step, and leaves at that step.

Where publication and releases differ or are silent: t is the sampler's own timestep at which x_t
lies (in the first release x_t is two sampler steps further on its way than the timesteps that t is
drawn from); "noxattn" is every parameter without `.attn2.` in its
name (releases leave some out); of several concepts each element draws one. In half precision the
trained weights are float32 with autocast, while the walk and Phi* are in the model's own dtype.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from baselines.checkpoint import Checkpoint, Progress
from cad.checks import check, finite, flag, one_of, positive, steps, whole
from cad.components import matching_weights, text_projections
from cad.concepts import Concept
from cad.edits import Edit
from cad.errors import UserError
from cad.identity import digest, immaterial
from cad.instrument import Cost, measure
from cad.models.base import DiffusionModel, check_gradient_checkpointing, checkpointed_gradients
from cad.models.conditioning import Conditioning
from cad.models.sampler import Sampler
from cad.sampling import draw_noise, guide, make_generators
from cad.weight_edit import Change, Replace, WeightEdit

log = logging.getLogger(__name__)

TEXTS = ("text", "prompt")  # of a concept
PARAMETERS = {  # what is trained: regular expressions over the denoiser's parameter names
    "noxattn": r"^(?!.*\.attn2\.)",  # ESD-u: all but cross-attention
    "xattn": r"\.attn2\.",  # ESD-x: cross-attention
    "selfattn": r"\.attn1\.",
    "full": r"",
}


@dataclass(frozen=True, kw_only=True)
class ESD(Edit):
    """The method with its settings; UserError for a value that is not allowed.

    An optimiser step ("iteration") sees batch_size * accumulation states. With `checkpoints`, a
    folder, a killed training goes on where it last wrote its state, which stays until `clean_up`.
    """

    name: ClassVar[str] = "esd"

    parameters: str  # a key of PARAMETERS
    trained_on: str = "text"  # "text": `Concept.text`, the word itself, as released | "prompt"
    iterations: int = 1000  # optimiser steps
    lr: float = 1e-5  # Adam's
    negative_guidance: float = 1.0  # eta
    guidance: float = 3.0  # classifier-free, on the way to x_t
    steps: int = 50  # DDIM steps from noise to image
    batch_size: int = 1  # states whose gradient is taken at once
    accumulation: int = 1  # batches per optimiser step
    seed: int = 0
    gradient_checkpointing: bool = False  # less memory, more time, the same gradients
    checkpoint_every: int = immaterial(100)  # iterations
    checkpoints: str | None = immaterial(None)  # folder of their folders; None: there are none

    def __post_init__(self) -> None:
        counts = ("iterations", "batch_size", "accumulation", "checkpoint_every")
        check(self, "edit", **dict.fromkeys(counts, whole(1)))
        check(self, "edit", parameters=one_of(PARAMETERS), trained_on=one_of(TEXTS))
        check(self, "edit", seed=whole(0), lr=positive, steps=steps)
        check(self, "edit", negative_guidance=finite, guidance=finite, gradient_checkpointing=flag)

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

    def texts(self, concepts: Sequence[Concept]) -> list[str]:
        """What stands for each concept."""
        return [getattr(concept, self.trained_on) for concept in concepts]

    def clean_up(self, model: DiffusionModel, concepts: Sequence[Concept]) -> None:
        if checkpoint := self._checkpoint(model, concepts):
            checkpoint.remove()

    def _checkpoint(self, model: DiffusionModel, concepts: Sequence[Concept]) -> Checkpoint | None:
        if self.checkpoints is None:
            return None
        return Checkpoint(Path(self.checkpoints) / digest(self.provenance(model, concepts)))


class Training:
    """The trained weights, with Adam. The model keeps its own all along: it is Phi*.

    `weights` are float32 copies, in the denoiser's place only while the trained model predicts.
    """

    def __init__(
        self,
        settings: ESD,
        model: DiffusionModel,
        originals: Mapping[str, nn.Parameter],
        concepts: Sequence[Concept],
    ) -> None:
        self._settings, self._model, self._originals = settings, model, originals
        self._dtype = model.dtype  # asked now: inside `with_weights` it would be another
        self._c = model.encode_prompts(settings.texts(concepts))  # (K, ...)
        self._unconditional = model.encode_prompts([""])  # (1, ...)
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
        size, eta = self._settings.batch_size, self._settings.negative_guidance
        x_t, t, c = self._states(i)  # M states, M = batch_size * accumulation
        loss = 0.0
        for start in range(0, len(x_t), size):
            batch = slice(start, start + size)
            state = x_t[batch], t[batch], c[batch]
            target = erased_target(self._model, *state, self._unconditional, eta)
            work = self._backward, i, *state, target
            loss += with_weights(self._model.denoiser, self.weights, *work)
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
            log.warning("edit=esd changed nothing: its steps vanish in %s", self._dtype)
        return changes

    def _states(self, i: int) -> tuple[Tensor, Tensor, Conditioning]:
        """x_t (M, C, h, w), t (M,) and c (M, ...) of an optimiser step."""
        settings, model = self._settings, self._model
        count = settings.batch_size * settings.accumulation
        generators = make_generators(range(count), salt=f"{settings.name}-{settings.seed}-{i}")
        stops = _draw_below(settings.steps, generators)  # (M,)
        c = self._c[_draw_below(len(self._c), generators).to(model.device)]  # (M, ...)
        sampler = model.sampler(settings.steps, "ddim", eta=0.0)
        # In the model's dtype, as the finished edit will be used; float32 weights are not copied.
        weights = {name: weight.detach().to(self._dtype) for name, weight in self.weights.items()}
        way = model, sampler, generators, stops, c, self._unconditional, settings.guidance
        x_t, t = with_weights(model.denoiser, weights, walk_apart, *way)
        return x_t, t, c

    def _backward(self, i: int, x_t: Tensor, t: Tensor, c: Conditioning, target: Tensor) -> float:
        """Adds a batch's share of the gradient; returns its share of the loss.

        All (N, ...). The backward belongs inside `with_weights`: gradient checkpointing runs the
        denoiser again there.
        """
        half = self._dtype in (torch.float16, torch.bfloat16)
        with torch.enable_grad():
            with torch.autocast(self._model.device.type, self._dtype, enabled=half):
                prediction = self._model.predict(x_t, t, c)
            loss = F.mse_loss(prediction.float(), target) / self._settings.accumulation
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
    if parameters.endswith("xattn"):
        text_projections(model)  # only to hear its complaint
    weights = matching_weights(model, re.compile(PARAMETERS[parameters]))
    if not weights:
        raise UserError(
            f"edit.parameters={parameters} chooses no weight of model={model.name}. Choose "
            f"another: {', '.join(PARAMETERS)}."
        )
    return weights


@torch.no_grad()
def erased_target(
    model: DiffusionModel, x_t: Tensor, t: Tensor, c: Conditioning, empty: Conditioning, eta: float
) -> Tensor:
    """Phi_u - eta (Phi_c - Phi_u) of the model as it is; (N, C, h, w) float32, without gradient.

    Classifier-free guidance by -eta. x_t (N, C, h, w), t (N,), c (N, ...), empty (1, ...).
    """
    phi_u, phi_c = _predict_both(model, x_t, t, c, empty)
    return guide(phi_u.float(), phi_c.float(), -eta)


@torch.no_grad()
def walk_apart(
    model: DiffusionModel,
    sampler: Sampler,
    generators: Sequence[Generator],
    stops: Tensor,
    c: Conditioning,
    unconditional: Conditioning,
    guidance: float,
) -> tuple[Tensor, Tensor]:
    """`cad.sampling.walk` of N elements, each of which leaves after its own number of steps.

    stops (N,) int64 on the CPU, below the sampler's steps; c (N, ...), unconditional (1, ...).
    Returns x_t (N, C, h, w), as the network takes it, and t (N,). The sampler must be first-order,
    since the batch shrinks on the way, and draw no noise.
    """
    x_t = draw_noise(model, generators) * sampler.init_sigma  # (N, C, h, w)
    reached = torch.empty_like(x_t)
    walking = torch.arange(len(stops))  # numbers of the n elements still on their way
    for index, t in enumerate(sampler.timesteps):
        x_in = sampler.scale(x_t, t)  # (n, C, h, w)
        stays = stops[walking] > index  # (n,)
        reached[walking[~stays]] = x_in[~stays]
        walking, x_t, x_in = walking[stays], x_t[stays], x_in[stays]
        if not len(walking):
            break
        phi_u, phi_c = _predict_both(model, x_in, t, c[walking], unconditional)
        x_t = sampler.step(guide(phi_u, phi_c, guidance), t, x_t, None)
    return reached, sampler.timesteps[stops.to(sampler.timesteps.device)]


def with_weights(
    denoiser: nn.Module, weights: Mapping[str, Tensor], work: Callable[..., Any], *args: Any
) -> Any:
    """work(*args) while the denoiser has these weights; afterwards it has its own again."""
    named = {f"denoiser.{name}": weight for name, weight in weights.items()}
    return functional_call(_Host(denoiser), named, (work, *args))


class _Host(nn.Module):
    """Lets `functional_call` do any work with the denoiser, not its forward alone."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, work: Callable[..., Any], *args: Any) -> Any:
        return work(*args)


def _predict_both(
    model: DiffusionModel, x_t: Tensor, t: Tensor, c: Conditioning, unconditional: Conditioning
) -> tuple[Tensor, Tensor]:
    """Phi(x_t, "", t) and Phi(x_t, c, t), (N, C, h, w), in one batch; t () or (N,)."""
    both = Conditioning.cat([unconditional.expand(len(x_t)), c])  # (2N, ...)
    times = torch.cat([t, t]) if t.dim() else t
    phi_u, phi_c = model.predict(torch.cat([x_t, x_t]), times, both).chunk(2)
    return phi_u, phi_c


def _draw_below(end: int, generators: Sequence[Generator]) -> Tensor:
    """One integer of 0 .. end - 1 from each generator; (N,) int64 on the CPU."""
    return torch.cat([torch.randint(end, (1,), generator=each) for each in generators])
