from pathlib import Path

import pytest

from rlens_jax.dry_run.request import take_request
from rlens_jax.errors import UserError


def test_without_a_dry_run_nothing_is_taken() -> None:
    assert take_request(["--model", "a", "--seed=1"]) == (None, ["--model", "a", "--seed=1"])


def test_options_are_taken_in_either_spelling(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    request, left = take_request(["--dry-run=v5e:4x4", "--model", "a", "--json", str(file), "--all-buckets"])
    assert request is not None
    assert (request.target.name, request.all_buckets, request.json_file) == ("v5e:4x4", True, file)
    assert left == ["--model", "a"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run"], "--dry-run needs a value"),
        (["--dry-run", "v5e:4x5"], "no TPU topology 'v5e:4x5'; did you mean v5e:4x"),
        (["--json", "a.json"], "--json goes with --dry-run"),
        (["--all-buckets"], "--all-buckets goes with --dry-run"),
        (["--all-buckets=yes", "--dry-run", "v5e:4x4"], "--all-buckets takes no value"),
        (["--dry-run", "v5e:4x4", "--json", "/nowhere/at/all.json"], "the folder /nowhere/at does not exist"),
    ],
)
def test_bad_options(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        take_request(arguments)
