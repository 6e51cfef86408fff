"""How people spell the names of methods, concepts and models: conf/names.yaml, and a rule."""

from __future__ import annotations

import re

from omegaconf import OmegaConf

from experiments.run.configuration import CONF

NAMES = {str(key): str(name) for key, name in OmegaConf.load(CONF / "names.yaml").items()}
OURS = "CAD-"  # how the names of the paper's own methods begin


def display(name: str) -> str:
    """ "CAD-Erase" of erase, "French horn" of french_horn."""
    return NAMES.get(name) or (name[:1].upper() + name[1:]).replace("_", " ")


def display_words(text: str) -> str:
    """A name as `display` spells it; of another text the words with an underscore alone.

    FACE_MALE, a label of NudeNet's, stays as it is.
    """
    return NAMES.get(text) or re.sub(r"\b[a-z]+_\w+", lambda word: display(word[0]), text)
