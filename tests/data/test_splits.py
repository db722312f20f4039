"""Splits: by image, within their limits, the same for the same seed; and the hash of all texts and images."""

from dataclasses import replace
from pathlib import Path

import pytest

from rlens_jax.config import DataConfig
from rlens_jax.data.samples import Sample
from rlens_jax.data.splits import Splits, load_splits, samples_hash, split_samples
from rlens_jax.errors import UserError


def samples(dataset: str, images: int, questions: int) -> list[Sample]:
    return [
        Sample(f"{dataset}{i}.{j}", dataset, (f"{dataset} image {i}".encode(),), f"q{j}", ("a",))
        for i in range(images)
        for j in range(questions)
    ]


def split(members: list[Sample], validation_samples: int = 100, test_samples: int = 100, seed: int = 1) -> Splits:
    data = DataConfig("f", validation_samples=validation_samples, test_samples=test_samples, held_out_share=0.3)
    return split_samples(members, data, seed)


def load(source: str | None) -> Splits:
    data = DataConfig(source, validation_samples=1, test_samples=1)
    return load_splits(data, lambda instance: instance.question, seed=0)


def test_no_image_is_on_both_sides() -> None:
    both = [*samples("x", 10, 3), *samples("y", 7, 2)]
    parts = split(both)
    seen = {name: {sample.images for sample in members} for name, members in parts.items()}
    assert not seen["validation"] & seen["test"]
    assert len(parts["test"]) == 3 * 3 + 2 * 2
    assert len(parts["test"]) + len(parts["validation"]) == len(both)


def test_a_picture_of_several_names_or_datasets_is_on_one_side(tmp_path: Path) -> None:
    """Copies, links, roundabout paths, rows with several images, and two datasets about the same pictures."""
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(b"picture %d" % number)
        (tmp_path / f"copy{number}.png").write_bytes(b"picture %d" % number)
        (tmp_path / f"link{number}.png").symlink_to(f"{number}.png")
    (tmp_path / "sub").mkdir()
    names = ("{}.png", "copy{}.png", "link{}.png", "./{}.png", "sub/../{}.png")
    members = [
        Sample(f"{dataset}{number}{name}", dataset, (tmp_path / name.format(number),), "q", ("a",))
        for dataset in ("x", "y")
        for number in range(6)
        for name in names
    ]
    pair = Sample("pair", "y", (tmp_path / "copy0.png", tmp_path / "sub/../1.png"), "q", ("a",))
    for seed in range(20):
        parts = split([*members, pair], seed=seed)
        seen = {name: {path.read_bytes() for s in chosen for path in s.images} for name, chosen in parts.items()}
        assert not seen["validation"] & seen["test"]
        assert sum(map(len, parts.values())) == len(members) + 1
        for name in parts:
            assert {sample.dataset for sample in parts[name]} == {"x", "y"}


def test_datasets_with_little_choice_choose_first() -> None:
    """The images of `small` are also in `large`: whatever is drawn, each has both splits."""
    large = samples("x", 9, 1)
    small = [replace(sample, id=f"small {sample.id}", dataset="small") for sample in large[:2]]
    for seed in range(20):
        parts = split([*large, *small], seed=seed)
        for chosen in parts.values():
            assert {sample.dataset for sample in chosen} == {"x", "small"}
    pairs = {"a": (0, 1), "b": (1, 2), "c": (0, 2)}
    triangle = [replace(large[i], id=f"{name}{i}", dataset=name) for name, pair in pairs.items() for i in pair]
    with pytest.raises(UserError, match="f: dataset 'c' shares too many images with others to be split"):
        split(triangle)


def test_limits_are_per_dataset_and_the_seed_decides() -> None:
    members = [*samples("x", 10, 3), *samples("y", 7, 2)]
    parts = split(members, validation_samples=4, test_samples=3)
    for part, limit in (("validation", 4), ("test", 3)):
        for dataset in ("x", "y"):
            assert sum(sample.dataset == dataset for sample in parts[part]) == limit
    assert split(members) == split(members)
    assert split(members) != split(members, seed=2)


def test_one_image_cannot_be_split() -> None:
    with pytest.raises(UserError, match="f: dataset 'x' has one image"):
        split(samples("x", 1, 5))


def test_a_source_of_no_known_kind() -> None:
    with pytest.raises(UserError, match=r"data\.source is missing"):
        load(None)
    with pytest.raises(UserError, match=r"data\.source: 'pagse' is neither"):
        load("pagse")
    with pytest.raises(UserError, match=r"data\.benchmarks must name the folder of the TSV files of my\.json"):
        load("my.json")


@pytest.mark.parametrize(
    "change",
    [
        {"id": "other"},
        {"dataset": "y"},
        {"images": (b"other",)},
        {"question": "other"},
        {"answers": ("a", "b")},
        {"marked": True},
        {"as_stored": True},
    ],
)
def test_the_hash_sees_every_field(change: dict[str, object]) -> None:
    members = samples("x", 2, 1)
    before = samples_hash({"test": members})
    assert samples_hash({"test": list(members)}) == before
    assert samples_hash({"validation": members}) != before
    assert samples_hash({"test": [members[0], replace(members[1], **change)]}) != before  # type: ignore[arg-type]
