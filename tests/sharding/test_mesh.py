"""Meshes that do not divide devices or models are refused."""

import jax
import pytest

from rlens_jax.errors import UserError
from rlens_jax.sharding.mesh import check_fits, make_mesh

SIZES = {"N": 28, "K": 4, "F": 18944}


def test_devices_that_do_not_divide() -> None:
    with pytest.raises(UserError, match="model_shards = 2 does not divide the 1 devices; choose one of 1"):
        make_mesh(jax.devices()[:1], 2)


@pytest.mark.parametrize(
    ("shards", "complaint"),
    [
        (8, "28 query heads; choose one of 1, 2, 4"),
        (3, "28 query heads and 18944 FFN units and 4 kv heads; choose one of 1, 2, 4"),
        (7, "18944 FFN units and 4 kv heads; choose one of 1, 2, 4"),
    ],
)
def test_models_that_cannot_be_cut(shards: int, complaint: str) -> None:
    with pytest.raises(UserError, match=f"compute.model_shards = {shards} does not divide the model's {complaint}"):
        check_fits(SIZES, shards)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_models_that_can(shards: int) -> None:
    check_fits(SIZES, shards)
    check_fits({"N": 8, "K": 2, "F": 384}, 2 * shards)
