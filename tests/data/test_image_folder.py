"""A folder of images as data: every image with the standing questions, without answers."""

from pathlib import Path

import pytest
from PIL import Image

from rlens_jax.config import DataConfig, RunConfig, SearchConfig
from rlens_jax.data.image_folder import QUESTIONS, read_image_folder
from rlens_jax.data.splits import asked_samples, load_splits, with_own
from rlens_jax.errors import UserError


def folder_of(path: Path, count: int) -> Path:
    (path / "deeper.png").mkdir(parents=True)
    (path / "notes.txt").write_text("no image")
    for number in range(count):
        Image.new("RGB", (4, 6), (40 * number, 0, 0)).save(path / f"{number}.{'PNG' if number % 2 else 'jpg'}")
    return path


def test_every_image_has_every_question(tmp_path: Path) -> None:
    samples = read_image_folder(folder_of(tmp_path / "images", 3))
    names = [f"{name}/{number}" for name in ("0.jpg", "1.PNG", "2.jpg") for number in range(len(QUESTIONS))]
    assert [sample.id for sample in samples] == names
    assert {sample.answers for sample in samples} == {()}
    assert [sample.question for sample in samples[: len(QUESTIONS)]] == list(QUESTIONS)


def test_images_are_split_whole(tmp_path: Path) -> None:
    data = DataConfig(str(folder_of(tmp_path / "images", 6)))
    splits = load_splits(data, pytest.fail, seed=0)
    images = [{sample.images for sample in splits[split]} for split in ("validation", "test")]
    assert len(images[0]) == len(images[1]) == 3 and not images[0] & images[1]
    few = load_splits(DataConfig(data.source, validation_samples=2), pytest.fail, seed=0)
    assert len(few["validation"]) == 2


@pytest.mark.parametrize("make", [True, False])
def test_what_is_no_folder_of_images(make: bool, tmp_path: Path) -> None:
    if make:
        folder_of(tmp_path / "images", 0)
    message = "images: no images; a folder must have files that end in .png" if make else "nor a folder of images"
    with pytest.raises(UserError, match=message):
        load_splits(DataConfig(str(tmp_path / "images")), pytest.fail, seed=0)


def test_objectives_that_need_answers_are_refused(tmp_path: Path) -> None:
    data = DataConfig(str(folder_of(tmp_path / "images", 4)))
    splits = load_splits(data, pytest.fail, seed=0)
    for objective in ("teacher_forced", "generation"):
        config = RunConfig(data=data, search=SearchConfig(objective=objective))
        with pytest.raises(
            UserError, match=f"have no answers, which search.objective {objective} needs; set .* to one of kl, agr"
        ):
            with_own(splits, config, {})
    config = RunConfig(data=data, search=SearchConfig(objective="kl"))
    assert asked_samples(splits, config) == splits
    first = splits["test"][0]
    answered = with_own(splits, config, {first.id: (5, 7)})
    assert answered["test"][0].own == (5, 7) and answered["test"][1].own is None


@pytest.mark.parametrize(
    ("source", "objective", "held_out"),
    [
        ("images", "kl", "agreement"),
        ("images", "exact_agreement", "agreement"),
        ("pages", "agreement", "teacher_forced"),
        ("a.jsonl", "kl", "teacher_forced"),
        ("a.json", "generation", "generation"),
    ],
)
def test_the_curves_show_right_answers_where_there_are_any(source: str, objective: str, held_out: str) -> None:
    config = RunConfig(data=DataConfig(source), search=SearchConfig(objective=objective))
    assert config.held_out_measure == held_out
    # The search asks the dense model about its own samples; the curves' samples have their answers.
    samples = {"validation": [], "test": []}
    assert list(asked_samples(samples, config)) == (["validation", "test"] if source == "images" else ["validation"])
