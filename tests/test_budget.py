import pytest

from rlens_jax.budget import Budget, parse_budget
from rlens_jax.errors import UserError


@pytest.mark.parametrize(
    ("text", "kind", "share"),
    [("loss=1%", "loss", 0.01), ("loss=0.01", "loss", 0.01), ("flops=60%", "flops", 0.6), ("time = 0.7", "time", 0.7)],
)
def test_a_budget_is_a_share_of_loss_flops_or_time(text, kind, share):
    assert parse_budget(text) == Budget(kind, share)
    assert parse_budget(str(Budget(kind, share))) == Budget(kind, share)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1%", "a budget has the form loss=1%, flops=60% or time=0.7"),
        ("flop=60%", "did you mean 'flops'"),
        ("loss", "a budget has the form"),
        ("flops=60", "write flops=60%"),
        ("time=0.7ms", "without another unit"),
        ("time=fast", "'fast' is no number"),
        ("loss=0", "above 0 and below 1"),
        ("loss=-1%", "is no number"),
        ("loss=100%", "above 0 and below 1"),
        ("loss=nan", "is no number"),
        ("loss=1%%", "is no number"),
        ("loss=1e-999999999%", "is no number"),
    ],
)
def test_what_is_no_budget_is_refused_with_what_to_write(text, says):
    with pytest.raises(UserError) as caught:
        parse_budget(text)
    assert says in str(caught.value)
