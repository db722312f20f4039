"""The public names of the package, and that importing it imports no JAX."""

import subprocess
import sys
from pathlib import Path

import pytest

import rlens_jax
from rlens_jax.errors import UserError
from rlens_jax.plan_file import PlanFile


def test_every_public_name_is_there() -> None:
    for name in rlens_jax.__all__:
        assert getattr(rlens_jax, name).__name__ == name
    with pytest.raises(AttributeError, match="'lode'"):
        rlens_jax.lode  # noqa: B018


def test_importing_the_package_and_its_commands_imports_no_jax() -> None:
    code = "import sys, rlens_jax, rlens_jax.commands.rank, rlens_jax.commands.evaluate; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_rank_and_evaluate_refuse_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        rlens_jax.rank(rlens_jax.RunConfig(model="nowhere/at-all", output=str(tmp_path / "rank")))
    config = rlens_jax.EvaluationConfig("nowhere/at-all", PlanFile(), ("pages",), tmp_path / "evaluate")
    with pytest.raises(UserError, match="no such folder"):
        rlens_jax.evaluate(config)
