"""What was once answered by a traceback, late, or not at all is refused before any work.

Programs are not started: a configuration is composed, checked and prepared in this process.
"""

from __future__ import annotations

import errno
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cad.errors import UserError
from experiments.run.command_line import TERMINATED, exit_status, find_mistake
from experiments.run.configuration import (
    Compose,
    check_once,
    check_overrides,
    check_results,
    composer,
)
from experiments.run.experiment import prepare
from experiments.tables.make import make

REFUSED = """
paths.results= | paths.results is empty
paths.results=null | paths.results is empty
paths.results='~/x' | ~ stands for nothing
paths.images=FILE | paths.images=.* cannot be written to
paths.scores=FILE/x | paths.scores=.* cannot be written to
edit.store.root= | edit.store.root is empty
edit=esd edit.checkpoints=FILE | edit.checkpoints=.* cannot be written to
attack=p4d attack.store=null | attack.store is empty
model.name=../../../evil | part of a folder's name
model.adapter.name=a/b | part of a folder's name
concepts.parachute.name=../x | ^concepts.parachute.name='../x' is not snake_case
concepts.parachute.kind=abc | ^concepts.parachute.kind='abc' is unknown
edit.name=../../../evil | edit.name
+edit.name=../evil | edit.name is unknown
model.sampler.steps=1001 | model.sampler.steps=1001 .* at most 1000
model.sampler.kind=euler | model.sampler.kind='euler' is unknown; allowed: default, ddim
model.attribution.steps=1001 | ^model.attribution.steps=1001
model.attribution.samples=1000000000000 | ^model.attribution.samples=.* at most 1000000
images_per_class=1000000000 limit=null | images_per_class=1000000000 .* at most
model.source.path=/ | does not hold a whole diffusers pipeline
model.source.path=FILE | does not hold a whole diffusers pipeline
evaluator=[clip_score] model.clip.folder=/ | holds no CLIP
model.attribution.samples=abc | ^model.attribution.samples=abc .* a whole number
ratio.value=null | ^ratio.value=None is not allowed
ratio.per=5 | ^ratio.per=5 is not allowed
edit=salun edit.pictures.count=0 | ^edit.pictures.count=0 is not allowed
model.adapter.device=abc | ^model.adapter.device='abc' is unknown; allowed: auto
model.classifier.device=abc | ^model.classifier.device='abc' is unknown
attack=p4d attack.tokens=1000 | ^attack.tokens=1000 .* at most 75
attack=p4d attack.timesteps=9999 | ^attack.timesteps=9999 .* at most 1000
attack=random_tokens attack.timesteps=9999 | ^attack.timesteps=9999 .* at most 1000
model.adapter.resolution=1000000000000 | resolution=1000000000000 .* at most 8192
model.evaluators.object=null | ^model.evaluators.object=None measures nothing: .* evaluator=NAME
model.evaluators.object.accuracy=null | ^evaluator.accuracy=None is no part
model.evaluators=null | ^model.evaluators=None is not allowed: it has keys of its own
model.classifier.folder=/nope | /nope/config.json cannot be read .* model.classifier.folder
model.prompts.object=5 | ^prompts=5 is not allowed
model.prompts.object.subjects=5 | ^model.prompts.object.subjects=5 is not allowed; it is names
evaluator=[fid] model.prompts.general=abc | ^model.prompts.general=abc is no part
safety=5 | ^safety=5 is not allowed: it has keys of its own
effect=null | ^effect=None is not allowed
making=null | ^making=None is not allowed
~edit.selection | ^edit.selection is missing: set edit.selection
seed= | ^seed='' is not allowed
~seed | Interpolation key 'seed' not found; python run.py --cfg job
logger=csv logger.path=/ | ^logger.path=/ is a folder: name a file
logger=csv logger.path=FILE/x.csv | ^logger.path=.* cannot be written to .* another folder
logger=tensorboard logger.folder=FILE | ^logger.folder=.* cannot be written to
logger=wandb logger.folder=/proc/x | ^logger.folder=/proc/x cannot be written to
edit=rescale edit.factor=null | edit.factor=None .* a number
edit=rescale edit.factor=nan | edit.factor=nan .* finite
+model.sampler.foo=1 | model.sampler.foo is unknown
+edit.foo=1 | edit.foo is unknown
concept=5 | must be a string or a list
prompts=objects prompts.template='{subject' | prompts.template='{subject'
prompts=objects prompts.subjects=null | prompts.subjects=None .* names
prompts=objects prompts.subjects.church=5 | prompts.subjects=.* for each a text
edit=uce edit.preserve=[1,2] | edit.preserve=.* a list, of which each is a text
edit.attribution=5 | edit.attribution=5 is not allowed; it is a Attribution
edit.attribution=null | edit.attribution=None is not allowed
edit._target_=nope.Nope | edit._target_=nope.Nope is nothing to build
model.adapter.family=os.path | model.adapter.family=os.path is no class
model.concepts=5 | model.concepts=5 is not allowed
seed=99999999999999999999 | below 2\\^63
ratio.value=nan | ratio.value=nan .* finite
concepts.parachute.text="a\0b" | without NUL
device=[cpu] | is unknown; allowed: auto, cpu
device=meta | device='meta' is unknown
model.adapter.dtype=abc | model.adapter.dtype='abc' is unknown
model.adapter.resolution=63 | a multiple of 8
safety.mask=maybe | safety.mask='maybe' .* true or false
~edit.attribution.steps | edit.attribution.steps needs a value
~edit | edit=None is not allowed; choose one of amplify
~engine | engine=None is not allowed; choose one of local
logger=wandb logger.timeout=abc | logger.timeout=abc .* a number
edit=uce component=attn1 | component has no effect .* edit=UCE
edit=none ratio.value=0.3 | ratio.value has no effect .* edit=NoEdit
edit=uce model.attribution.samples=4 | model.attribution.samples has no effect
attack.limit=5 | attack.limit has no effect
making.fast=true | making.fast has no effect
+foo=1 | foo has no effect
+model.foo=1 | model.foo has no effect
concept=[church,church] | concept=.*named twice
evaluator=[accuracy,accuracy] | evaluator=.*named twice
evaluator=[nope] | choose from accuracy, clip_score
seed=${seed} | seed: Recursive interpolation
values=5 | ^values=5 is not allowed
"""
CASES = [line.partition(" | ")[::2] for line in REFUSED.strip().split("\n")]


@pytest.fixture(scope="module")
def compose() -> Iterator[Compose]:
    with composer() as composed:
        yield composed


@pytest.fixture
def here(tmp_path: Path) -> list[str]:
    return ["logger=none", f"paths.results={tmp_path / 'results'}"]


def checked(compose: Compose, here: list[str], given: list[str]) -> None:
    """All that a run does before its work."""
    cfg = compose([*here, *given])
    check_results(cfg)
    prepare(cfg)
    check_overrides(cfg, given)


@pytest.mark.parametrize(("line", "message"), CASES, ids=[line for line, _ in CASES])
def test_what_cannot_work_is_refused_before_any_work(
    compose: Compose, here: list[str], tmp_path: Path, line: str, message: str
) -> None:
    (tmp_path / "file").write_text("")
    given = line.replace("FILE", str(tmp_path / "file")).split(" ")
    with pytest.raises(Exception) as caught:  # noqa: PT011 (found by its message)
        checked(compose, here, given)
    told = find_mistake(caught.value)
    assert told is not None, caught.value
    assert re.search(message, told), told
    assert {path.name for path in tmp_path.iterdir()} <= {"file", "results"}


@pytest.mark.parametrize(
    "line", ["ratio.value=0.1 seed=3 limit=4", "edit=uce edit.guide=tree", "device=cpu debug=tiny"]
)
def test_what_has_an_effect_passes(compose: Compose, here: list[str], line: str) -> None:
    checked(compose, here, line.split())


def test_a_batch_system_that_ends_a_run_is_told_how_to_go_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert exit_status(lambda: os.kill(os.getpid(), signal.SIGTERM)) == TERMINATED
    assert "terminated: the same command goes on" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is before


def test_files_that_cannot_be_opened_are_told_in_a_line() -> None:
    for number in (errno.EACCES, errno.ENOTDIR, errno.ENAMETOOLONG):
        told = find_mistake(OSError(number, os.strerror(number), "/x/y"))
        assert told == f"/x/y cannot be read or written ({os.strerror(number)})"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["seed=1", "limit=3", "seed=2"], "seed=1 seed=2: seed is given 2 values; give it one"),
        (["model=mini", "model=sd14"], "model is given 2 values"),
    ],
)
def test_a_key_is_given_one_value(given: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_once(given)
    check_once(["evaluator=nudity", "evaluator@attack.judge=face", "~model.x", "+model.x=1"])


@pytest.mark.parametrize("given", ["making.fast=maybe", "making.filter=5", "making.run=-1"])
def test_a_tables_settings_are_checked_before_its_runs_are_looked_up(
    compose: Compose, here: list[str], given: str
) -> None:
    overrides = ["table=table07", "model=mini", given]
    with pytest.raises(UserError, match=given.partition("=")[0]):
        make(compose([*here, *overrides]), overrides)
