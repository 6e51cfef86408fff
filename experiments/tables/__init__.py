"""The paper's tables: the runs that each is made of, its layout, and the way between them."""
