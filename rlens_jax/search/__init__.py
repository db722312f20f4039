"""The layer search in pure Python: no JAX."""
