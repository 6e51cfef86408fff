"""What is run and shown: one experiment, its result folder, its table, picture and sweep plot."""
