"""The process that compiles; started by `rlens_jax.dry_run.parent` only."""

import sys

from rlens_jax.dry_run.parent import answer

answer(sys.argv[1:])
