"""How many rows fit, and the error if memory runs out."""

import jax
import pytest

from rlens_jax.config import ComputeConfig
from rlens_jax.engine.sizes import bytes_refused, device_bytes, max_rows, memory_explained
from rlens_jax.errors import UserError
from rlens_jax.sharding.mesh import make_mesh


@pytest.mark.parametrize(
    ("available", "rows"), [(109, None), (110, 1), (119, 1), (120, 2), (149, 4), (179, 4), (180, 8), (10**6, 16)]
)
def test_rows_that_fit(available: int, rows: int | None) -> None:
    def needed(rows: int) -> int:
        return 100 + 10 * rows

    if rows is None:
        with pytest.raises(UserError, match=r"one sample needs .* raise compute.model_shards"):
            max_rows(needed, available, 16)
    else:
        assert max_rows(needed, available, 16) == rows


def test_no_more_programs_are_compiled_than_down_to_the_one_that_fits() -> None:
    compiled = []

    def needed(rows: int) -> int:
        compiled.append(rows)
        return 100 + rows**2

    assert max_rows(needed, 164, 16) == 8
    assert compiled == [16, 8]


def test_the_machine_has_memory() -> None:
    assert 1e8 < device_bytes(make_mesh(jax.devices()[:1], 1)) < 1e13


def test_running_out_is_one_line() -> None:
    compute = ComputeConfig(batch_size=8, model_shards=4)
    with pytest.raises(UserError, match=r"compute.batch_size = 8 and compute.model_shards = 4; lower"), memory_explained(compute):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), memory_explained(compute):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded by 4.75G.", 20.5),
        ("RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (1.50T) exceeds available HBM (7.48G).", 1536),
        ("RESOURCE_EXHAUSTED: something else", None),
    ],
)
def test_what_the_compiler_says_it_needs(message: str, needed: float | None) -> None:
    assert bytes_refused(message) == (None if needed is None else round(needed * 2**30))
