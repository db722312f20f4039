"""The pages as tensorflow-datasets: content, safety of preparing, and no TensorFlow."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from rlens_jax.data import pages_tfds
from rlens_jax.data.images import load_images
from rlens_jax.data.pages import DATASETS, SPLITS
from rlens_jax.data.pages_tfds import draw, read_pages
from rlens_jax.data.samples import Sample
from rlens_jax.errors import UserError

SMALL = {"train": 40, "validation": 6, "test": 8}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[Sample]]:
    """All samples by dataset and split."""
    data_dir = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages_tfds, "SAMPLES", SMALL)
        return {(dataset, split): read_pages(dataset, split, data_dir) for dataset in DATASETS for split in SPLITS}


def test_real_sizes():
    assert pages_tfds.SAMPLES == {"train": 2000, "validation": 150, "test": 300}


def test_samples_are_complete_and_unique(pages: dict[tuple[str, str], list[Sample]]):
    for (dataset, split), samples in pages.items():
        assert [sample.id for sample in samples] == [f"{dataset}/{split}/{i:06d}" for i in range(SMALL[split])]
        assert {sample.dataset for sample in samples} == {dataset}
    everything = [sample for samples in pages.values() for sample in samples]
    assert len({sample.images for sample in everything}) == len(everything)


def test_stored_image_question_and_answer_belong_together(pages: dict[tuple[str, str], list[Sample]]):
    """The same draws made again give the stored pixels and words, without loss."""
    for (dataset, split), samples in pages.items():
        for sample, (page, question) in zip(samples, draw(dataset, split, len(samples)), strict=True):
            assert (sample.question, sample.answers) == (question.text, (question.answer,))
            assert np.array_equal(np.asarray(load_images(sample, "white")[0]), page.pixels)


def test_yes_and_no_are_exactly_balanced(pages: dict[tuple[str, str], list[Sample]]):
    for split in SPLITS:
        answers = [sample.answers[0] for sample in pages["pages_yesno", split]]
        assert answers.count("yes") == answers.count("no") == SMALL[split] // 2
        assert answers[::2] != ["no"] * (SMALL[split] // 2)  # and not simply in turns


def test_limit_takes_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pages_tfds, "SAMPLES", SMALL)
    whole = read_pages("pages_read", "test", tmp_path)
    assert read_pages("pages_read", "test", tmp_path, limit=3) == whole[:3]
    assert read_pages("pages_read", "test", tmp_path, limit=1000) == whole


def test_wrong_names_and_places(tmp_path: Path):
    with pytest.raises(UserError, match=r"unknown pages dataset 'pages_raed' .did you mean 'pages_read'"):
        read_pages("pages_raed", "test", tmp_path)
    with pytest.raises(UserError, match="unknown split 'val'"):
        read_pages("pages_read", "val", tmp_path)
    with pytest.raises(UserError, match="limit must be at least 1, not 0"):
        read_pages("pages_read", "test", tmp_path, limit=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"pages_read cannot be prepared in .*file"):
        read_pages("pages_read", "test", tmp_path / "file")


PROGRAM = """
    import sys
    from pathlib import Path
    from rlens_jax.data import pages_tfds
    pages_tfds.SAMPLES = {"train": 300, "validation": 5, "test": 5}
    for dataset in pages_tfds.DATASETS:
        assert len(pages_tfds.read_pages(dataset, "train", Path(sys.argv[1]))) == 300
    assert not {"tensorflow", "torch", "jax"} & set(sys.modules)
"""


def start(data_dir: Path, program: str = PROGRAM) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(data_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": str(data_dir.parent)},
    )


def test_two_processes_at_once_are_quiet_and_need_no_tensorflow(tmp_path: Path):
    """They leave no temporary files either, not even tfds's own."""
    data = tmp_path / "data"
    both = [start(data) for _ in range(2)]
    for process in both:
        assert process.communicate()[0] == ""
        assert process.returncode == 0
    assert not list(tmp_path.rglob("*incomplete*"))
    assert list(tmp_path.iterdir()) == [data]


def test_a_killed_preparation_is_not_taken_for_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    killed = start(
        tmp_path,
        """
        import os, signal, sys
        from pathlib import Path
        from rlens_jax.data import pages_tfds

        def draw_until_killed(rng, split, augment, pages=[]):
            pages.append(split)
            if len(pages) == 30:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(rng, split, augment)

        real, pages_tfds.make_page = pages_tfds.make_page, draw_until_killed
        pages_tfds.read_pages("pages_read", "test", Path(sys.argv[1]))
        """,
    )
    killed.communicate()
    assert killed.returncode == -9
    assert list(tmp_path.rglob("incomplete.*"))
    monkeypatch.setattr(pages_tfds, "SAMPLES", SMALL)
    assert len(read_pages("pages_read", "test", tmp_path)) == 8
    assert not list(tmp_path.rglob("incomplete.*"))
