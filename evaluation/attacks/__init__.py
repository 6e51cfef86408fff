"""White-box attacks on edited models: prompts that bring the concept back (paper Table 3)."""
