"""Which layers can be reduced: the objective, the search, and the journal of a run."""
