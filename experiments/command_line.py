"""What the suite's programs beside run.py share."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from experiments.mistakes import SHOWN, find_mistake

log = logging.getLogger(__name__)

USAGE_ERROR = 2  # exit status


def exit_status(program: Callable[[], None]) -> int:
    """0, or USAGE_ERROR after the message of a mistake that the user can mend."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # else Hydra ends the process with its own words
    try:
        program()
    except SHOWN as error:
        message = find_mistake(error)
        if message is None:
            raise
        log.error("%s", message)
        return USAGE_ERROR
    return 0
