"""Properties that hold for whatever is drawn: files come back or are refused, choices are right."""

from __future__ import annotations

import csv
import hashlib
import io
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cad.errors import UserError
from cad.selection import Selection, floor_share
from cad.store import DamagedFileError, read_tensors, write_tensors
from cad.weight_edit import Replace, Scale, WeightEdit, Zero
from evaluation.prompt_files import Columns, Layout, PromptFile, Rules
from evaluation.prompt_sources import WebFile

FEW = settings(max_examples=25, deadline=None, derandomize=True, database=None)
NUMBERS = st.floats(-4, 4, width=32, allow_subnormal=False)
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
NAMES = st.text("abcdefg._", min_size=1, max_size=8)
INDICES = st.lists(st.integers(0, 60), min_size=1, max_size=9, unique=True).map(sorted)


def matrices(least: int = 1) -> st.SearchStrategy[torch.Tensor]:
    """(rows, columns) float32, with ties."""
    sizes = st.tuples(st.integers(least, 5), st.integers(least, 6))
    cells = NUMBERS | st.sampled_from([0.0, 1.0])
    return sizes.flatmap(
        lambda size: st.lists(cells, min_size=size[0] * size[1], max_size=size[0] * size[1]).map(
            lambda drawn: torch.tensor(drawn, dtype=torch.float32).reshape(size)
        )
    )


CHANGES = st.one_of(
    INDICES.map(lambda drawn: Zero(torch.tensor(drawn, dtype=torch.int32))),
    st.tuples(INDICES, NUMBERS).map(lambda drawn: Scale(torch.tensor(drawn[0]), drawn[1])),
    matrices().map(Replace),
)
EDITS = st.builds(
    WeightEdit, st.dictionaries(NAMES, CHANGES, min_size=1, max_size=3), st.fixed_dictionaries({})
)


def harmed(path: Path, data: st.DataObject) -> None:
    """One byte of the file is another, or its end is missing."""
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1), "place")
    other = data.draw(st.none() | st.integers(1, 255), "bits")
    end = b"" if other is None else bytes([whole[place] ^ other]) + whole[place + 1 :]
    path.write_bytes(whole[:place] + end)


@FEW
@given(st.dictionaries(NAMES, matrices(), max_size=3), st.dictionaries(NAMES, TEXTS), st.data())
def test_a_stored_file_comes_back_or_is_refused(
    tensors: dict[str, torch.Tensor], header: dict[str, str], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, header = Path(folder, "file"), {"drawn": header}
        write_tensors(path, tensors, header, "test/1")
        found, read = read_tensors(path, "test/1")
        assert found == header | {"format": "test/1"}
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensors[name]) for name in tensors)
        harmed(path, data)
        try:
            again, altered = read_tensors(path, "test/1")
        except DamagedFileError:
            return
        assert again == found  # the byte meant nothing: it is padding
        assert all(torch.equal(altered[name], tensors[name]) for name in tensors)


@FEW
@given(EDITS, st.data())
def test_an_edit_comes_back_or_is_refused(edit: WeightEdit, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "edit.safetensors")
        edit.save(path)
        assert WeightEdit.load(path).fingerprint == edit.fingerprint
        harmed(path, data)
        try:
            assert WeightEdit.load(path).fingerprint == edit.fingerprint
        except UserError:
            return


@FEW
@given(
    st.lists(matrices(least=2), min_size=1, max_size=3),
    st.floats(0.01, 1),
    st.sampled_from(["row", "layer", "model"]),
    st.sampled_from([1, -1]),
)
def test_the_largest_are_chosen_and_no_more_than_the_ratio(
    drawn: list[torch.Tensor], ratio: float, per: str, sign: int
) -> None:
    """Of every ranking as many as its budget, or all of the sign that is asked for."""
    scores = {str(place): each for place, each in enumerate(drawn)}
    chosen = Selection(ratio, per).indices(scores, sign)
    masks = {name: torch.zeros(each.numel(), dtype=torch.bool) for name, each in scores.items()}
    for name, indices in chosen.items():
        assert indices.tolist() == sorted(set(indices.tolist())) != []
        masks[name][indices] = True
    flat = {name: (sign * each).flatten() for name, each in scores.items()}
    rankings = [(flat[name], masks[name]) for name in scores]
    if per == "model":
        rankings = [(torch.cat([*flat.values()]), torch.cat([*masks.values()]))]
    elif per == "row":
        widths = {name: each.shape[1] for name, each in scores.items()}
        rankings = [
            pair
            for name in scores
            for pair in zip(
                *(each[name].split(widths[name]) for each in (flat, masks)), strict=True
            )
        ]
    for values, mask in rankings:
        budget, positive = floor_share(ratio, len(values)), int((values > 0).sum())
        assert int(mask.sum()) == min(budget, positive)
        assert (values[mask] > 0).all()
        if mask.any() and not mask.all():
            assert values[mask].min() >= values[~mask].max()


@FEW
@given(st.lists(st.tuples(TEXTS, st.integers(0, 2**63 - 1)), min_size=1, max_size=6), st.data())
def test_prompts_come_back_as_written_or_the_file_is_refused(
    rows: list[tuple[str, int]], data: st.DataObject
) -> None:
    rows = [(f"a {text}", seed) for text, seed in rows]
    written = io.StringIO(newline="")
    csv.writer(written).writerows([("prompt", "evaluation_seed"), *rows])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "prompts.csv")
        path.write_bytes(written.getvalue().encode())
        columns = Columns("prompt", None, None, "evaluation_seed", None, None, None)
        prompts = PromptFile(
            name="drawn",
            source=WebFile("https://example.org/prompts.csv", "MIT"),
            path=str(path),
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            layout=Layout(None, "error", "error"),
            columns=columns,
            rules=Rules("drawn", "file", None, None, truncate=False),
        )
        assert [(each.text, each.seed) for each in prompts.build()] == rows
        harmed(path, data)
        with pytest.raises(UserError, match="SHA-256"):
            prompts.build()
        try:
            unpinned = replace(prompts, sha256=None).build()
        except UserError:
            return
        assert all(each.text.strip() and each.seed >= 0 for each in unpinned)
