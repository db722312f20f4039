"""Comparison with the results of other frameworks."""
