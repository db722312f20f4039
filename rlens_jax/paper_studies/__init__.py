"""The studies of the paper: how many layers can be reduced, which ones, and by how much."""
