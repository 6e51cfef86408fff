"""What of an error is shown: the message of a user's mistake, the whole traceback of a bug."""

from __future__ import annotations

from hydra.errors import HydraException, InstantiationException
from omegaconf.errors import OmegaConfBaseException

from cad.errors import UserError

SHOWN = (
    UserError,
    HydraException,
    OmegaConfBaseException,
)  # what `find_mistake` may be asked about


def find_mistake(error: BaseException) -> str | None:
    """The message for a mistake that a user can mend; None for everything else.

    Hydra wraps whatever a constructor raises: a UserError among the causes is what the user is
    told, without the wrapping; any other error inside an instantiation is a bug.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return str(cause)
        cause = cause.__cause__
    if isinstance(error, SHOWN) and not isinstance(error, InstantiationException):
        return str(error)
    return None
