"""A model as a Python program uses it: load, read a plan, generate.

model = rlens_jax.load("embedded")
plan = rlens_jax.read_plan("plan.json")
text = model.generate(images=["page.png"], prompt="is digit 3 in row 1 a 7 ?", plan=plan)

Its programs are a prefill per plan, and one decoding program for all plans.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from rlens_jax.checkpoints.checkpoint import kind_in, load_model
from rlens_jax.checkpoints.model_folder import find_model
from rlens_jax.config import Dtype
from rlens_jax.console import say
from rlens_jax.data.images import image_file
from rlens_jax.data.samples import IMAGE_MARK, VIDEO_MARK, Sample
from rlens_jax.engine.choices import chosen_dtype
from rlens_jax.engine.model_programs import EVERYWHERE, ROWS, ModelPrograms, Program
from rlens_jax.engine.overflow import not_finite
from rlens_jax.engine.pools import Batch
from rlens_jax.engine.preparing import Resize, as_it_is
from rlens_jax.engine.prompt_batches import AskedPrompts, prompt_batches
from rlens_jax.engine.shapes import Shapes, row_buckets, slot_sizes
from rlens_jax.errors import UserError
from rlens_jax.families.registry import ModelKind
from rlens_jax.files import check_text
from rlens_jax.kept_tokens import Selection
from rlens_jax.models.cache import KVCache
from rlens_jax.models.forward import VisionLanguageModel
from rlens_jax.models.generation import Tokens, decode, prefill
from rlens_jax.models.prompt import FILLER, Preparer, PromptBatch
from rlens_jax.plan_file import PlanFile
from rlens_jax.plans import Plan, Reduction
from rlens_jax.pruning import Pruning
from rlens_jax.pytrees import pytree, unchecked
from rlens_jax.sharding.mesh import check_fits, make_mesh
from rlens_jax.sharding.model_axis import MODEL, WORK

NEW_TOKENS = 128
"""Default max length of an answer."""
BATCH_SIZE = 8
"""Default number of prompts per batch of a work group."""
_LEAST_TEXT, _LEAST_VISUAL, _LEAST_PATCHES, _MOST_PATCHES = 32, 64, 256, 1 << 17

Image = str | Path | bytes
Turns = Sequence[Sequence[str]]
"""Earlier questions of a conversation, each with its answer."""
HIDDEN_BYTES = 64_000_000
"""Bytes of the hidden units of a chunk of tokens on a device (our decision): larger chunks are not faster."""
LEAST_TOKENS = 1024
"""Min tokens of a chunk, over all rows: fewer do not fill the machine."""


@pytree
class Prefilled:
    """A batch whose prompts are in the cache."""

    first: Int[Array, "B Q"]
    """The first new token of each branch."""
    cache: KVCache
    finite: Bool[Array, "B Q"]
    """Whether all scores, of probes and of pruned tokens, and the logits of the first token were finite."""


_HEADS = PartitionSpec(WORK, MODEL)
_ROW_FIELDS = dict.fromkeys(("position", "branch", "shift"), ROWS)
_CACHE = unchecked(KVCache, k=_HEADS, v=_HEADS, **_ROW_FIELDS, start=EVERYWHERE, stop=EVERYWHERE)
_PREFILLED = unchecked(Prefilled, first=ROWS, cache=_CACHE, finite=ROWS)
"""The partition of a prefilled batch over the mesh."""


def automatic_chunk(rows: int, slots: int, ffn_width: int, itemsize: int) -> int | None:
    """Tokens of each row per FFN call, a power of two; None for all of them.

    Chunks save memory if the hidden units of the whole prompt are large: they are several times as wide as the states. All
    other intermediates of a layer are as wide as the states, or are made block by block (attention).

    Args:
        rows: rows of a batch on a device.
        slots: packed slots of a row.
        ffn_width: FFN units on a device.
        itemsize: bytes of a number.
    """
    tokens = max(1, max(LEAST_TOKENS, HIDDEN_BYTES // (ffn_width * itemsize)) // rows)
    chunk = 1 << (tokens.bit_length() - 1)
    return None if slots <= chunk else chunk


class DeployedPrograms(ModelPrograms):
    """Static programs over one model.

    Args:
        model: a family's module with `vision` and `decoder`, laid out on `mesh`.
        mesh: the devices, all of this process.
        seed: draws random probes.
        stop_tokens: the tokens that end a turn.
        chunk: tokens of each row per FFN call in a prefill; None chooses by size.
    """

    def __init__(self, model: VisionLanguageModel, mesh: Mesh, *, seed: int, stop_tokens: Tokens, chunk: int | None = None):
        super().__init__(model, mesh)
        self._seed = seed
        self._stop_tokens = stop_tokens
        self._chunk = chunk
        self._prefills: dict[tuple[Plan, Reduction, Pruning | None, int], Program] = {}
        self._decoders: dict[int, Program] = {}

    def prefill(
        self, visual: Float[Array, "B P visual_width"], batch: PromptBatch, deployed: PlanFile, new_tokens: int
    ) -> Prefilled:
        """Read all prompts of a batch, in a program for this plan alone; the caches have room for `new_tokens` tokens."""
        return self.prefill_program(deployed, new_tokens)(visual, batch)

    def prefill_program(self, deployed: PlanFile, new_tokens: int) -> Program:
        """The program of `prefill`, of its first two arguments."""
        plan, reduction, pruning = deployed.plan, deployed.reduction, deployed.pruning
        key = plan, reduction, pruning, new_tokens
        if key not in self._prefills:

            def run(model: VisionLanguageModel, visual: Array, batch: PromptBatch) -> Prefilled:
                made = prefill(
                    model.decoder,
                    visual,
                    batch,
                    plan,
                    reduction,
                    new_tokens,
                    jax.random.key(self._seed),
                    self.kernel,
                    pruning,
                    self._chunk_of(model, batch),
                )
                return Prefilled(*made)

            self._prefills[key] = self.program("prefill", run, (ROWS, ROWS), _PREFILLED)
        return self._prefills[key]

    def forget(self, deployed: PlanFile) -> None:
        """Drop the compiled prefills of a plan, which take memory."""
        own = deployed.plan, deployed.reduction, deployed.pruning
        self._prefills = {key: program for key, program in self._prefills.items() if key[:3] != own}

    def decode(
        self, prefilled: Prefilled, batch: PromptBatch, new_tokens: int, *, to_the_end: bool = False
    ) -> tuple[Int[Array, "B Q Y"], Bool[Array, "B Q"]]:
        """The greedy answers, and whether all logits were finite. One program for all plans (paper: decoding is never reduced).

        It serves all ways of pruning, too, that leave caches of as many eighths of the dense cache (`rlens_jax.models.cache`).

        Args:
            prefilled: the result of `prefill` for `batch` and `new_tokens`.
            batch: the prompts.
            new_tokens: tokens to generate.
            to_the_end: generate all new tokens even if all answers have ended, for measurements.
        """
        if new_tokens not in self._decoders:

            def run(model: VisionLanguageModel, prefilled: Prefilled, batch: PromptBatch, stop: Array) -> tuple[Array, Array]:
                return decode(model.decoder, prefilled.first, prefilled.cache, batch, new_tokens, stop)

            self._decoders[new_tokens] = self.program("decode", run, (_PREFILLED, ROWS, EVERYWHERE), ROWS)
        # Data, so that measurements run the program that made the answers. No token has the number -1.
        stop = np.array(self._stop_tokens or (-1,), np.int32)
        return self._decoders[new_tokens](prefilled, batch, np.full_like(stop, -1) if to_the_end else stop)

    def _chunk_of(self, model: VisionLanguageModel, batch: PromptBatch) -> int | None:
        if self._chunk is not None:
            return self._chunk
        rows, units = batch.text_ids.shape[0], model.decoder.layers.ffn.gate_proj.kernel.shape[1]
        return automatic_chunk(rows, batch.layout.bucket.slots, units, self.dtype.itemsize)


@dataclass(frozen=True)
class Answer:
    """An answer of a model.

    Attributes:
        text: the generated text without special tokens.
        num_tokens: new tokens, including the one that ends the turn.
        ended: whether the model ended its turn within the maximum length.
    """

    text: str
    num_tokens: int
    ended: bool


class DeployedModel:
    """A loaded model and its programs, which are compiled when a shape first occurs. Made by `load`."""

    def __init__(self, programs: DeployedPrograms, preparer: Preparer, shapes: Shapes, kind: ModelKind):
        self.programs = programs
        self.preparer = preparer
        self.shapes = shapes
        self.kind = kind

    @overload
    def generate(  # type: ignore[overload-overlap]  # a text is also a sequence of texts
        self,
        images: Sequence[Image],
        prompt: str,
        plan: PlanFile | None = None,
        *,
        max_new_tokens: int = NEW_TOKENS,
        marks: bool = False,
        system: str | None = None,
        turns: Turns = (),
    ) -> str: ...

    @overload
    def generate(
        self,
        images: Sequence[Sequence[Image]],
        prompt: Sequence[str],
        plan: PlanFile | None = None,
        *,
        max_new_tokens: int = NEW_TOKENS,
        marks: bool = False,
        system: str | None = None,
        turns: Sequence[Turns] = (),
    ) -> list[str]: ...

    def generate(
        self,
        images: Any,
        prompt: Any,
        plan: PlanFile | None = None,
        *,
        max_new_tokens: int = NEW_TOKENS,
        marks: bool = False,
        system: str | None = None,
        turns: Any = (),
    ) -> str | list[str]:
        """The greedy answer to a prompt with images, or the answers to a list of prompts, each with its list of images.

        Prompts of a list with the same images share what is computed for these, unless the plan prunes visual tokens.

        Args:
            images: paths of image files, or their content as bytes; for a list of prompts, a list of such lists.
            prompt: the question.
            plan: which layers are reduced, and how; None is the dense model.
            max_new_tokens: max length of an answer.
            marks: whether each "<image>" in a prompt is the place of an image. Otherwise it is text, and the images come first.
            system: the system prompt; None leaves it to the checkpoint's chat template.
            turns: earlier questions of the conversation, each with its answer; for a list of prompts, a list of such lists.

        Raises:
            UserError: an empty prompt, another number of marks than of images, an unreadable image, a chat template without a
                place for the system prompt, a prompt longer than the model's context, a plan for another number of layers, or
                numbers that are not finite.
        """
        single = isinstance(prompt, str)
        prompts, image_lists = ([prompt], [images]) if single else (list(prompt), list(images))
        earlier = [turns] if single else list(turns) or [()] * len(prompts)
        for each, what in ((image_lists, "images"), (earlier, "turns")):
            if len(each) != len(prompts):
                raise UserError(f"{len(prompts)} prompts, but {what} for {len(each)}; give a list for each")
        names = ["the prompt"] if single else [f"prompt {number}" for number in range(1, len(prompts) + 1)]
        given = zip(names, image_lists, prompts, earlier, strict=True)
        samples = [make_sample(name, each, text, marks, system, before) for name, each, text, before in given]
        texts = [""] * len(samples)
        for number, answer in self.answer(samples, plan or PlanFile(), max_new_tokens):
            texts[number] = answer.text
        return texts[0] if single else texts

    def answer(self, samples: Sequence[Sample], plan: PlanFile, max_new_tokens: int) -> Iterator[tuple[int, Answer]]:
        """Yield the number of each sample and its answer, batch by batch; UserError as `generate`."""
        self.check(plan, max_new_tokens)
        if samples:
            asked = self.prepare(samples, max_new_tokens, sharing=plan.pruning is None, marked=plan.marked)
            for batch in asked.batches:
                yield from self.answer_batch(asked, batch, plan, max_new_tokens).items()

    def check(self, plan: PlanFile, max_new_tokens: int) -> None:
        """Raise UserError unless the plan fits this model and `max_new_tokens` is positive."""
        plan.validate(self.programs.config, self.kind.model_type)
        self.kind.check_pruning(plan.pruning)
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, not {max_new_tokens}")

    def prepare(
        self, samples: Sequence[Sample], max_new_tokens: int, *, sharing: bool, marked: bool = False, resized: Resize = as_it_is
    ) -> AskedPrompts:
        """Prompts of samples in batches; see `prompt_batches`.

        Only for plans without pruning can they be `sharing` rows. Plans that are `marked` need marks; all others may have them.
        """
        batches = partial(prompt_batches, sharing=sharing, marked=marked, resized=resized)
        return batches(samples, self.preparer, self.programs, self.shapes, max_new_tokens)

    def answer_batch(self, asked: AskedPrompts, batch: Batch, plan: PlanFile, max_new_tokens: int) -> dict[int, Answer]:
        """The answers to a batch of `prepare`, by the number of the sample."""
        if isinstance(plan.pruning, Selection):
            for number in batch.members.tolist():
                plan.pruning.check_sample(asked.samples[number].id, asked.sizes[number].visual)
        prefilled = self.programs.prefill(self.programs.put(batch.visual), batch.inputs, plan, max_new_tokens)
        tokens, finite = map(np.asarray, self.programs.decode(prefilled, batch.inputs, max_new_tokens))
        good, numbers = finite & np.asarray(prefilled.finite), np.asarray(batch.inputs.samples)
        for number in numbers[(numbers != FILLER) & ~good].tolist():
            raise not_finite(self.programs, batch, number, asked.samples[number].id, plan.plan, plan.reduction)
        real = numbers != FILLER
        return {number: self._answer(row) for number, row in zip(numbers[real].tolist(), tokens[real].tolist(), strict=True)}

    def _answer(self, tokens: list[int]) -> Answer:
        chat = self.preparer.chat
        count = chat.length(tokens)
        return Answer(chat.decode(tokens), count, tokens[count - 1] in chat.stop_tokens)


def load(
    model: str | Path,
    *,
    dtype: Dtype | None = None,
    batch_size: int = BATCH_SIZE,
    chunk: int | None = None,
    model_shards: int = 1,
    seed: int = 0,
    verify: bool = False,
    limits: Mapping[str, int] = MappingProxyType({}),
) -> DeployedModel:
    """Load a model to generate with.

    Args:
        model: a published or converted folder, "embedded" (the model that comes with the package), or a repository on the hub.
        dtype: type of weights and computation, float32 or bfloat16; None means bfloat16 on an accelerator and float32 on a CPU.
        batch_size: max prompts per batch of a work group.
        chunk: tokens of a prompt per FFN call; None chooses by size.
        model_shards: devices that share a copy of the model; the copies share the prompts.
        seed: draws random probes, where a plan has them.
        verify: compare a converted folder with the checksums of its conversion first.
        limits: of the sizes of images, in place of the checkpoint's; see `config.LIMITS`.

    Raises:
        UserError: there is no such model, it is not usable or damaged, or it has no such limit.
    """
    for name, value in (("batch_size", batch_size), ("chunk", chunk), ("model_shards", model_shards)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    folder = find_model(model)
    check_fits(kind_in(folder).config.decoder.sizes, model_shards)
    mesh = make_mesh(jax.local_devices(), model_shards)
    kind, module = load_model(folder, jnp.dtype(chosen_dtype(dtype, jax.default_backend())), mesh=mesh, verify=verify)
    preparer, context = kind.preparer(folder, limits), kind.config.decoder.context
    programs = DeployedPrograms(module, mesh, seed=seed, stop_tokens=preparer.chat.stop_tokens, chunk=chunk)
    shapes = Shapes(
        row_buckets(slot_sizes(_LEAST_TEXT, context), slot_sizes(_LEAST_VISUAL, context)),
        tuple(kind.image_sizes(slot_sizes(_LEAST_PATCHES, _MOST_PATCHES))),
        kind.image_arrays,
        batch_size,
    )
    return DeployedModel(programs, preparer, shapes, kind)


def make_sample(
    name: str, images: Sequence[Image], prompt: str, marked: bool, system: str | None = None, turns: Turns = ()
) -> Sample:
    """A sample to answer; errors begin with `name`.

    Raises:
        UserError: an empty prompt, another number of marks than of images, the mark of a video, an image file that does not
            exist, or turns that are no pairs of texts.
    """
    if isinstance(images, str | Path | bytes):
        raise UserError(f"{name}: images must be a list of files, not one file")
    if not prompt.strip():
        raise UserError(f"{name}: is empty; ask something")
    if any(isinstance(turn, str) or len(turn) != 2 for turn in turns):
        raise UserError(f"{name}: turns must be pairs of a question and its answer")
    for text in (prompt, *(part for turn in turns for part in turn), system or ""):
        check_text(text, name)
    questions = [*(question for question, _ in turns), prompt]
    if any(VIDEO_MARK in text for text in questions):
        if marked:
            raise UserError(f"{name}: has the mark {VIDEO_MARK}: videos are not supported, only images")
        say(f"note: {name}: {VIDEO_MARK} is text; videos are not supported, only images")
    marks = sum(text.count(IMAGE_MARK) for text in questions)
    if marked and marks != len(images):
        raise UserError(
            f"{name}: has {marks} {IMAGE_MARK} mark(s) for {len(images)} image(s); use one mark for each image, or no marks"
        )
    sources = tuple(
        image if isinstance(image, bytes) else image_file(str(image), Path(), f"{name}: image {number}")
        for number, image in enumerate(images, 1)
    )
    conversation = tuple((question, answer) for question, answer in turns)
    return Sample(name, "", sources, prompt, (), marked, system=system, turns=conversation)
