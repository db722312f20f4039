"""Train the embedded model: `python -m rlens_jax.demo.train --output DIR` (our decision; one to two hours on two cores).

The loss is the cross-entropy of the answers plus auxiliary losses. Without these, only the language prior is learned in
reasonable time. An early layer must predict content and place of each cell, one attention head must attend to the cells on which
an answer depends, and a later layer must predict the contents of these cells and the value in the question. The auxiliary
classifiers are not part of the trained model. A killed run continues from its last checkpoint.
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
from rlens_jax.demo.demo_model import END_OF_TURN, TOKENS, embedded_config, write_processor
from rlens_jax.demo.training_batches import VALUES, TrainBatch, batches
from rlens_jax.families import qwen2_vl
from rlens_jax.families.config_reader import ConfigReader
from rlens_jax.families.qwen2_vl.model import read_config
from rlens_jax.layout import visible
from rlens_jax.models.decoder import Decoder
from rlens_jax.models.forward import VisionLanguageModel
from rlens_jax.models.prompt import IGNORE
from rlens_jax.ops.attention import MASKED, masked_attention
from rlens_jax.ops.ffn import dense_ffn
from rlens_jax.resources import embedded_model

CELL_LAYERS = 3
"""Number of decoder layers before the classifiers of the cells, so that these layers learn to read too."""
CELL_WEIGHT = 0.3
POINTING_LAYER, POINTING_WEIGHT = 6, 0.3
"""Layer whose first head is trained to attend evenly to all cells on which the next answer token depends."""
CELL_LABELS = {"digit": 10, "ink": 4, "row": 8, "column": 8}
CONTENT_LAYERS = 9
"""Number of decoder layers before the classifiers of the contents of these cells."""
SEED = 2501_19036
MICRO_BATCHES, MICRO_BATCH = 2, 8
STEPS, HOLD_UNTIL, WARMUP = 4640, 4320, 100
LEARNING_RATE = 1.2e-3
CLIP = 1.0
SAVE_EVERY, LOG_EVERY = 100, 10
END = TOKENS.index(END_OF_TURN)


class CellHeads(nnx.Module):
    """Auxiliary classifiers: of each cell, of the cells on which an answer depends, and of the value in the question."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.cell = nnx.List([nnx.Linear(width, kinds, rngs=rngs) for kinds in CELL_LABELS.values()])
        self.digit, self.ink = nnx.Linear(width, 10, rngs=rngs), nnx.Linear(width, 4, rngs=rngs)
        self.value = nnx.Linear(width, len(VALUES), rngs=rngs)


def cross_entropy(logits: Float[Array, "*n V"], labels: Array | np.ndarray) -> tuple[Array, Array, Array]:
    """Sum of losses, number of correct predictions and number of labels, over the labels that are not `IGNORE`."""
    counts = labels != IGNORE
    safe = jnp.where(counts, labels, 0)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, safe)
    right = counts & (logits.argmax(-1) == safe)
    return jnp.where(counts, loss, 0.0).sum(), right.sum(dtype=loss.dtype), counts.sum(dtype=loss.dtype)


def shares_entropy(logits: Float[Array, "*n V"], shares: Array | np.ndarray) -> tuple[Array, Array]:
    """Mean divergence of the softmax from `shares`, and mean share of its argmax, over rows with nonzero shares."""
    counts = shares.any(axis=-1)
    total = jnp.maximum(1.0, counts.sum(dtype=shares.dtype))
    divergence = jnp.where(shares > 0, shares * (jnp.log(jnp.maximum(shares, 1e-9)) - jax.nn.log_softmax(logits)), 0.0)
    best = jnp.take_along_axis(shares, logits.argmax(-1, keepdims=True), axis=-1)
    return jnp.where(counts, divergence.sum(-1), 0.0).sum() / total, best.sum() / total


def run_layers(decoder: Decoder, x: Array, batch: TrainBatch, layers: slice) -> Array:
    """Run some layers of the dense decoder; each question of a lesson attends to the page and to itself only."""
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
    """How well the first head of `POINTING_LAYER` attends to the relevant cells; `x` are the states before that layer.

    Returns the mean divergence of its attention to the page from an even attention to the relevant cells (the share alone
    would be satisfied by one of two cells), and the mean share of its attention to the page that is on these cells.
    """
    graph, stack = nnx.split(decoder.layers)
    layer = nnx.merge(graph, jax.tree.map(lambda p: p[POINTING_LAYER], stack))
    rotary = decoder.context(batch.layout, batch.rope, jax.random.key(0)).rotary
    q, k, _ = layer.attention.project(layer.input_norm(x), rotary)
    num_text, num_visual = batch.text_ids.shape[1], batch.layout.num_visual
    scores = jnp.einsum("BXH,BPH->BXP", q[:, 0, :num_text], k[:, 0, num_text:]) * decoder.config.head_dim**-0.5
    is_token = jnp.arange(scores.shape[2])[None, None] < num_visual[:, None, None]
    attention = jax.nn.log_softmax(jnp.where(is_token, scores, MASKED), axis=-1)
    cells = batch.relevant.sum(axis=-1, dtype=scores.dtype)
    each = jnp.maximum(1.0, cells)
    divergence = -jnp.where(batch.relevant, attention, 0.0).sum(axis=-1) / each - jnp.log(each)
    share = jnp.where(batch.relevant, jnp.exp(attention), 0.0).sum(axis=-1)
    count = jnp.maximum(1.0, (cells > 0).sum(dtype=scores.dtype))
    return divergence.sum() / count, share.sum() / count


def losses(model: VisionLanguageModel, heads: CellHeads, batch: TrainBatch) -> tuple[Array, dict[str, Array]]:
    """Loss of one micro-batch, and the values for the log."""
    decoder = model.decoder
    visual = model.vision(batch.patches, batch.places, batch.num_patches)
    middle = run_layers(decoder, decoder.embed(batch.text_ids, visual), batch, slice(0, CELL_LAYERS))
    before = run_layers(decoder, middle, batch, slice(CELL_LAYERS, POINTING_LAYER))
    pointing_loss, pointed = pointing(decoder, before, batch)
    after = run_layers(decoder, before, batch, slice(POINTING_LAYER, CONTENT_LAYERS))
    last = run_layers(decoder, after, batch, slice(CONTENT_LAYERS, None))
    num_text = batch.text_ids.shape[1]
    read = [cross_entropy(head(middle[:, num_text:]), batch.cells[:, :, axis]) for axis, head in enumerate(heads.cell)]
    due = after[:, :num_text]
    digit_loss, digit_share = shares_entropy(heads.digit(due), batch.contents[:, :, :10])
    ink_loss, ink_share = shares_entropy(heads.ink(due), batch.contents[:, :, 10:])
    value_loss, values_right, values = cross_entropy(heads.value(due), batch.values)
    logits = decoder.logits(last[:, :num_text])
    answer_loss, _, answers = cross_entropy(logits, batch.targets)
    _, words_right, words = cross_entropy(logits, jnp.where(batch.targets == END, IGNORE, batch.targets))
    log = {
        "loss": answer_loss / answers,
        "word_accuracy": words_right / words,
        "pointing": pointed,
        "found_digit": digit_share,
        "found_ink": ink_share,
        "value": values_right / values,
        **{f"{name}_accuracy": right / count for name, (_, right, count) in zip(CELL_LABELS, read, strict=True)},
    }
    cell_loss = sum(loss / count for loss, _, count in read) + digit_loss + ink_loss + value_loss / values
    return log["loss"] + CELL_WEIGHT * cell_loss + POINTING_WEIGHT * pointing_loss, log


def calm(model: VisionLanguageModel) -> None:
    """Rescale initial weights for depth, in place: embeddings to unit scale, outputs of the branches by (2 L)^-1/2."""
    decoder = model.decoder
    scale = (2 * decoder.config.num_layers) ** -0.5
    for kernel in (decoder.layers.attention.o_proj.kernel, decoder.layers.ffn.down_proj.kernel):
        kernel[...] = kernel[...] * scale
    decoder.embedding[...] = decoder.embedding[...] * 5


def learning_rate() -> optax.Schedule:
    """Learning rate schedule: warm-up, constant, linear decay over the last steps."""
    up = optax.linear_schedule(0.0, LEARNING_RATE, WARMUP)
    down = optax.linear_schedule(LEARNING_RATE, LEARNING_RATE / 40, STEPS - HOLD_UNTIL)
    return optax.join_schedules([up, optax.constant_schedule(LEARNING_RATE), down], [WARMUP, HOLD_UNTIL])


def make_step(graph: Any, optimizer: optax.GradientTransformation) -> Any:
    """The jitted training step; gradients are averaged over micro-batches, which CPUs run faster than one large batch."""

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
    """Yield the same items, computed in a thread while the device is busy."""
    waiting: queue.Queue[Any] = queue.Queue(depth)

    def fill() -> None:
        try:
            for item in items:
                waiting.put(item)
        except BaseException as error:
            waiting.put(error)  # raised in the consumer, which would otherwise wait forever

    threading.Thread(target=fill, daemon=True).start()
    while True:
        item = waiting.get()
        if isinstance(item, BaseException):
            raise item
        yield item


def forget_after(log_file: Path, step: int) -> None:
    """Remove an incomplete line, and the lines of steps that are trained again, from a log."""
    lines = log_file.read_text(encoding="utf-8").splitlines(keepends=True) if log_file.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    log_file.write_text("".join(kept), encoding="utf-8")


def train(folder: Path) -> None:
    """Train in `folder`, from its last checkpoint if there is one. Appends to `training_log.jsonl`."""
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
            pure, optimizer_state = manager.restore(start, args=ocp.args.StandardRestore((pure, optimizer_state)))
            nnx.replace_by_pure_dict(state, pure)
        log_file = folder / "training_log.jsonl"
        forget_after(log_file, start)
        source = ahead(batches(SEED, start, MICRO_BATCHES, MICRO_BATCH, {token: number for number, token in enumerate(TOKENS)}))
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
    publish(folder, nnx.merge(graph, state)[0])


def publish(folder: Path, model: VisionLanguageModel) -> None:
    """Write the trained model as a Hugging Face folder, `folder`/model: weights, tokenizer, image processor, log, model card.

    The card is that of the model that comes with the package.
    """
    target = folder / "model"
    save_hf(target, model, embedded_config())
    write_processor(target)
    shutil.copy(embedded_model() / "README.md", target)
    shutil.copy(folder / "training_log.jsonl", target)


def main(arguments: Sequence[str]) -> None:
    """Parse and train."""
    parser = ArgumentParser("python -m rlens_jax.demo.train", __doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of checkpoints and log; resumed if it has any")
    train(parser.parse_args(arguments).output)


if __name__ == "__main__":
    run_command(main)
