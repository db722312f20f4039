"""Scores, costs and times of a plan on benchmarks."""
