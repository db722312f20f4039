"""The two reductions and token pruning on arrays. Each has a plain reference and a fast path that skips the work."""
