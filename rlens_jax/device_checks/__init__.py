"""What works on the devices that JAX has, and how fast: the parts of `rlens_jax.doctor`."""
