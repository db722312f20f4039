"""A plan as a model of lmms-eval:

    lmms-eval --model rlens_jax --model_args model=FOLDER,plan=plan.json --tasks pope --output_path runs/lmms

lmms-eval finds it by its entry point, and only lmms-eval imports this module. docs/harnesses.md has an example.
"""

import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from PIL import Image

from rlens_jax.config import Dtype
from rlens_jax.console import BAD_INPUT, say
from rlens_jax.errors import UserError, suggest
from rlens_jax.families.generation_config import GenerationConfig
from rlens_jax.harnesses.backends import MAX_NEW_TOKENS, Part, Question, open_backend
from rlens_jax.plan_file import PlanFile, read_plan
from rlens_jax.plans import Operator

_OPTIONS = (
    "model",
    "plan",
    "attention",
    "ffn",
    "backend",
    "dtype",
    "max_new_tokens",
    "repetition_penalty",
    "seed",
    "batch_size",
    "device",
)


class PlanModel(lmms):
    """A model under a plan; answers are greedy. The arguments are those of `--model_args`.

    Args:
        model: a folder, "embedded", or a name on the hub.
        plan: plan file, ranking.json or published policy; None is the dense model.
        attention, ffn: with a ranking.json: number of layers to reduce.
        backend: "jax", or "torch" for the Hugging Face model in PyTorch.
        dtype: of weights and computation.
        max_new_tokens: max length of an answer where the task says none.
        repetition_penalty: where the task says none; None is the checkpoint's, and 1 applies none.
        seed: of random probes.
        batch_size: prompts per batch of the back end jax; lmms-eval passes it.
        max_batch_size: of a batch size that lmms-eval calls "auto", which is not supported.
        device: of the back end torch; lmms-eval passes it.

    Raises:
        UserError: an unknown argument, or as `read_plan` and `open_backend`.
    """

    is_simple = False

    def __init__(
        self,
        model: str = "embedded",
        plan: str | None = None,
        attention: int | None = None,
        ffn: int | None = None,
        backend: str = "jax",
        dtype: Dtype | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        repetition_penalty: float | str | None = None,
        seed: int = 0,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **others: Any,
    ):
        super().__init__()
        for name in others:
            raise UserError(f"unknown model argument {name!r}{suggest(name, _OPTIONS)}; there are {', '.join(_OPTIONS)}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"the batch size must be a whole number of at least 1, not {batch_size}")
        if type(max_new_tokens) is not int or max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be a whole number of at least 1, not {max_new_tokens}")
        if isinstance(repetition_penalty, str):
            raise UserError(f"repetition_penalty must be a positive number, not {repetition_penalty}")
        GenerationConfig().decoding(max_new_tokens, max_new_tokens, repetition_penalty)  # refuses a penalty out of range
        given: dict[Operator, int | None] = {"attention": attention, "ffn": ffn}
        first = {operator: count for operator, count in given.items() if count is not None}
        if first and plan is None:
            raise UserError("attention and ffn need a plan that is a ranking.json")
        read = PlanFile() if plan is None else read_plan(plan, first or None)
        options = {"device": device} if backend == "torch" else {"batch_size": int(batch_size)}
        self._decoding = {"max_new_tokens": max_new_tokens, "repetition_penalty": repetition_penalty}
        self._backend = open_backend(backend, str(model), read, seed=seed, dtype=dtype, **options)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "PlanModel":
        """The model of `--model_args`. Bad input is one line and exit code 2, as in all commands here, and no traceback."""
        try:
            return super().create_from_arg_string(arg_string, additional_config)
        except UserError as error:
            say(f"error: {error}")
            sys.exit(BAD_INPUT)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The greedy answers, in order, each cut at the texts that its task ends answers with.

        UserError as `Backend.answer`, or for videos, sounds and turns that are not the user's.
        """
        questions: list[Question] = []
        ends: list[list[str]] = []
        sampled = set()
        for request in requests:
            _, doc_to_messages, settings, doc_id, task, split = request.args
            messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
            decoding = {name: settings.get(name, value) for name, value in self._decoding.items()}
            questions.append(Question(_parts(messages, task), **decoding))
            ends.append(_ends(settings))
            if settings.get("do_sample") or settings.get("temperature") or (settings.get("num_beams") or 1) > 1:
                sampled.add(task)
        for task in sorted(sampled):
            say(f"note: {task} asks for sampling or beams; the answers are greedy")
        answers = self._backend.answer(questions)
        return [_cut(answer, texts) for answer, texts in zip(answers, ends, strict=True)]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not supported."""
        raise NotImplementedError("rlens_jax generates answers; tasks that score given answers are not supported")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not supported."""
        raise NotImplementedError("rlens_jax answers single questions; tasks of several rounds are not supported")


def manifest() -> ModelManifest:
    """What the entry point `lmms_eval.models` gives lmms-eval."""
    return ModelManifest(model_id="rlens_jax", chat_class_path=f"{__name__}.{PlanModel.__name__}")


def _parts(messages: ChatMessages, task: str) -> tuple[Part, ...]:
    parts: list[Part] = []
    for message in messages.messages:
        if message.role != "user":
            raise UserError(f"{task}: has a turn of the role {message.role}; only a single question is supported")
        for content in message.content:
            if content.type not in ("text", "image"):
                raise UserError(f"{task}: has a part of the type {content.type}, which is not supported, only images")
            parts.append(content.text if content.type == "text" else _file(content.url))
    return tuple(parts)


def _file(image: Image.Image | str) -> Path | bytes:
    """The image file of a part: a path, or a PNG file of the pixels, which loses nothing."""
    if isinstance(image, str):
        return Path(image)
    file = io.BytesIO()
    image.convert("RGB").save(file, "png", compress_level=1)
    return file.getvalue()


def _ends(settings: Mapping[str, Any]) -> list[str]:
    """The texts that end an answer. Without any, lmms-eval names an empty line, which its own chat models ignore, too."""
    until = settings.get("until") or []
    return [text for text in ([until] if isinstance(until, str) else until) if text.strip("\n")]


def _cut(answer: str, ends: Sequence[str]) -> str:
    """The answer up to the first of the texts that end it."""
    return answer[: min((place for end in ends if (place := answer.find(end)) >= 0), default=len(answer))]
