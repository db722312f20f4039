"""The paper's studies of where the redundancy is: one command each, see `python -m rlens_jax.studies --help`."""
