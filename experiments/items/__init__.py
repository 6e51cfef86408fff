"""The paper's items, tables and figures alike: the runs that each is made of, and making them."""
