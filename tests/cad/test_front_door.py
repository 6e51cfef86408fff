"""The front door, export and import of edits, on a plain diffusers pipeline."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys

import pytest
import torch
from diffusers import StableDiffusionPipeline

import cad
from cad.attribution import Attribution
from cad.contrast import CADContrast
from cad.errors import UserError
from cad.export import main
from cad.identity import parameter_digest
from cad.models.adapters import adapt
from cad.places import REPOSITORY
from cad.references import GeneratedImages
from cad.selection import Selection
from cad.weight_edit import Replace, WeightEdit, Zero

FEW = {"steps": 2, "samples": 1}


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline):
    """A plain pipeline, float32; leave it as it is."""
    return StableDiffusionPipeline(
        **{
            k: copy.deepcopy(v) for k, v in tiny_pipeline.components.items() if k != "image_encoder"
        },
        requires_safety_checker=False,
    )


@pytest.fixture(scope="module")
def edit(pipeline):
    return cad.erase(pipeline, "church", ratio=0.1, **FEW)


def draw(pipeline):
    latents = torch.ones(1, 4, 8, 8, dtype=pipeline.unet.dtype)
    options = {"num_inference_steps": 2, "output_type": "latent", "latents": latents}
    return pipeline("church", **options).images


def test_three_lines_on_a_plain_pipeline(pipeline, edit, tmp_path, capsys):
    before = draw(pipeline)
    with edit.applied(pipeline):
        assert not torch.equal(draw(pipeline), before)
        assert adapt(pipeline).edits == (edit,)
    assert torch.equal(draw(pipeline), before)
    assert "2/2" in capsys.readouterr().err  # the pipeline's own progress bar is still there

    scores = cad.attribute(pipeline, "church", store=tmp_path, **FEW)
    for name, change in edit.changes.items():
        assert (scores[name].flatten()[change.tensor] > 0).all()
    stored = cad.erase(pipeline, "church", ratio=0.1, store=tmp_path, **FEW)
    assert stored.fingerprint == edit.fingerprint
    assert len(list(tmp_path.glob("*.safetensors"))) == 1  # the same scores

    edit.save(str(tmp_path / "edit"))
    assert cad.load(tmp_path / "edit").fingerprint == edit.fingerprint
    assert repr(edit) == (
        f"WeightEdit(erase church: {edit.num_weights:,} weights of StableDiffusionPipeline)"
    )


def test_several_concepts_and_amplifying(pipeline):
    both = cad.erase(pipeline, ["church", "golf ball"], ratio=0.05, **FEW)
    assert [each["name"] for each in both.provenance["concepts"]] == ["church", "golf_ball"]
    drawn = GeneratedImages(count=1, steps=1)
    few = {"steps": 1, "samples": 1, "references": drawn}
    amplified = cad.amplify(pipeline, "golf ball", ratio=0.05, **few)
    assert amplified.provenance["edit"] == "amplify"


def test_what_is_to_be_kept_is_spared(pipeline, edit, tmp_path):
    given = (Attribution(**FEW), Selection(0.1))
    cad.attribute(pipeline, "castle", store=tmp_path, **FEW)
    kept = cad.erase(
        pipeline, "church", keep=["castle", "a lake"], ratio=0.1, store=tmp_path, **FEW
    )
    contrast = CADContrast(*given, preserve=["castle", "a lake"])
    church = cad.Concept(name="church", kind="object", text="church", prompt="church")
    assert kept.fingerprint == contrast(adapt(pipeline), church).fingerprint != edit.fingerprint
    assert len(list(tmp_path.glob("*.safetensors"))) == 3  # the castle's scores served both
    castle = cad.attribute(pipeline, "castle", store=tmp_path, **FEW)
    lost = [
        sum(float(castle[name].flatten()[each.tensor].sum()) for name, each in made.changes.items())
        for made in (kept, edit)
    ]
    assert lost[0] < lost[1]

    drawn = GeneratedImages(count=1, steps=1)
    few = {"steps": 1, "samples": 1, "references": drawn}
    amplified = cad.amplify(pipeline, "church", keep="castle", ratio=0.05, **few)
    assert amplified.provenance["edit"] == "contrast_amplify"
    with pytest.raises(UserError, match="keeps nothing beside what is edited"):
        cad.erase(pipeline, "church", keep="church")


def test_what_cannot_be_adapted_is_refused():
    with pytest.raises(UserError, match="Linear is no pipeline"):
        cad.erase(torch.nn.Linear(1, 1), "church")


def test_weights_that_changed_since_are_seen(pipeline, edit):
    other = copy.deepcopy(pipeline)
    next(other.unet.parameters()).data += 1
    with pytest.raises(UserError, match="made for other weights"), edit.applied(other):
        pass


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_same_weights_in_half_precision_take_the_edit(pipeline, edit, dtype):
    half = copy.deepcopy(pipeline).to(dtype)
    with edit.applied(half):
        zeroed = {name: weight.eq(0).sum() for name, weight in half.unet.named_parameters()}
    assert all(zeroed[name] >= each.num_weights for name, each in edit.changes.items())

    made_in_half = WeightEdit(edit.changes, {"model": adapt(half).provenance()})
    for same in (pipeline, half.to(torch.float32)):
        with made_in_half.applied(same):
            pass
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    with (
        pytest.raises(UserError, match="made for other weights"),
        made_in_half.applied(half.to(other)),
    ):
        pass


def test_export_of_the_edited_pipeline(pipeline, edit, tmp_path, capsys):
    pipeline.save_pretrained(tmp_path / "model")
    edit.save(tmp_path / "edit.safetensors")
    given = [str(tmp_path / "edit.safetensors"), "--model", str(tmp_path / "model")]
    assert main([*given, "--out", str(tmp_path / "out")]) == 0
    exported = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    with edit.applied(pipeline):
        assert parameter_digest(exported.unet) == parameter_digest(pipeline.unet)
    card = (tmp_path / "out" / "README.md").read_text()
    assert edit.fingerprint in card
    assert card.startswith("---\nbase_model: ")

    assert main([*given, "--out", str(tmp_path / "out")]) == 2
    assert "is there already: name a new folder" in capsys.readouterr().err
    assert main([given[0], "--out", str(tmp_path / "other")]) == 2
    assert "Name a hub id or a folder" in capsys.readouterr().err
    WeightEdit(edit.changes, {"edit": "bare"}).save(tmp_path / "bare.safetensors")
    assert main([str(tmp_path / "bare.safetensors"), "--out", str(tmp_path / "other")]) == 2
    assert "does not say how it was made" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_export_of_the_edit_alone_needs_no_package(pipeline, edit, tmp_path):
    name = next(iter(edit.changes))
    other = next(key for key, w in pipeline.unet.named_parameters() if key not in edit.changes)
    values = torch.ones_like(pipeline.unet.get_parameter(other))
    mixed = WeightEdit({**edit.changes, other: Replace(values)}, edit.provenance)
    mixed.save(tmp_path / "edit.safetensors")
    given = [str(tmp_path / "edit.safetensors"), "--edit-only", "--out", str(tmp_path / "out")]
    assert main(given) == 0
    assert {each.name for each in (tmp_path / "out").iterdir()} == {
        "README.md",
        "apply_edit.py",
        "edit.safetensors",
    }
    torch.save(pipeline.unet.state_dict(), tmp_path / "unet.pt")
    program = (
        "import json, torch; from apply_edit import apply_edit; m = torch.nn.Module()\n"
        f"state = torch.load({str(tmp_path / 'unet.pt')!r})\n"
        "m.named_parameters = lambda: state.items()\n"
        "apply_edit(m, 'edit.safetensors')\n"
        f"print(json.dumps([int(state[{name!r}].eq(0).sum()), float(state[{other!r}].mean())]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "out", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    zeros, mean = json.loads(done.stdout)
    assert isinstance(edit.changes[name], Zero)
    assert (zeros, mean) == (edit.changes[name].num_weights, 1.0)


def test_the_documented_lines_run_on_the_miniature(tmp_path, monkeypatch):
    page = (REPOSITORY / "docs" / "python.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    lines = lines.replace("steps=10, samples=4", "steps=1, samples=1")
    lines = lines.replace('of a parachute")', 'of a parachute", num_inference_steps=1)')
    (tmp_path / "experiments").symlink_to(REPOSITORY / "experiments")
    monkeypatch.chdir(tmp_path)
    exec(lines, found := {})
    assert found["sparing"].provenance["edit"] == "contrast"
    assert cad.load("parachute.safetensors").num_weights > 0
