"""The paper's tables and figures: lists of runs, how they are laid out, status and report."""
