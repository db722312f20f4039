"""Scores of the eight benchmarks by VLMEvalKit's rules; pure Python and NumPy.

`scorers.score(dataset, rows)` scores a dataset, `SCORERS[dataset].sample(row)` one answer,
`bootstrap.bootstrap_interval(score)` says how sure a score is.
"""
