"""How figures look: colour-blind safe, told apart by marker too, readable in print."""

from __future__ import annotations

import io
import logging

import matplotlib
from matplotlib.figure import Figure as Canvas

# Okabe and Ito's colours.
ORANGE, BLUE, GREEN, SKY, BLACK = "#D55E00", "#0072B2", "#009E73", "#56B4E9", "#000000"
COLOURS = {"target": ORANGE, "others": BLUE, "general": GREEN}  # by scope
MARKERS = {"target": "o", "others": "s", "general": "^"}
PANELS_PER_ROW = 3
PANEL_SIZE = (4.2, 3.4)  # inches
DPI = 150
FIXED = {"png": {"Software": None}, "pdf": {"CreationDate": None}}  # the same bytes every time


logging.getLogger("fontTools").setLevel(logging.WARNING)  # it tells of every PDF


def new_canvas(width: float, height: float) -> Canvas:
    """An empty figure of a size in inches."""
    return Canvas(figsize=(width, height), layout="constrained")


def save(canvas: Canvas) -> dict[str, bytes]:
    """The figure as files, by ending: png, and pdf with text that stays text."""
    files = {}
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        for ending, metadata in FIXED.items():
            buffer = io.BytesIO()
            canvas.savefig(buffer, format=ending, dpi=DPI, metadata=metadata)
            files[ending] = buffer.getvalue()
    return files
