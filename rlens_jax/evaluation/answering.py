"""Answers all questions of a dataset, except those whose answers are in the log.

Questions are answered in windows, so that only the images of one window are in memory. All questions about the same images are in
one window, where they share rows. The batches of a window depend on its questions alone, and a batch is computed completely or
not at all. So a resumed evaluation computes the same batches, in the same shapes, as one that was never interrupted.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from rlens_jax.console import Progress, say
from rlens_jax.data.images import images_key
from rlens_jax.data.samples import Sample
from rlens_jax.engine.deployed_model import DeployedModel
from rlens_jax.engine.prompt_batches import AskedPrompts
from rlens_jax.errors import UserError
from rlens_jax.evaluation.answers import Answers, Key, LoggedAnswer, question_hash
from rlens_jax.evaluation.datasets import Dataset
from rlens_jax.evaluation.evaluation import Asking
from rlens_jax.evaluation.profiles import Manner
from rlens_jax.models.prompt import Preparer

WINDOW_BATCHES = 8
"""Batches per window, at least: enough questions that batches of several shapes fill up."""


@dataclass(frozen=True)
class Questions:
    """The questions of a dataset by their places, and which of them cannot be asked."""

    dataset: Dataset
    hashes: Sequence[str]
    images: Sequence[Hashable]
    """Equal for questions about the same images."""
    manner: Manner
    """How they are asked and answered."""
    preparer: Preparer
    """Prepares their images, which may have limits of their own, and their prompts."""
    unusable: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, dataset: Dataset, manner: Manner, preparer: Preparer) -> "Questions":
        """All questions of a dataset; reads all images."""
        questions = cls(dataset, [], [], manner, preparer)
        hashes: list[str] = []
        images: list[Hashable] = []
        for place in range(len(dataset.indices)):
            sample = questions.sample(place)
            key = images_key(sample)
            hashes.append(question_hash(sample, key))
            images.append(key or place)
        return replace(questions, hashes=hashes, images=images)

    def sample(self, place: int) -> Sample:
        """A question as it is asked."""
        return self.manner.sample(self.dataset.sample(place), self.dataset.indices[place])

    @property
    def per_image(self) -> float:
        """Mean number of questions about the same images."""
        return len(self.images) / len(set(self.images))

    def windows(self, least: int) -> Iterator[list[int]]:
        """All places, in windows of at least `least`: ordered by the first question about the same images."""
        by_images: dict[Hashable, list[int]] = defaultdict(list)
        for place, key in enumerate(self.images):
            by_images[key].append(place)
        window: list[int] = []
        for places in by_images.values():
            window += places
            if len(window) >= least:
                yield window
                window = []
        if window:
            yield window

    def key(self, variant: str, place: int) -> Key:
        return variant, self.dataset.name, self.hashes[place]

    def answers(self, variant: str, answers: Answers) -> list[LoggedAnswer | None]:
        """The answers in order; None for a question that cannot be asked."""
        return [answers.get(self.key(variant, place)) for place in range(len(self.hashes))]


def answer_questions(asking: Asking, model: DeployedModel, datasets: Sequence[Questions], answers: Answers) -> None:
    """Answer the questions whose answers are not in the log, and note in `datasets` which cannot be asked.

    Raises:
        UserError: a question cannot be asked, and may not be skipped, or none of a dataset can.
    """
    last = [*asking.variants][-1]
    if asking.sharing and not asking.shares and any(questions.per_image > 1 for questions in datasets):
        say("questions about the same images share nothing: the plan prunes visual tokens, other ones for each question")
    for questions in datasets:
        _answer_dataset(asking, model, questions, answers)
        alone = all(answer is None or answer.row[1] == 1 for answer in questions.answers(last, answers))
        if asking.shares and questions.per_image > 1 and alone:
            say(
                f"{questions.dataset.name}: questions about the same images share nothing: "
                "they differ before their images, or are longer than these"
            )


def _answer_dataset(asking: Asking, model: DeployedModel, questions: Questions, answers: Answers) -> None:
    model, variants, name = model.prepared_by(questions.preparer), asking.variants, questions.dataset.name

    def known(place: int, variant: str) -> bool:
        return questions.key(variant, place) in answers

    places = range(len(questions.hashes))
    with Progress(f"answering {name}{asking.described}", len(places) * len(variants), "answers") as shown:
        shown.advance(sum(known(place, variant) for place in places for variant in variants), resumed=True)
        for window in questions.windows(WINDOW_BATCHES * asking.batch_size * model.programs.groups):
            missing = [variant for variant in variants if not all(known(place, variant) for place in window)]
            if not missing:
                continue
            asked, prompts = _prepared(asking, model, questions, window)
            if prompts is None:
                continue
            for batch in prompts.batches:
                members = [asked[number] for number in batch.members]
                for variant in missing:
                    if all(known(place, variant) for place in members):
                        continue
                    new: dict[Key, LoggedAnswer] = {}  # a question may be there twice
                    found, *_ = model.answer_batch(prompts, batch, variants[variant], questions.manner.decoding)
                    for number, answer in found.items():
                        if not known(asked[number], variant):
                            key, size = questions.key(variant, asked[number]), prompts.sizes[number]
                            new[key] = LoggedAnswer(
                                variant,
                                name,
                                questions.dataset.indices[asked[number]],
                                key[2],
                                answer.text,
                                answer.num_tokens,
                                answer.ended,
                                (size.text, size.visual),
                                (size.trunk_text, size.sharers),
                            )
                    answers.append(list(new.values()))
                    shown.advance(len(members))
    if len(questions.unusable) == len(places):
        raise UserError(f"{name}: no question can be asked")


def _prepared(
    asking: Asking, model: DeployedModel, questions: Questions, window: Sequence[int]
) -> tuple[list[int], AskedPrompts | None]:
    """The places of a window whose questions can be asked, and the prepared samples."""
    samples = [questions.sample(place) for place in window]
    ready = partial(model.prepare, decoding=questions.manner.decoding, marked=asking.marked, resized=asking.resized)
    try:
        return list(window), ready(samples, sharing=asking.shares)
    except UserError as error:
        if not asking.skip_unusable:
            raise UserError(f"{error}; with --skip-unusable such questions are not asked and count as wrong") from None
    usable = []
    for place, sample in zip(window, samples, strict=True):
        try:
            ready([sample], sharing=False)
            usable.append(place)
        except UserError as error:
            questions.unusable.add(place)
            say(f"counted as wrong: {error}")
    asked = [sample for place, sample in zip(window, samples, strict=True) if place in usable]
    return usable, ready(asked, sharing=asking.shares) if asked else None
