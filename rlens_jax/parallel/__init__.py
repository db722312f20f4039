"""Start-up of JAX for a run."""
