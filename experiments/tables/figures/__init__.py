"""The paper's figures: what each draws of its runs' results."""
