"""One training loop for every stage: resumable, and the same whether interrupted or not."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from cad.checks import check, not_negative, positive, share, whole
from cad.errors import UserError

log = logging.getLogger(__name__)

SITTINGS_FILE = "sittings.jsonl"
LOG_EVERY = 25  # steps, whose mean loss is one line of loss.jsonl

LossFunction = Callable[[torch.Generator, int], Tensor]
"""(random numbers of this step, step) -> scalar loss."""


@dataclass(frozen=True)
class Schedule:
    """How a stage is trained; every value has its reason in conf/programs/miniature.yaml."""

    steps: int
    batch_size: int
    lr: float  # peak, after a linear warm-up, then a cosine to zero
    warmup: int  # steps
    weight_decay: float
    ema: float  # decay of the averaged weights, which are the ones that ship
    checkpoint_every: int  # steps

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("steps", "batch_size", "checkpoint_every"), whole(1))
        check(self, "schedule", **counts, warmup=whole(0), lr=positive, ema=share)
        check(self, "schedule", weight_decay=not_negative)


def learning_rate(step: int, schedule: Schedule) -> float:
    """Linear warm-up, then a half cosine to zero."""
    if step < schedule.warmup:
        return schedule.lr * (step + 1) / schedule.warmup
    progress = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return schedule.lr * 0.5 * (1 + math.cos(math.pi * progress))


def train(
    network: nn.Module, loss_function: LossFunction, schedule: Schedule, folder: Path, seed: int
) -> nn.Module:
    """Train `network` in place and return its averaged copy, in evaluation mode.

    Random numbers are drawn from a generator seeded by (seed, step), so a run that was stopped
    and taken up at its last checkpoint ends like one that never stopped. Writes
    folder/checkpoint.safetensors, loss.jsonl, and a line of sittings.jsonl for each call.
    Autocasts to bfloat16. UserError if the folder's checkpoint is of another network.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=schedule.lr, betas=(0.9, 0.99), weight_decay=schedule.weight_decay
    )
    average = AveragedModel(
        network, multi_avg_fn=get_ema_multi_avg_fn(schedule.ema), use_buffers=True
    )
    checkpoint = Checkpoint(folder / "checkpoint.safetensors", network, average, optimizer)
    start = checkpoint.load()
    if start:
        log.info("%s: taken up at step %d of %d", folder.name, start, schedule.steps)
    _append(folder / SITTINGS_FILE, {"from_step": start, "to_step": schedule.steps})
    network.train()
    losses: list[float] = []
    for step in _progress(folder.name, start, schedule.steps):
        losses.append(_update(network, optimizer, loss_function, schedule, seed, step))
        average.update_parameters(network)
        if (step + 1) % LOG_EVERY == 0:
            mean = sum(losses) / len(losses)
            _append(folder / "loss.jsonl", {"step": step + 1, "loss": round(mean, 6)})
            losses.clear()
        if (step + 1) % schedule.checkpoint_every == 0 or step + 1 == schedule.steps:
            checkpoint.save(step + 1)
    return average.module.eval().requires_grad_(False)


def _update(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_function: LossFunction,
    schedule: Schedule,
    seed: int,
    step: int,
) -> float:
    """One optimiser step; the loss before it."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    torch.manual_seed(seed * 1_000_003 + step)  # for the modules' own randomness
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, schedule)
    device = next(network.parameters()).device
    with torch.autocast(device.type, torch.bfloat16):
        loss = loss_function(generator, step)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def _progress(name: str, start: int, steps: int) -> Iterable[int]:
    return tqdm(
        range(start, steps), name, steps, initial=start, unit="step", disable=None, mininterval=5
    )


class Checkpoint:
    """Everything a run needs to go on: weights, averaged weights, optimiser state, step."""

    def __init__(
        self,
        path: Path,
        network: nn.Module,
        average: AveragedModel,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.path = path
        self.network = network
        self.average = average
        self.optimizer = optimizer

    def save(self, step: int) -> None:
        """Atomic: a reader sees the old checkpoint or the new one."""
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items()}
        tensors = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
        temporary = self.path.with_suffix(".tmp")
        save_file(tensors, temporary, metadata={"step": str(step)})
        temporary.replace(self.path)

    def load(self) -> int:
        """The step to go on from; 0 where there is no checkpoint."""
        if not self.path.exists():
            return 0
        parts: dict[str, dict[str, Tensor]] = {"network": {}, "average": {}, "optimizer": {}}
        with safe_open(self.path, framework="pt") as file:
            step = int(file.metadata()["step"])
            for key in file.keys():  # noqa: SIM118 (not a dict)
                part, name = key.split(".", 1)
                parts[part][name] = file.get_tensor(key)
        try:
            self.network.load_state_dict(parts["network"])
            self.average.load_state_dict(parts["average"])
        except RuntimeError as error:
            raise UserError(
                f"{self.path} was written for a network of other sizes than configured now; "
                f"delete {self.path.parent} to start this stage anew ({error})"
            ) from error
        state = self.optimizer.state_dict()
        for key, tensor in parts["optimizer"].items():
            index, name = key.split(".", 1)
            state["state"].setdefault(int(index), {})[name] = tensor
        self.optimizer.load_state_dict(state)
        return step


def _append(path: Path, record: dict[str, float]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
