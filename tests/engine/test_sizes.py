"""The batch size that is found fits, and the next one does not."""

import jax
import pytest

from rlens_jax.checkpoints.checkpoint import read_model_kind
from rlens_jax.config import ComputeConfig, RunConfig
from rlens_jax.engine.sizes import fitting_batch_size
from rlens_jax.errors import UserError
from rlens_jax.layout import Bucket
from rlens_jax.sharding.mesh import make_mesh

KIND = read_model_kind("embedded")


def found(available: int) -> int:
    compute = ComputeConfig(state_memory_gb=0)
    mesh = make_mesh(jax.devices()[:1], 1)
    return fitting_batch_size(RunConfig(compute=compute), KIND, mesh, available, Bucket(16, 64), most=16)


def test_as_many_as_fit() -> None:
    plenty, little = found(10**10), found(10**7 + 1_500_000)
    assert plenty == 16
    assert 1 <= little < 16
    with pytest.raises(UserError, match=r"one sample needs 0\.0 GB of a device's 0\.0 GB; raise compute.model_shards"):
        found(10**6)
