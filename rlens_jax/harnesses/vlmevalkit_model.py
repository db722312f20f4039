"""The model that VLMEvalKit asks; only `rlens_jax.harnesses.vlmevalkit` imports it, as it needs VLMEvalKit."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmeval.vlm.base import BaseModel

from rlens_jax.data.benchmarks.catalogue import BENCHMARKS, L2_CATEGORIES, LETTERS, Instance, Turn
from rlens_jax.data.samples import IMAGE_MARK
from rlens_jax.errors import UserError
from rlens_jax.families.registry import ModelKind
from rlens_jax.harnesses.backends import Backend, Part, Question

_FIELDS = ("category", *L2_CATEGORIES, "split", "image_path", "hint", "g_index")


class PlanModel(BaseModel):
    """A model under a plan.

    A question of a benchmark of `rlens_jax.evaluate` has the same prompt as there, other data have VLMEvalKit's default one.

    Args:
        backend: answers.
        kind: the model, which selects the prompts.
        max_new_tokens: max length of an answer.
        repetition_penalty: None is the checkpoint's; 1 applies none.
    """

    INTERLEAVE = True

    def __init__(self, backend: Backend, kind: ModelKind, max_new_tokens: int, repetition_penalty: float | None):
        super().__init__()
        self._backend, self._kind, self._decoding = backend, kind, (max_new_tokens, repetition_penalty)

    def use_custom_prompt(self, dataset: str | None) -> bool:
        """Whether `build_prompt` writes the prompts of a data set."""
        return dataset in BENCHMARKS

    def build_prompt(self, line: Any, dataset: str | None = None) -> list[dict[str, str]]:
        """The message of a row of one of `BENCHMARKS`."""
        assert dataset is not None
        paths = [str(path) for path in self.dump_image(line, dataset)]
        # The prompt of MMMU depends on the number of images.
        instance = row_instance(line, dataset, tuple(b"" for _ in paths))
        return message_of(self._kind.benchmark_prompt(instance), paths)

    def generate_inner(self, message: Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
        """The answer to a message; `BaseModel.generate` has checked it. UserError as `Backend.answer`, or for a video."""
        for part in message:
            if part["type"] not in ("text", "image"):
                raise UserError(f"{dataset}: a {part['type']} is not supported, only images")
        parts: tuple[Part, ...] = tuple(part["value"] if part["type"] == "text" else Path(part["value"]) for part in message)
        return self._backend.answer([Question(parts, *self._decoding)])[0]


def row_instance(line: Any, dataset: str, images: tuple[bytes, ...]) -> Instance:
    """A row of VLMEvalKit's table as an instance, without its references; missing values are NaN there."""

    def texts(names: Sequence[str]) -> dict[str, str]:
        return {name: str(line[name]) for name in names if name in line and line[name] == line[name]}

    options = texts(LETTERS) if BENCHMARKS[dataset].task == "choice" else {}
    return Instance(dataset, str(line["index"]), str(line["question"]), (), options, texts(_FIELDS), images)


def message_of(turn: Turn, paths: Sequence[str]) -> list[dict[str, str]]:
    """The turn as a message of VLMEvalKit, with the image files of its instance."""
    chosen = paths if turn.images is None else [paths[place] for place in turn.images]
    texts = turn.text.split(IMAGE_MARK, len(chosen)) if turn.marked else [*[""] * len(chosen), turn.text]
    message: list[dict[str, str]] = []
    for place, text in enumerate(texts):
        message += [{"type": "image", "value": chosen[place - 1]}] if place else []
        message += [{"type": "text", "value": text}] if text else []
    return message
