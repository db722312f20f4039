"""What the adapters of all harnesses ask: questions in, texts out, from this package's programs or from PyTorch."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from rlens_jax.checkpoints.checkpoint import read_model_kind
from rlens_jax.config import Dtype
from rlens_jax.data.samples import IMAGE_MARK
from rlens_jax.engine.deployed_model import load
from rlens_jax.engine.startup import start_jax
from rlens_jax.errors import UserError, suggest
from rlens_jax.plan_file import PlanFile

BackendName = Literal["jax", "torch"]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
MAX_NEW_TOKENS = 512
"""Default max length of an answer, as of `rlens_jax.evaluate`."""
_WINDOW = 64
"""Questions whose images are in memory at once."""

Part = str | Path | bytes
"""Of a question: a text, or an image, as the path of its file or as the file's content."""


@dataclass(frozen=True)
class Question:
    """A user turn.

    Attributes:
        parts: texts and images in order. Texts that follow each other are joined as they are.
        max_new_tokens: max length of the answer.
        repetition_penalty: None is the checkpoint's; 1 applies none.
    """

    parts: tuple[Part, ...]
    max_new_tokens: int = MAX_NEW_TOKENS
    repetition_penalty: float | None = None

    @property
    def images(self) -> list[Path | bytes]:
        """The images, in order."""
        return [part for part in self.parts if not isinstance(part, str)]

    def prompt(self) -> tuple[str, bool]:
        """The text, and whether its "<image>" marks are the places of the images; otherwise these come first, and a mark is text.

        Raises:
            UserError: a text between images has such a mark.
        """
        texts = [part for part in self.parts if isinstance(part, str)]
        if list(self.parts[: len(self.images)]) == self.images:
            return "".join(texts), False
        if any(IMAGE_MARK in text for text in texts):
            raise UserError(f"{IMAGE_MARK} in a text cannot be told from the places of the images around it")
        return "".join(part if isinstance(part, str) else IMAGE_MARK for part in self.parts), True


@runtime_checkable
class Backend(Protocol):
    """A model under a plan."""

    def answer(self, questions: Sequence[Question]) -> list[str]:
        """The greedy answers, in order. UserError if an image or a prompt cannot be used."""


def open_backend(name: str, model: str, plan: PlanFile, *, seed: int = 0, **options: Any) -> Backend:
    """Load a model under a plan.

    Args:
        name: one of `BACKENDS`.
        model: a folder, "embedded", or a name on the hub.
        plan: which layers are reduced, and how.
        seed: of random probes, which the back ends draw differently.
        options: further ones of `JaxBackend`, or of `TorchBackend`.

    Raises:
        UserError: an unknown name, a plan for another model, a model that the back end cannot load, or PyTorch is missing.
    """
    if name not in BACKENDS:
        raise UserError(f"unknown back end {name!r}{suggest(name, BACKENDS)}; there are {' and '.join(BACKENDS)}")
    kind = read_model_kind(model)
    plan.validate(kind.config.decoder, kind.model_type)
    if name == "torch":
        try:
            from rlens_jax.harnesses.torch_backend import TorchBackend
        except ImportError as error:
            raise UserError(f"the back end torch runs PyTorch: install the extra torch ({error})") from None
        return TorchBackend(model, plan, seed=seed, **options)
    return JaxBackend(model, plan, seed=seed, **options)


class JaxBackend:
    """This package's programs; every setting of a plan.

    Args:
        model, plan, seed: as of `open_backend`.
        dtype, batch_size, chunk, model_shards: as of `engine.deployed_model.load`.
    """

    def __init__(
        self,
        model: str,
        plan: PlanFile,
        *,
        seed: int = 0,
        dtype: Dtype | None = None,
        batch_size: int = 8,
        chunk: int | None = None,
        model_shards: int = 1,
    ):
        start_jax()
        self._plan = plan
        self._model = load(model, dtype=dtype, batch_size=batch_size, chunk=chunk, model_shards=model_shards, seed=seed)

    def answer(self, questions: Sequence[Question]) -> list[str]:
        """See `Backend.answer`."""
        groups: dict[tuple[bool, int, float | None], list[tuple[int, str]]] = defaultdict(list)
        for place, question in enumerate(questions):
            text, marked = question.prompt()
            groups[marked, question.max_new_tokens, question.repetition_penalty].append((place, text))
        answers = [""] * len(questions)
        for (marked, length, penalty), members in groups.items():
            generate = partial(self._model.generate, max_new_tokens=length, repetition_penalty=penalty, marks=marked)
            for first in range(0, len(members), _WINDOW):
                places, texts = zip(*members[first : first + _WINDOW], strict=True)
                images = [questions[place].images for place in places]
                for place, text in zip(places, generate(images, texts, self._plan), strict=True):
                    answers[place] = text
        return answers
