"""The one exception for mistakes that a user can mend."""

from __future__ import annotations


class UserError(Exception):
    """A user's mistake: the message names the value, what is allowed, and the config key.

    Raised before work is spent. `run.py` prints the message alone; a traceback would only hide it.
    """
