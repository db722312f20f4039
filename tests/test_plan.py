"""Bad input of `python -m rlens_jax.plan`; the search itself is tested in tests/planning."""

import pytest

from rlens_jax.commands.plan import main
from rlens_jax.errors import UserError


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--budget is missing: name what the plan may cost"),
        (["--budget", "loss=1"], "write loss=1%"),
        (["--budget", "tiem=0.7"], "did you mean 'time'"),
        (["--budget", "flops=60%", "--joint.method", "gredy"], "did you mean 'greedy'"),
        (["--budget", "flops=60%", "--joint.budgett", "x"], "did you mean '--joint.budget'"),
        (["--budget", "flops=60%", "--joint.ffn_levels", "0"], "skip"),
        (["--budget", "flops=60%", "--joint.milestones", "1"], "above 0 and below 1"),
        (["--budget", "flops=60%", "--joint.budget", "loss=1%"], "differ; give one"),
        (["--budget", "loss=1%", "--model", "/no/such/folder"], "no/such/folder"),
    ],
)
def test_bad_input_is_one_line(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UserError, SystemExit)) as caught:
        main(arguments)
    assert says in str(caught.value)
    assert not list(tmp_path.iterdir())
