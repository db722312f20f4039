"""Large images: patches that query block by block."""

import jax
import jax.numpy as jnp
import pytest

from rlens_jax.families.qwen2_vl import model as qwen2_vl


@pytest.mark.parametrize("block", [1, 4, 6, 16])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 3, 16, 4))
    is_patch = jnp.arange(16)[None] < jnp.array([16, 11])[:, None]
    whole = qwen2_vl.attend_image(q, k, v, is_patch)
    monkeypatch.setattr(qwen2_vl, "QUERY_BLOCK", block)
    assert jnp.abs(qwen2_vl.attend_image(q, k, v, is_patch) - whole).max() < 1e-6
    assert jnp.abs(whole[1] - qwen2_vl.attend_image(q, k, v, jnp.ones_like(is_patch))[1]).max() > 1e-2
