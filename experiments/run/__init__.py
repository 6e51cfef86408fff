"""One experiment: compose, edit, generate, measure, write down."""
