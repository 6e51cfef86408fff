"""What follows results, tables and figures from outside: Weights & Biases, TensorBoard, a CSV file.

A run does not fail because of it: whatever keeps it from its work becomes a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.run.results import ResultFolder

PICTURES = ("before_after", "attack", "training")  # of a result, where it has them

logger = logging.getLogger(__name__)


class Tracker:
    """Shows results elsewhere, from the beginning of the work; this one nowhere.

    It changes none of the result's files. What keeps it from its work is logged, not raised: a run
    does not fail because of it.
    """

    @contextmanager
    def follow(self, result: ResultFolder, about: Mapping[str, Any]) -> Iterator[None]:
        """Mirror the result that is there when the block ends, unless that was done before.

        `about` the run: its "config", "group" (a sweep's or table's name, or None), "job_type" (the
        edit's name) and "tags".
        """
        yield

    def log_item(
        self,
        name: str,
        panels: Mapping[str, pd.DataFrame],
        notes: Sequence[str],
        paths: Mapping[str, Path],
    ) -> None:
        """Mirror a table or figure of the paper at every call: its panels by heading, its files.

        `paths` has the files by ending: its page "html", a figure's picture "png".
        """


@contextmanager
def harmless(name: str) -> Iterator[None]:
    """Makes a warning of whatever goes wrong in the block, which logs the result of that name."""
    try:
        yield
    except Exception as error:
        logger.warning("%s is not logged (%s); its own files are as they are", name, error)
