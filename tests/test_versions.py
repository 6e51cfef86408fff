"""constraints.txt: a version for every requirement of pyproject.toml that the tests need."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[1]


def test_every_requirement_has_a_version_that_it_allows() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    versions = {canonicalize_name(name): version for name, version in pins.items()}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [Requirement(each) for each in [*project["dependencies"], *extras["dev"]]]
    for each in (each for each in wanted if each.name != project["name"]):
        assert each.specifier.contains(versions[canonicalize_name(each.name)]), each
