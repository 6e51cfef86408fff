"""Where image sets are made: in this process, on all GPUs of a machine, or on a Ray cluster."""
