"""The process that compiles; started by `rlens_jax.dry_run.command` only."""

import sys

from rlens_jax.dry_run.command import answer

answer(sys.argv[1:])
