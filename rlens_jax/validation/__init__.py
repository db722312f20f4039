"""Is it the same model? Bundles of another framework's results, and how ours compare; how two rankings compare."""
