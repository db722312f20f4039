"""How parameters are kept on a mesh."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from rlens_jax.checkpoints import leaves
from rlens_jax.errors import UserError
from rlens_jax.models.decoder import Decoder
from rlens_jax.ops.ffn_paths import FETCHED, GATHERED
from rlens_jax.ops.ffn_tpu import suited_form
from rlens_jax.sharding.mesh import make_mesh
from tests.toy_decoder import TOY

CONFIG = replace(TOY, num_layers=3, ffn_width=12, tied_head=True)


class Holder(nnx.Module):
    def __init__(self, decoder: Decoder):
        self.decoder = decoder


@pytest.mark.parametrize(
    ("units", "width", "dtype", "device_kind", "halves"),
    [
        (18944 // 4, 3584, jnp.bfloat16, "TPU v5 lite", True),
        (18944, 3584, jnp.bfloat16, "TPU v5", True),
        (18944, 3584, jnp.bfloat16, "TPU v5p", True),
        (18944 // 4, 3584, jnp.bfloat16, "TPU v6 lite", True),
        (18944 // 4, 3584, jnp.bfloat16, "TPU v4", False),  # not compiled for
        (18944 // 4, 3584, jnp.float32, "TPU v5 lite", False),
        (18944 // 4, 3584, jnp.bfloat16, "cpu", False),
        (18944 // 128, 3584, jnp.bfloat16, "TPU v5 lite", False),  # no whole tiles of units
        (4864, 896, jnp.bfloat16, "TPU v5 lite", False),  # half a row is no whole number of lanes
    ],
)
def test_halves_suit_the_devices_whose_kernel_fetches_units(units, width, dtype, device_kind, halves) -> None:
    assert suited_form(units, width, dtype, device_kind) == ("halves" if halves else "rows")
    assert suited_form(units, width, dtype, device_kind, "masked") == "rows"
    if halves:
        assert suited_form(units, width, dtype, device_kind, "kernel") == "halves"
    else:
        with pytest.raises(UserError, match=rf"the FFN path kernel needs .* here are {units} units of .* on a {device_kind}; "):
            suited_form(units, width, dtype, device_kind, "kernel")


@pytest.mark.parametrize("host_bytes", [leaves.HOST_BYTES, 0])
def test_ffn_units_can_be_stored_as_half_rows(host_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row the same numbers; which axis is cut, and all other parameters, stay as they are.

    So it is for stacks that are joined on the host, and for those that are written in place.
    """
    monkeypatch.setattr(leaves, "HOST_BYTES", host_bytes)
    given = Holder(Decoder(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    mesh = make_mesh(jax.devices()[:1], 1)
    rows = leaves.place(given, mesh)
    plain = leaves.arrays_of(rows)
    monkeypatch.setattr(leaves, "suited_form", lambda *_: "halves")
    placed = leaves.place(given, mesh, "kernel")
    assert (rows.decoder.layers.ffn.form, placed.decoder.layers.ffn.form) == ("rows", "halves")
    assert (rows.decoder.layers.ffn.ways, placed.decoder.layers.ffn.ways) == (GATHERED, FETCHED)
    units = {path for path in plain if ".ffn." in path}
    assert len(units) == 3
    kept, axes = leaves.arrays_of(placed), leaves.axes_of(placed)
    assert kept.keys() == plain.keys()
    for path, array in kept.items():
        assert array.shape == ((3, 12, 2, 12) if path in units else plain[path].shape)
        np.testing.assert_array_equal(array, plain[path].reshape(array.shape))
    layout = leaves.layout_of(placed, mesh)
    for path in units:
        assert axes[path] == "F2D"
        assert layout.spec(path, kept[path].shape) == PartitionSpec(None, "model", None, None)
