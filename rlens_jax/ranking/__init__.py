"""The ranking run."""
