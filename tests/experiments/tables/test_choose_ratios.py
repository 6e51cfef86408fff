"""Ratios are chosen by a rule from curves that are made once, and written where runs find them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf
from weights import write_weights

from cad.errors import UserError
from experiments.run.configuration import CONF, compose
from experiments.tables import choose_ratios
from experiments.tables.choose_ratios import largest_gain, smallest, write_ratios

SMALL = ("model=mini", "concepts=[church]", "n=1", "ladder=[0.5,0.2]")


def points(*measured: tuple[float, float, float]) -> list[dict[str, float]]:
    keys = ("value", "class", "others")
    before = {"class_before": 50.0, "others_before": 90.0}
    return [dict(zip(keys, each, strict=True)) | before for each in measured]


@pytest.mark.parametrize(
    ("measured", "erases", "amplifies"),
    [
        ([(0.01, 20, 90), (0.02, 4, 80), (0.04, 0, 89)], 0.02, None),
        ([(0.01, 20, 90), (0.02, 10, 80), (0.04, 10, 85)], 0.04, None),
        ([(0.01, 60, 89), (0.02, 70, 88), (0.04, 90, 80)], 0.01, 0.02),
        ([(0.01, 60, 88), (0.02, 60, 89), (0.04, 60, 89)], 0.02, 0.02),
    ],
)
def test_the_rule(measured, erases, amplifies) -> None:
    curve = points(*measured)
    assert smallest(curve, bound=5.0)["value"] == erases
    found = largest_gain(curve, cost=2.5)
    assert (found and found["value"]) == amplifies


def test_ratios_are_written_beside_the_others(tmp_path: Path) -> None:
    path = tmp_path / "ratios_erase.yaml"
    path.write_text("# why\nmini: {object: 0.02, tench: 0.06}\n")
    write_ratios(tmp_path, "erase", "mini", {"tench": 0.08, "church": 0.015})
    write_ratios(tmp_path, "erase", "sd14", {"tench": 0.001})
    expected = ["# why", "mini: {object: 0.02, tench: 0.08, church: 0.015}", "sd14: {tench: 0.001}"]
    assert path.read_text().splitlines() == expected
    with pytest.raises(UserError, match="edit=uce reads no"):
        write_ratios(tmp_path, "uce", "mini", {})


@pytest.mark.parametrize("edit", ["erase", "amplify", "contrast", "contrast_amplify"])
def test_every_run_finds_what_is_written(edit: str) -> None:
    table = OmegaConf.load(CONF / "fragments" / f"ratios_{edit}.yaml")
    cfg = compose([f"edit={edit}", "concept=tench"])
    assert cfg.ratio.value == table.mini.get("tench", table.mini.object)


def test_a_curve_is_climbed_once_and_chosen_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random weights leave nothing of a class, so erasing ends at the first value."""
    places = [f"paths.miniature={write_weights(tmp_path)}", f"paths.results={tmp_path}"]
    (tmp_path / "fragments").mkdir()
    (tmp_path / "fragments" / "ratios_erase.yaml").write_text("# why\n")
    monkeypatch.setattr(choose_ratios, "CONF", tmp_path)
    quiet = 'overrides=["debug=tiny","limit=11","device=cpu"]'

    def choose(*given: str) -> str:
        config = compose([*places, *SMALL, quiet, *given], name="programs/ratios")
        choose_ratios.choose_ratios(config, places)
        return capsys.readouterr().out

    assert "0.2" in choose("edits=[erase]", "dry=true", "write=true")
    assert not (tmp_path / "runs").exists()
    told = choose("edits=[erase]", "bound=100", "write=true")
    frame = pd.read_csv(tmp_path / "mini" / "ratios" / "erase.csv")
    assert list(frame["value"]) == [0.2]
    assert frame["chosen"].all()
    assert (frame["n_class"] == 1).all()
    assert (frame["seed"] == 5).all()
    assert (tmp_path / "fragments" / "ratios_erase.yaml").read_text().endswith("{church: 0.2}\n")
    monkeypatch.setattr(choose_ratios, "run", None)  # what is finished is not run again
    assert choose("edits=[erase]", "bound=100").splitlines()[-3:] == told.splitlines()[-3:]
    with pytest.raises(UserError, match=r"1 of 1 curves are not whole: erase of nudity: concept="):
        choose("edits=[erase]", "concepts=[nudity]")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["n=0"], "n=0"),
        (["others=0"], "others=0"),
        (["ladder=[]"], "ladder=.* list at least one"),
        (["model=sd14"], "concepts=None .* list at least one"),
        (["bound=-1"], "bound=-1"),
        (
            ["setting=edit.lr", "write=true"],
            r"write=true writes ratio\.value, and setting=edit\.lr",
        ),
    ],
)
def test_bad_settings_are_named(given: list[str], message: str) -> None:
    config = compose(given, name="programs/ratios")
    with pytest.raises(UserError, match=message):
        choose_ratios.choose_ratios(config)
