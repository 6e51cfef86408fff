"""Where the suite's own files are: configuration, published numbers, the miniature."""

from __future__ import annotations

import sysconfig
from pathlib import Path

_CODE = Path(__file__).resolve().parents[1]
IS_CHECKOUT = (_CODE / "conf").is_dir()
# The checkout, or the folder with the same files that a wheel brings along.
REPOSITORY = _CODE if IS_CHECKOUT else Path(sysconfig.get_path("data"), "share/concept-attribution")
