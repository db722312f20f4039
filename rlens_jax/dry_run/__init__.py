"""Dry runs: the memory, work and time of a ranking run on a TPU slice, from programs compiled on a machine without TPUs."""
