"""Where the copies of a model lie, and meshes that do not divide devices or models."""

from dataclasses import dataclass

import jax
import pytest

from rlens_jax.errors import UserError
from rlens_jax.sharding.mesh import check_fits, groups_of, make_mesh

SIZES = {"N": 28, "K": 4, "F": 18944}


def test_devices_that_do_not_divide() -> None:
    with pytest.raises(UserError, match="model_shards = 2 does not divide the 1 devices; choose one of 1"):
        make_mesh(jax.devices()[:1], 2)


def test_devices_of_two_kinds_make_no_mesh() -> None:
    with pytest.raises(UserError, match=r"devices are of different kinds \(A100, H100\), and a program runs on one kind"):
        make_mesh([Chip(0, "gpu", "H100"), Chip(1, "gpu", "A100")], 1)


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


@dataclass(frozen=True)
class Chip:
    """A device of a slice of 4 x 4 chips, with 2 x 2 chips per host, numbered as TPU chips are: row by row of the slice."""

    id: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"

    @property
    def coords(self) -> tuple[int, int]:
        return self.id % 4, self.id // 4

    @property
    def process_index(self) -> int:
        return self.coords[1] // 2 * 2 + self.coords[0] // 2


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_a_copy_of_the_model_lies_on_one_host(shards: int) -> None:
    mesh = make_mesh([Chip(number) for number in range(16)], shards)
    assert [{chip.process_index for chip in group} for group in mesh.devices] == [{g * shards // 4} for g in range(16 // shards)]
    assert groups_of(mesh, 1) == list(range(4 // shards, 8 // shards))


def test_a_copy_on_four_devices_is_a_square() -> None:
    mesh = make_mesh([Chip(number) for number in range(16)], 4)
    assert {chip.coords for chip in mesh.devices[1]} == {(2, 0), (3, 0), (2, 1), (3, 1)}


def test_a_copy_that_is_larger_than_a_host_lies_on_neighbours() -> None:
    mesh = make_mesh([Chip(number) for number in range(16)], 8)
    assert {chip.coords for chip in mesh.devices[0]} == {(x, y) for x in range(4) for y in range(2)}


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_simulated_devices_are_in_their_order(shards: int) -> None:
    devices = jax.devices("cpu")
    if len(devices) % shards:
        pytest.skip("needs more simulated devices")
    mesh = make_mesh(devices, shards)
    assert mesh.devices.ravel().tolist() == devices
