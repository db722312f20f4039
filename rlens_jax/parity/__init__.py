"""Compare our models and rankings with the results of other frameworks."""
