"""Placement of parameters and batches on a device mesh, and collectives over its axes."""
