"""Train the embedded model: `python -m rlens_jax.demo.train --output DIR` (our decision; one to two hours on two cores).

The loss is that of the answers, plus, while training, auxiliary ones without which nothing but the language prior is learned in
reasonable time: an early layer must tell what each cell holds and where it is, one attention head must look at the cells that an
answer depends on, and a later layer must know what they hold and which value the question names. The classifiers are dropped
afterwards. Kill the run at any moment: it goes on from its last checkpoint.
"""

import json
import queue
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from rlens_jax.checkpoints.published import save_hf
from rlens_jax.console import ArgumentParser, run_command
from rlens_jax.demo.batches import VALUES, TrainBatch, batches
from rlens_jax.demo.card import MODEL_CARD
from rlens_jax.demo.demo_model import embedded_config
from rlens_jax.demo.processor import END_OF_TURN, TOKENS, write_processor
from rlens_jax.families import qwen2_vl
from rlens_jax.families.hf_config import ConfigReader
from rlens_jax.families.qwen2_vl.model import read_config
from rlens_jax.layout import visible
from rlens_jax.models.decoder import Decoder
from rlens_jax.models.prompt import IGNORE
from rlens_jax.models.vision_language import VisionLanguageModel
from rlens_jax.ops.attention import MASKED, masked_attention
from rlens_jax.ops.ffn import dense_ffn

CELL_LAYERS = 3
"""The auxiliary loss looks at the states after this many decoder layers, so that they, too, learn to read."""
CELL_WEIGHT = 0.3
POINTING_LAYER, POINTING_WEIGHT = 6, 0.3
"""One head of this layer is told where to look for each word of an answer: evenly at all cells it depends on."""
CELL_LABELS = {"digit": 10, "ink": 4, "row": 8, "column": 8}
FOUND_LAYERS = 9
"""After so many layers, what the cell asked for holds must be known where the answer is given."""
SEED = 2501_19036
MICRO_BATCHES, MICRO_BATCH = 2, 8
STEPS, HOLD_UNTIL, WARMUP = 4640, 4320, 100
LEARNING_RATE = 1.2e-3
CLIP = 1.0
SAVE_EVERY, LOG_EVERY = 100, 10
END = TOKENS.index(END_OF_TURN)


class CellHeads(nnx.Module):
    """The auxiliary classifiers of the training, of a cell and of the cell asked for; not part of the model."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.cell = nnx.List([nnx.Linear(width, kinds, rngs=rngs) for kinds in CELL_LABELS.values()])
        self.found_digit, self.found_ink = nnx.Linear(width, 10, rngs=rngs), nnx.Linear(width, 4, rngs=rngs)
        self.value = nnx.Linear(width, len(VALUES), rngs=rngs)


def cross_entropy(logits: Float[Array, "*n V"], labels: Array | np.ndarray) -> tuple[Array, Array, Array]:
    """Sum of losses, of right answers, and count, over the labels that are not `IGNORE`."""
    counts = labels != IGNORE
    safe = jnp.where(counts, labels, 0)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, safe)
    right = counts & (logits.argmax(-1) == safe)
    return jnp.where(counts, loss, 0.0).sum(), right.sum(dtype=loss.dtype), counts.sum(dtype=loss.dtype)


def shares_entropy(logits: Float[Array, "*n V"], shares: Array | np.ndarray) -> tuple[Array, Array]:
    """Mean divergence of the softmax from given shares, and mean share of the likeliest, over rows that have any."""
    counts = shares.any(axis=-1)
    total = jnp.maximum(1.0, counts.sum(dtype=shares.dtype))
    surprise = jnp.where(shares > 0, shares * (jnp.log(jnp.maximum(shares, 1e-9)) - jax.nn.log_softmax(logits)), 0.0)
    best = jnp.take_along_axis(shares, logits.argmax(-1, keepdims=True), axis=-1)
    return jnp.where(counts, surprise.sum(-1), 0.0).sum() / total, best.sum() / total


def forward(decoder: Decoder, x: Array, batch: TrainBatch, layers: slice) -> Array:
    """Some layers of the dense decoder, with every question of a lesson seeing the page and itself only."""
    slots = batch.layout.slots
    question, key = batch.segments[:, :, None], batch.segments[:, None, :]
    mask = visible(slots, slots, None) & ((key == 0) | (key == question))
    rotary = decoder.context(batch.layout, batch.rope, jax.random.key(0)).rotary
    graph, stack = nnx.split(decoder.layers)

    def body(x: Array, layer: PyTree) -> tuple[Array, None]:
        module = nnx.merge(graph, layer)
        q, k, v = module.attention.project(module.input_norm(x), rotary)
        x = x + module.attention.o_proj(masked_attention(q, k, v, mask))
        return x + dense_ffn(module.ffn_norm(x), module.ffn.weights), None

    return jax.lax.scan(body, x, jax.tree.map(lambda p: p[layers], stack))[0]


def pointing(decoder: Decoder, x: Array, batch: TrainBatch) -> tuple[Array, Array]:
    """How well one head of a layer, given the states before it, looks at the cells an answer depends on.

    Returns the mean divergence of its attention to the page from an even look at each of these cells (one that looks at a
    single cell of two would do for the share alone), and the mean share of its attention that falls on them.
    """
    graph, stack = nnx.split(decoder.layers)
    layer = nnx.merge(graph, jax.tree.map(lambda p: p[POINTING_LAYER], stack))
    rotary = decoder.context(batch.layout, batch.rope, jax.random.key(0)).rotary
    q, k, _ = layer.attention.project(layer.input_norm(x), rotary)
    num_text, num_visual = batch.text_ids.shape[1], batch.layout.num_visual
    scores = jnp.einsum("BXH,BPH->BXP", q[:, 0, :num_text], k[:, 0, num_text:]) * decoder.config.head_dim**-0.5
    is_token = jnp.arange(scores.shape[2])[None, None] < num_visual[:, None, None]
    attention = jax.nn.log_softmax(jnp.where(is_token, scores, MASKED), axis=-1)
    cells = batch.looks.sum(axis=-1, dtype=scores.dtype)
    each = jnp.maximum(1.0, cells)
    divergence = -jnp.where(batch.looks, attention, 0.0).sum(axis=-1) / each - jnp.log(each)
    share = jnp.where(batch.looks, jnp.exp(attention), 0.0).sum(axis=-1)
    count = jnp.maximum(1.0, (cells > 0).sum(dtype=scores.dtype))
    return divergence.sum() / count, share.sum() / count


def losses(model: VisionLanguageModel, heads: CellHeads, batch: TrainBatch) -> tuple[Array, dict[str, Array]]:
    """Loss of one micro-batch, and what the log shows."""
    decoder = model.decoder
    visual = model.vision(batch.patches, batch.places, batch.num_patches)
    middle = forward(decoder, decoder.embed(batch.text_ids, visual), batch, slice(0, CELL_LAYERS))
    before = forward(decoder, middle, batch, slice(CELL_LAYERS, POINTING_LAYER))
    pointing_loss, pointed = pointing(decoder, before, batch)
    after = forward(decoder, before, batch, slice(POINTING_LAYER, FOUND_LAYERS))
    last = forward(decoder, after, batch, slice(FOUND_LAYERS, None))
    num_text = batch.text_ids.shape[1]
    read = [cross_entropy(head(middle[:, num_text:]), batch.cells[:, :, axis]) for axis, head in enumerate(heads.cell)]
    due = after[:, :num_text]
    found_digit, digits_found = shares_entropy(heads.found_digit(due), batch.found[:, :, :10])
    found_ink, inks_found = shares_entropy(heads.found_ink(due), batch.found[:, :, 10:])
    value_loss, values_right, values = cross_entropy(heads.value(due), batch.values)
    logits = decoder.logits(last[:, :num_text])
    answer_loss, _, answers = cross_entropy(logits, batch.targets)
    _, words_right, words = cross_entropy(logits, jnp.where(batch.targets == END, IGNORE, batch.targets))
    log = {
        "loss": answer_loss / answers,
        "word_accuracy": words_right / words,
        "pointing": pointed,
        "found_digit": digits_found,
        "found_ink": inks_found,
        "value": values_right / values,
        **{f"{name}_accuracy": right / count for name, (_, right, count) in zip(CELL_LABELS, read, strict=True)},
    }
    cell_loss = sum(loss / count for loss, _, count in read) + found_digit + found_ink + value_loss / values
    return log["loss"] + CELL_WEIGHT * cell_loss + POINTING_WEIGHT * pointing_loss, log


def calm(model: VisionLanguageModel) -> None:
    """Initialise for depth, in place: embeddings of unit scale beside branches whose outputs are scaled by (2 L)^-1/2."""
    decoder = model.decoder
    scale = (2 * decoder.config.num_layers) ** -0.5
    for kernel in (decoder.layers.attention.o_proj.kernel, decoder.layers.ffn.down_proj.kernel):
        kernel[...] = kernel[...] * scale
    decoder.embedding[...] = decoder.embedding[...] * 5


def learning_rate() -> optax.Schedule:
    """Warmed up, held, and lowered over the last part of the training."""
    up = optax.linear_schedule(0.0, LEARNING_RATE, WARMUP)
    down = optax.linear_schedule(LEARNING_RATE, LEARNING_RATE / 40, STEPS - HOLD_UNTIL)
    return optax.join_schedules([up, optax.constant_schedule(LEARNING_RATE), down], [WARMUP, HOLD_UNTIL])


def make_step(graph: Any, optimizer: optax.GradientTransformation) -> Any:
    """The jitted update: gradients are averaged over micro-batches, which CPUs run faster than one large batch."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(state: PyTree, optimizer_state: optax.OptState, batch: TrainBatch) -> tuple[Any, Any, dict[str, Array]]:
        def one(state: PyTree, micro: TrainBatch) -> tuple[Array, dict[str, Array]]:
            model, heads = nnx.merge(graph, state)
            return losses(model, heads, micro)

        def accumulate(total: Any, micro: TrainBatch) -> tuple[Any, dict[str, Array]]:
            gradient, log = jax.grad(one, has_aux=True)(state, micro)
            return jax.tree.map(jnp.add, total, gradient), log

        zero = jax.tree.map(jnp.zeros_like, state)
        total, logs = jax.lax.scan(accumulate, zero, batch)
        gradient = jax.tree.map(lambda g: g / MICRO_BATCHES, total)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, state)
        return optax.apply_updates(state, updates), optimizer_state, jax.tree.map(jnp.mean, logs)

    return step


def ahead(items: Iterator[Any], depth: int = 4) -> Iterator[Any]:
    """The same items, made in a thread while the device computes."""
    waiting: queue.Queue[Any] = queue.Queue(depth)

    def fill() -> None:
        try:
            for item in items:
                waiting.put(item)
        except BaseException as error:
            waiting.put(error)  # raised where the items are used; they would wait for a dead thread for ever

    threading.Thread(target=fill, daemon=True).start()
    while True:
        item = waiting.get()
        if isinstance(item, BaseException):
            raise item
        yield item


def forget_after(log_file: Path, step: int) -> None:
    """Drop the lines of steps that are trained again, and a torn one, from a log."""
    lines = log_file.read_text(encoding="utf-8").splitlines(keepends=True) if log_file.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    log_file.write_text("".join(kept), encoding="utf-8")


def train(folder: Path) -> None:
    """Train in `folder`, from its last checkpoint if it has one; appends to `training_log.jsonl`."""
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    config = read_config(ConfigReader(embedded_config(), "embedded_config()"))
    rngs = nnx.Rngs(SEED)
    modules = (qwen2_vl.FAMILY.model(config, dtype=jnp.float32, rngs=rngs), CellHeads(config.decoder.width, rngs=rngs))
    calm(modules[0])
    graph, state = nnx.split(modules)
    optimizer = optax.chain(
        optax.clip_by_global_norm(CLIP),
        optax.adamw(learning_rate(), b2=0.98, weight_decay=0.02, mask=lambda p: jax.tree.map(lambda x: x.ndim > 2, p)),
    )
    optimizer_state = optimizer.init(state)
    step = make_step(graph, optimizer)
    with ocp.CheckpointManager(folder / "state", options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
        start = manager.latest_step() or 0
        pure = nnx.to_pure_dict(state)
        if start:
            saved = manager.restore(start, args=ocp.args.StandardRestore((pure, optimizer_state)))
            pure, optimizer_state = saved
            nnx.replace_by_pure_dict(state, pure)
        log_file = folder / "training_log.jsonl"
        forget_after(log_file, start)
        source = ahead(
            batches(
                SEED,
                start,
                MICRO_BATCHES,
                MICRO_BATCH,
                {token: number for number, token in enumerate(TOKENS)},
            )
        )
        began = time.monotonic()
        for number in range(start + 1, STEPS + 1):
            state, optimizer_state, log = step(state, optimizer_state, next(source))
            if number % LOG_EVERY == 0:
                rate = (number - start) / (time.monotonic() - began)
                record = {"step": number, **{k: round(float(v), 4) for k, v in log.items()}}
                with open(log_file, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                left = (STEPS - number) / rate / 60
                print(f"{json.dumps(record)}  {rate:.2f} steps/s, {left:.0f} min left", flush=True)
            if number % SAVE_EVERY == 0 or number == STEPS:
                manager.save(number, args=ocp.args.StandardSave((nnx.to_pure_dict(state), optimizer_state)))
    model, _ = nnx.merge(graph, state)
    publish(folder, model)


def publish(folder: Path, model: VisionLanguageModel) -> None:
    """Write the trained model as a Hugging Face folder, `folder`/model: weights, tokenizer, image processor, card, log."""
    target = folder / "model"
    save_hf(target, model, embedded_config())
    write_processor(target)
    (target / "README.md").write_text(MODEL_CARD, encoding="utf-8")
    shutil.copy(folder / "training_log.jsonl", target)


def main(arguments: Sequence[str]) -> None:
    """Parse and train."""
    parser = ArgumentParser("python -m rlens_jax.demo.train", __doc__)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of checkpoints and log; resumed if it has any"
    )
    train(parser.parse_args(arguments).output)


if __name__ == "__main__":
    run_command(main)
