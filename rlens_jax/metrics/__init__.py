"""Scores of benchmarks by VLMEvalKit's rules, in pure Python.

`scorers.score(dataset, rows)` scores a dataset and `SCORERS[dataset].sample(row)` one answer. A new benchmark is one line of
`scorers.SCORERS`, with a rule for one answer from `text_metrics` or `choice_metrics`, and an aggregate if its score is not the
mean over the questions.
"""
