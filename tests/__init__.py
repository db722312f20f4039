"""Tests of rlens_jax; `typechecked` checks the annotations of arrays when a function is called (tests/conftest.py)."""

from beartype import BeartypeConf, beartype

typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # int is allowed where the annotation is float, as in mypy
