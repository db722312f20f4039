"""A model as a Python program uses it: load, read a plan, generate.

model = rlens_jax.load("embedded")
plan = rlens_jax.read_plan("plan.json")
text = model.generate(images=["page.png"], prompt="is digit 3 in row 1 a 7 ?", plan=plan)

`model.answers` takes a batch, and also returns numbers of tokens and times. The programs are a prefill per plan, and one decoding
program for all plans.
"""

import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from rlens_jax.checkpoints.checkpoint import kind_in, load_model
from rlens_jax.checkpoints.model_folder import find_model
from rlens_jax.config import Dtype, FfnPath
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
from rlens_jax.engine.sizes import Placed, bytes_on_device, device_bytes, is_out_of_memory, out_of_memory_says
from rlens_jax.errors import UserError, suggest
from rlens_jax.families.generation_config import GENERATION_FILE, Decoding, GenerationConfig, read_generation_config
from rlens_jax.families.registry import ModelKind
from rlens_jax.files import check_text
from rlens_jax.kept_tokens import Selection
from rlens_jax.models.cache import KVCache
from rlens_jax.models.forward import VisionLanguageModel
from rlens_jax.models.generation import Penalty, Tokens, decode, prefill
from rlens_jax.models.prompt import FILLER, Preparer, PromptBatch
from rlens_jax.ops.ffn_paths import ways_on
from rlens_jax.plan_file import PlanFile
from rlens_jax.plans import FULL, SKIP, Plan, Reduction
from rlens_jax.pruning import Pruning
from rlens_jax.pytrees import pytree, unchecked
from rlens_jax.sharding.mesh import check_fits, make_mesh
from rlens_jax.sharding.model_axis import MODEL, WORK

NEW_TOKENS = 128
"""Default max length of an answer, where the checkpoint says none."""
BATCH_SIZE = 8
"""Default number of prompts per batch of a work group."""
_LEAST_TEXT, _LEAST_VISUAL, _LEAST_PATCHES, _MOST_PATCHES = 32, 64, 256, 1 << 17

Image = str | Path | bytes
Turns = Sequence[Sequence[str]]
"""Earlier questions of a conversation, each with its answer."""


class Options(TypedDict, total=False):
    """Options of `DeployedModel.answers`."""

    max_new_tokens: int | None
    """Max length of an answer; None is the checkpoint's, or else 128."""
    repetition_penalty: float | None
    """None is the checkpoint's; 1 applies none."""
    marks: bool
    """Whether each "<image>" in a question is the place of an image. Otherwise it is text, and the images come first."""
    system: str | None
    """The system prompt of all prompts; None leaves it to the checkpoint's chat template."""


_LESS_MEMORY = "a smaller batch size or more model shards"
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
        self._prefills: dict[tuple[Plan, Reduction, Pruning | None, int, Penalty | None], Program] = {}

    def prefill(
        self,
        visual: Float[Array, "B P visual_width"],
        batch: PromptBatch,
        deployed: PlanFile,
        new_tokens: int,
        penalty: Penalty | None = None,
    ) -> Prefilled:
        """Read all prompts of a batch, in a program for this plan alone; the caches have room for `new_tokens` tokens.

        Raises:
            UserError: a device's memory ran out; with the number of rows that fits.
        """
        program = self.prefill_program(deployed, new_tokens, penalty)
        try:
            return jax.block_until_ready(program(visual, batch))  # an accelerator may run out only when it runs
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(str(error)):
                raise
        rows, available = len(batch.text_ids) // self.groups, device_bytes(self.mesh)
        what = f"{rows} prompts of {batch.layout.bucket.slots} tokens do not fit into the {available / 1e9:.1f} GB of a device"
        fits = self._fitting_rows(program, visual, batch, available)
        advice = f"a batch size of {fits} does" if fits else "nor does one; use more model shards or smaller chunks"
        raise UserError(f"{what}; {advice}")

    def _fitting_rows(self, program: Program, visual: Array, batch: PromptBatch, available: int) -> int:
        """The first of a half, a quarter, ... of a work group's rows whose `program` fits; 0 if none does."""
        place, rows = Placed(self.mesh), len(batch.text_ids) // self.groups

        def of_rows(leaf: Any) -> jax.ShapeDtypeStruct:
            return place((rows * self.groups, *leaf.shape[1:]), leaf.dtype)

        while rows := rows // 2:
            arguments = jax.tree.map(of_rows, (visual, batch))
            sizes: Any = program.lower(*arguments).compile().memory_analysis()
            temporary = sizes.temp_size_in_bytes + sizes.output_size_in_bytes
            if bytes_on_device((self.leaves, arguments)) + temporary <= available:
                break
        return rows

    def prefill_program(self, deployed: PlanFile, new_tokens: int, penalty: Penalty | None = None) -> Program:
        """The program of `prefill`, of its first two arguments."""
        plan, reduction, pruning = deployed.plan, deployed.reduction, deployed.pruning
        key = plan, reduction, pruning, new_tokens, penalty
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
                    penalty,
                )
                return Prefilled(*made)

            self._prefills[key] = self.program("prefill", run, (ROWS, ROWS), _PREFILLED)
        return self._prefills[key]

    def forget(self, deployed: PlanFile) -> None:
        """Drop the compiled prefills of a plan, which take memory."""
        own = deployed.plan, deployed.reduction, deployed.pruning
        self._prefills = {key: program for key, program in self._prefills.items() if key[:3] != own}

    def decode(
        self,
        prefilled: Prefilled,
        batch: PromptBatch,
        new_tokens: int,
        *,
        to_the_end: bool = False,
        penalty: Penalty | None = None,
    ) -> tuple[Int[Array, "B Q Y"], Bool[Array, "B Q"]]:
        """The greedy answers, and whether all logits were finite. One program for all plans (paper: decoding is never reduced).

        It serves all ways of pruning, too, that leave caches of as many eighths of the dense cache (`rlens_jax.models.cache`).

        Args:
            prefilled: the result of `prefill` for `batch` and `new_tokens`.
            batch: the prompts.
            new_tokens: tokens to generate.
            to_the_end: generate all new tokens even if all answers have ended, for measurements.
            penalty: the one of `prefill`.
        """

        def run(model: VisionLanguageModel, prefilled: Prefilled, batch: PromptBatch, stop: Array) -> tuple[Array, Array]:
            return decode(model.decoder, prefilled.first, prefilled.cache, batch, new_tokens, stop, penalty)

        specs = (_PREFILLED, ROWS, EVERYWHERE), ROWS
        program = self.once(("decode", new_tokens, penalty), lambda: self.program("decode", run, *specs))
        # Data, so that measurements run the program that made the answers. No token has the number -1.
        stop = np.array(self._stop_tokens or (-1,), np.int32)
        return program(prefilled, batch, np.full_like(stop, -1) if to_the_end else stop)

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


@dataclass(frozen=True)
class Answers:
    """The answers to a batch of prompts, in order, and where the seconds went.

    The first batch of a shape compiles its programs, which its times include.

    Attributes:
        answers: one per prompt.
        prepare_seconds: images decoded and through the vision tower, prompts written.
        prefill_seconds: prompts read, up to the first token of each answer.
        decode_seconds: the further tokens.
    """

    answers: tuple[Answer, ...]
    prepare_seconds: float
    prefill_seconds: float
    decode_seconds: float

    @property
    def texts(self) -> list[str]:
        """The texts, in order."""
        return [answer.text for answer in self.answers]

    @property
    def num_tokens(self) -> list[int]:
        """New tokens of each answer, in order."""
        return [answer.num_tokens for answer in self.answers]


class DeployedModel:
    """A loaded model and its programs, which are compiled when a shape first occurs. Made by `load`.

    Args:
        programs: the model on its devices.
        preparer: of images and prompts.
        shapes: the static shapes of its batches.
        kind: family and sizes.
        generation: what the checkpoint says of the decoding of answers.
    """

    def __init__(
        self, programs: DeployedPrograms, preparer: Preparer, shapes: Shapes, kind: ModelKind, generation: GenerationConfig
    ):
        self.programs = programs
        self.preparer = preparer
        self.shapes = shapes
        self.kind = kind
        self.generation = generation

    @overload
    def generate(  # type: ignore[overload-overlap]  # a text is also a sequence of texts
        self, images: Sequence[Image], prompt: str, plan: PlanFile | None = None, *, turns: Turns = (), **options: Unpack[Options]
    ) -> str: ...

    @overload
    def generate(
        self,
        images: Sequence[Sequence[Image]],
        prompt: Sequence[str],
        plan: PlanFile | None = None,
        *,
        turns: Sequence[Turns] = (),
        **options: Unpack[Options],
    ) -> list[str]: ...

    def generate(
        self, images: Any, prompt: Any, plan: PlanFile | None = None, *, turns: Any = (), **options: Unpack[Options]
    ) -> str | list[str]:
        """The greedy answer to a prompt with images, or the answers to a list of prompts, each with its list of images.

        Of a single prompt, `images` are its images and `turns` its earlier turns. Otherwise as `answers`, which also returns
        numbers of tokens and times.
        """
        if isinstance(prompt, str):
            return self._answers(["the prompt"], [images], [prompt], [turns], plan, options).texts[0]
        return self.answers(images, prompt, plan, turns=turns, **options).texts

    def answers(
        self,
        images: Sequence[Sequence[Image]],
        prompts: Sequence[str],
        plan: PlanFile | None = None,
        *,
        turns: Sequence[Turns] = (),
        **options: Unpack[Options],
    ) -> Answers:
        """The greedy answers to a list of prompts, with numbers of tokens and times.

        Prompts with the same images share what is computed for these, unless the plan prunes visual tokens.

        Args:
            images: for each prompt, paths of image files, or their content as bytes.
            prompts: the questions.
            plan: which layers are reduced, and how; None is the dense model.
            turns: for each prompt, the earlier turns of its conversation; without any, no prompt has some.
            options: see `Options`.

        Raises:
            UserError: an empty prompt, another number of marks than of images, an unreadable image, a chat template without a
                place for the system prompt, a prompt longer than the model's context, a plan for another number of layers, an
                option out of range, or numbers that are not finite.
        """
        asked, image_lists = list(prompts), list(images)
        earlier = list(turns) or [()] * len(asked)
        for each, what in ((image_lists, "images"), (earlier, "turns")):
            if len(each) != len(asked):
                raise UserError(f"{len(asked)} prompts, but {what} for {len(each)}; give a list for each")
        names = [f"prompt {number}" for number in range(1, len(asked) + 1)]
        return self._answers(names, image_lists, asked, earlier, plan, options)

    def _answers(
        self,
        names: Sequence[str],
        images: Sequence[Sequence[Image]],
        prompts: Sequence[str],
        turns: Sequence[Turns],
        plan: PlanFile | None,
        options: Options,
    ) -> Answers:
        """`answers` to prompts with these names in errors."""
        known = inspect.get_annotations(Options)
        for name in options.keys() - known:
            raise UserError(f"unknown option {name}{suggest(name, known)}; there are {', '.join(known)}")
        decoding = self.generation.decoding(NEW_TOKENS, options.get("max_new_tokens"), options.get("repetition_penalty"))
        plan = plan or PlanFile()
        plan.validate(self.programs.config, self.kind.model_type)
        self.kind.check_pruning(plan.pruning)
        marked, system = options.get("marks", False), options.get("system")
        samples = [
            make_sample(name, each, prompt, marked, system, before)
            for name, each, prompt, before in zip(names, images, prompts, turns, strict=True)
        ]
        if not samples:
            return Answers((), 0.0, 0.0, 0.0)
        start = time.perf_counter()
        asked = self.prepare(samples, decoding, sharing=plan.pruning is None, marked=plan.marked)
        seconds = [time.perf_counter() - start, 0.0, 0.0]
        found: dict[int, Answer] = {}
        for batch in asked.batches:
            answers, prefill_seconds, decode_seconds = self.answer_batch(asked, batch, plan, decoding)
            found |= answers
            seconds[1] += prefill_seconds
            seconds[2] += decode_seconds
        return Answers(tuple(found[number] for number in range(len(samples))), *seconds)

    def prepared_by(self, preparer: Preparer) -> "DeployedModel":
        """The same model with another preparer of its images and prompts."""
        return DeployedModel(self.programs, preparer, self.shapes, self.kind, self.generation)

    def prepare(
        self, samples: Sequence[Sample], decoding: Decoding, *, sharing: bool, marked: bool = False, resized: Resize = as_it_is
    ) -> AskedPrompts:
        """Prompts of samples in batches; see `prompt_batches`.

        Only for plans without pruning can they be `sharing` rows. Plans that are `marked` need marks; all others may have them.

        Raises:
            UserError: as `prompt_batches`, or the checkpoint's `max_length` leaves a prompt no room for an answer.
        """
        batches = partial(prompt_batches, sharing=sharing, marked=marked, resized=resized)
        with out_of_memory_says(f"the vision tower runs out of memory; use smaller images, {_LESS_MEMORY}"):
            asked = batches(samples, self.preparer, self.programs, self.shapes, decoding.max_new_tokens)
        for sample, size in zip(samples, asked.sizes, strict=True):
            if decoding.room(size.tokens) < 1:
                raise UserError(
                    f"{sample.id}: {size.tokens} tokens, but max_length {decoding.max_length} of the checkpoint's "
                    f"{GENERATION_FILE} bounds prompt and answer; give max_new_tokens"
                )
        return asked

    def answer_batch(
        self, asked: AskedPrompts, batch: Batch, plan: PlanFile, decoding: Decoding
    ) -> tuple[dict[int, Answer], float, float]:
        """The answers to a batch of `prepare`, by the number of the sample; seconds of prefill and of decoding."""
        chat, new_tokens = self.preparer.chat, decoding.max_new_tokens
        penalty = self.kind.penalty(decoding.repetition_penalty, chat.unembedded)
        if isinstance(plan.pruning, Selection):
            for number in batch.members.tolist():
                plan.pruning.check_sample(asked.samples[number].id, asked.sizes[number].visual)
        start = time.perf_counter()
        visual = self.programs.put(batch.visual)
        prefilled = self.programs.prefill(visual, batch.inputs, plan, new_tokens, penalty)
        between = time.perf_counter()
        what = f"decoding {len(batch.inputs.text_ids)} rows with {new_tokens} new tokens"
        with out_of_memory_says(f"{what} runs out of memory; use {_LESS_MEMORY}"):
            tokens, finite = map(np.asarray, self.programs.decode(prefilled, batch.inputs, new_tokens, penalty=penalty))
        end = time.perf_counter()
        good, numbers = finite & np.asarray(prefilled.finite), np.asarray(batch.inputs.samples)
        for number in numbers[(numbers != FILLER) & ~good].tolist():
            raise not_finite(self.programs, batch, number, asked.samples[number].id, plan.plan, plan.reduction)
        real = numbers != FILLER
        rows = zip(numbers[real].tolist(), tokens[real].tolist(), strict=True)
        answers = {number: self._answer(row[: decoding.room(asked.sizes[number].tokens)]) for number, row in rows}
        return answers, between - start, end - between

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
    ffn_path: FfnPath = "auto",
    plan: PlanFile | None = None,
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
        ffn_path: how layers with the Dynamic FFN compute visual tokens; see `config.ComputeConfig`.
        plan: the plan that the model will mostly run under: layers whose FFN it leaves whole are stored in the form that is
            fastest for that. All other plans run, too. None stores all layers for plans that reduce any.

    Raises:
        UserError: there is no such model, it is not usable or damaged, it has no such limit, or the devices have no such kernel.
    """
    for name, value in (("batch_size", batch_size), ("chunk", chunk), ("model_shards", model_shards)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    folder = find_model(model)
    kind = kind_in(folder)
    check_fits(kind.config.decoder.sizes, model_shards)
    mesh, generation = make_mesh(jax.local_devices(), model_shards), read_generation_config(folder)
    preparer = kind.preparer(folder, limits)
    dtype, layers = chosen_dtype(dtype, jax.default_backend()), kind.config.decoder.num_layers
    whole = [] if plan is None else [layer for layer in range(layers) if plan.plan.level("ffn", layer) in (FULL, SKIP)]
    if len(whole) == layers and ffn_path == "auto":
        ffn_path = "gathered"  # of rows
    _, module = load_model(folder, jnp.dtype(dtype), mesh=mesh, verify=verify, ffn_path=ffn_path)
    if 0 < len(whole) < layers and module.decoder.layers.ffn.form == "halves":
        module.decoder.keep_rows(whole, ways_on(mesh.devices.flat[0], "rows", dtype, "auto"))
    context = kind.config.decoder.context
    programs = DeployedPrograms(module, mesh, seed=seed, stop_tokens=preparer.chat.stop_tokens, chunk=chunk)
    shapes = Shapes(
        row_buckets(slot_sizes(_LEAST_TEXT, context), slot_sizes(_LEAST_VISUAL, context)),
        tuple(kind.image_sizes(slot_sizes(_LEAST_PATCHES, _MOST_PATCHES))),
        kind.image_arrays,
        batch_size,
    )
    if generation.not_applied:
        say(f"note: answers are greedy; of {folder / GENERATION_FILE} this is not applied: {', '.join(generation.not_applied)}")
    return DeployedModel(programs, preparer, shapes, kind, generation)


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
