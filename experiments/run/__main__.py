"""run.py for who has no checkout: `cad-suite`, or `python -m experiments.run`."""

from __future__ import annotations

import runpy

from cad.places import REPOSITORY


def main() -> None:
    """Runs run.py, which ends the process with its exit status."""
    runpy.run_path(str(REPOSITORY / "run.py"), run_name="__main__")


if __name__ == "__main__":
    main()
