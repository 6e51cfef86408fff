"""What is said below every item: under what its runs were made, and what is not there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.items.plan import Overrides, Run, State
from experiments.results import read_json

COMMIT_DIGITS = 12


@dataclass(frozen=True)
class Making:
    """Where, when and from what code finished runs were made."""

    commits: tuple[str, ...]
    devices: tuple[str, ...]
    first: str  # ISO date of the day; "" without runs
    last: str


def making(runs: Sequence[Run]) -> Making:
    """Of all finished ones among the runs."""
    done = [run for run in runs if run.state == State.DONE]
    found = [read_json(run.folder / "environment.json") for run in done]
    days = sorted(each["finished"][:10] for each in found)
    return Making(
        commits=tuple(sorted({_short(each["commit"]) for each in found})),
        devices=tuple(sorted({each["device_name"] for each in found})),
        first=days[0] if days else "",
        last=days[-1] if days else "",
    )


def conditions(runs: Sequence[Run]) -> list[str]:
    """Under what the finished runs were made, a sentence for each that differs."""
    found: dict[str, set[str]] = {}
    for run in runs:
        if run.state != State.DONE:
            continue
        metrics = read_json(run.folder / "metrics.json")
        environment = read_json(run.folder / "environment.json")
        model, sampler = metrics["model"], metrics["sampler"]
        text = (
            f"{model['name']} (revision {model['revision']}): {sampler['steps']} steps, guidance "
            f"{sampler['guidance']:g}, seed {metrics['seed']}, {model['dtype']} on "
            f"{environment['device_name']}"
        )
        found.setdefault(text, set()).add(_short(environment["commit"]))
    return [f"{text}; commit {', '.join(sorted(commits))}." for text, commits in found.items()]


def absences(runs: Sequence[Run], failed: Mapping[Overrides, str]) -> list[str]:
    """What was not run, and why."""
    notes = []
    missing = [run for run in runs if run.state == State.MISSING]
    reasons = Counter(failed[run.overrides] for run in missing if run.overrides in failed)
    for reason, count in reasons.items():
        notes.append(end(f"Failed, {_runs(count)}: {reason}"))
    waiting = len(missing) - sum(reasons.values())
    notes += [f"Not run yet: {_runs(waiting)} of {len(runs)}."] if waiting else []
    refused = Counter(run.reason for run in runs if run.state == State.REFUSED)
    for reason, count in refused.items():
        notes.append(end(f"Not run, {_runs(count)}: {reason}"))
    return notes


def end(text: str) -> str:
    """The text with a full stop."""
    return text if text.endswith(".") else f"{text}."


def _runs(count: int) -> str:
    return f"{count} run{'s' if count > 1 else ''}"


def _short(commit: str) -> str:
    digits, dash, rest = commit.partition("-")
    return f"{digits[:COMMIT_DIGITS]}{dash}{rest}"
