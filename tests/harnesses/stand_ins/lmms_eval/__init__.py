"""Stands in for lmms-eval: the parts of its interface that the adapter uses, as of lmms-eval 0.7.3."""
