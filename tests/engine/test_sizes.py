"""The batch size that is found fits, and the next one does not."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest
from jax.sharding import Mesh

from rlens_jax.checkpoints.checkpoint import read_model_kind
from rlens_jax.config import ComputeConfig, RunConfig
from rlens_jax.engine import sizes
from rlens_jax.engine.sizes import chosen_batch_size, fitting_batch_size
from rlens_jax.errors import UserError
from rlens_jax.families.registry import ModelKind
from rlens_jax.layout import Bucket
from rlens_jax.sharding.mesh import make_mesh

KIND = read_model_kind("embedded")


@pytest.fixture(scope="module", autouse=True)
def compiled_once() -> Iterator[None]:
    """All tests ask for the same programs, which are compiled for their memory alone."""
    known: dict[int, int] = {}
    real = sizes.max_rows

    def max_rows(needed: Callable[[int], int], available: int, most: int) -> int:
        return real(lambda rows: known[rows] if rows in known else known.setdefault(rows, needed(rows)), available, most)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizes, "max_rows", max_rows)
        yield


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


class Gpu:
    """A small GPU, on which programs are compiled for a CPU."""

    platform, device_kind, process_index = "gpu", "some GPU", 0

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": 10**7 + 1_500_000, "peak_bytes_in_use": 0}


def test_a_configured_size_that_does_not_fit_is_one_line_with_one_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu: Any = Gpu()
    mesh, real = make_mesh([gpu], 1), make_mesh(jax.devices()[:1], 1)
    asked: list[tuple[int, int]] = []

    def fitting(config: RunConfig, kind: ModelKind, _: Any, available: int, bucket: Bucket, most: int) -> int:
        asked.append((available, most))
        return fitting_batch_size(config, kind, real, available, bucket, most)

    monkeypatch.setattr(sizes, "fitting_batch_size", fitting)
    said: list[str] = []
    monkeypatch.setattr(sizes, "say", said.append)

    def chosen(batch_size: int, on: Mesh = mesh) -> int:
        config = RunConfig(compute=ComputeConfig(state_memory_gb=0, batch_size=batch_size))
        return chosen_batch_size(config, KIND, on, Bucket(16, 64), 16)

    fits = chosen(0)
    assert 1 <= fits < 16 and said == [f"batch size: {fits}, as many as fit into memory"]
    assert chosen(fits) == fits
    line = rf"compute.batch_size = 16 does not fit into the 0.0 GB of a some GPU; {fits} fits, and compute.batch_size = 0"
    with pytest.raises(UserError, match=line):
        chosen(16)
    assert asked == [(10**7 + 1_500_000, most) for most in (16, fits, 16)]
    # A CPU takes what it is told.
    assert chosen(16, real) == 16 and len(asked) == 3
