"""What layers do for visual tokens, level by level, against float64 arithmetic row by row."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlens_jax.flops import LayerSizes, layer_cost
from rlens_jax.models.decoder import Decoder, as_data
from rlens_jax.plans import FULL, SKIP, STANDARD, TEXT, Level, Levels, Plan, Reduction
from tests.numerics import assert_close, error
from tests.sequences import make_layout, pack, random_rows, run_length, unpack
from tests.toy_decoder import TOY as CONFIG
from tests.toy_decoder import random_decoder

pytestmark = pytest.mark.slow

REDUCTION = Reduction(attention_range=5, active_fraction=0.3)
RAGGED = [run_length(3, 31, 5), run_length(0, 7, 4, 11, 1, 3, 6), run_length(7), run_length(1, 1, 1)]
"""One image; three images with text between, the first before all text; no image; one visual token."""
LEVELS = Levels((FULL, STANDARD, 2, 1, TEXT, SKIP), (FULL, 0.5, STANDARD, SKIP))
SETTINGS = [
    *((attention, FULL) for attention in LEVELS.attention),
    *((FULL, ffn) for ffn in LEVELS.ffn[1:]),
    (SKIP, SKIP),
    (SKIP, 0.5),
    (TEXT, SKIP),
    (1, STANDARD),
]
MIXED = Plan.of({0: SKIP, 1: TEXT, 2: 2, 4: SKIP}, {0: SKIP, 1: 0.5, 3: SKIP, 4: STANDARD})
"""Each layer another setting."""


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return random_decoder(CONFIG, 0.2)


@pytest.fixture(scope="module")
def rows() -> list[np.ndarray]:
    return random_rows(np.random.default_rng(2), RAGGED, CONFIG.width)


def context(decoder: Decoder, layout, **options):
    return decoder.context(layout, layout.slots.position[:, None], jax.random.key(7), **options)


@partial(jax.jit, static_argnames=("graph", "levels"))
def traced_layers(graph, state, x, layout, plan, start, stop, levels):
    return nnx.merge(graph, state).run_layers(x, context(nnx.merge(graph, state), layout), plan, REDUCTION, start, stop)[0]


def run_traced(decoder, rows, layout, plan, start=0, stop=CONFIG.num_layers) -> list[np.ndarray]:
    """States of each sample after layers `start` .. `stop` - 1, by the one program that has all levels."""
    x, data = jnp.asarray(pack(rows, layout)), as_data(plan, CONFIG.num_layers, LEVELS)
    return unpack(traced_layers(*nnx.split(decoder), x, layout, data, jnp.int32(start), jnp.int32(stop), LEVELS), layout)


def run_static(decoder, rows, layout, plan, **options):
    """States of each sample after all layers, and their record."""

    @jax.jit
    def prefill(x, layout):
        return decoder.prefill(x, context(decoder, layout, **options), plan, REDUCTION)

    x, record = prefill(jnp.asarray(pack(rows, layout)), layout)
    return unpack(x, layout), record


def float64_layer(decoder: Decoder, layer: int, is_visual: np.ndarray, x: np.ndarray, attention: Level, ffn: Level) -> np.ndarray:
    """One layer for one sample, [T_i, D], in the order of the sequence."""
    module = decoder.layer(layer)
    w = jax.tree.map(lambda p: np.asarray(p, np.float64), nnx.to_pure_dict(nnx.state(module)))
    heads, kv_heads, size = CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.head_dim

    def norm(row, scale):
        return row / np.sqrt(np.mean(row**2) + CONFIG.norm_eps) * scale

    def project(row, place, part, rotated=True):
        y = np.einsum("d,dnh->nh", row, w["attention"][part]["kernel"]) + w["attention"][part]["bias"]
        half = size // 2
        angle = place / CONFIG.rope_theta ** (np.arange(half) / half)
        turned = np.concatenate(
            [
                y[:, :half] * np.cos(angle) - y[:, half:] * np.sin(angle),
                y[:, half:] * np.cos(angle) + y[:, :half] * np.sin(angle),
            ],
            axis=1,
        )
        return turned if rotated else y

    normed = [norm(row, w["input_norm"]["scale"]) for row in x]
    keys = [project(row, place, "k_proj") for place, row in enumerate(normed)]
    values = [project(row, place, "v_proj", rotated=False) for place, row in enumerate(normed)]
    ordinal = np.cumsum(is_visual) - 1
    reach = REDUCTION.attention_range if attention == STANDARD else attention
    y = x.astype(np.float64)
    for i, visual in enumerate(is_visual):
        if visual and reach == SKIP:
            continue
        near = [j for j in range(i + 1) if not (visual and is_visual[j]) or reach == FULL or ordinal[i] - ordinal[j] < reach]
        query, update = project(normed[i], i, "q_proj"), np.zeros((heads, size))
        for head in range(heads):
            kv = head * kv_heads // heads
            weights = np.exp([query[head] @ keys[j][kv] / np.sqrt(size) for j in near])
            for weight, j in zip(weights, near, strict=True):
                update[head] += weight / weights.sum() * values[j][kv]
        y[i] += np.einsum("nh,nhd->d", update, w["attention"]["o_proj"]["kernel"])
    return float64_ffn(w, is_visual, y, [norm(row, w["ffn_norm"]["scale"]) for row in y], ffn)


def float64_ffn(w, is_visual: np.ndarray, y: np.ndarray, normed: list[np.ndarray], level: Level) -> np.ndarray:
    gate, up, down = (w["ffn"][name]["kernel"] for name in ("gate_proj", "up_proj", "down_proj"))
    hidden = np.array([(gate @ row) / (1 + np.exp(-(gate @ row))) * (up @ row) for row in normed])
    visual = np.flatnonzero(is_visual)
    if len(visual) and level not in (FULL, SKIP):
        fraction = REDUCTION.active_fraction if level == STANDARD else level
        number, probes = int(CONFIG.ffn_width * fraction + 0.5), max(1, len(visual) // 10)
        scores = np.mean([np.abs(hidden[visual[i * len(visual) // probes]]) for i in range(probes)], axis=0)
        order = np.argsort(-scores, kind="stable")
        assert 1 - scores[order[number]] / scores[order[number - 1]] > 1e-4  # no tie that float32 could decide otherwise
        hidden[np.ix_(visual, order[number:])] = 0
    if level == SKIP:
        hidden[visual] = 0
    return y + hidden @ down


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_each_setting_equals_float64_arithmetic_row_by_row(decoder, rows, setting):
    layout = make_layout(RAGGED, spare=(2, 3))
    plan = Plan.of({1: setting[0]}, {1: setting[1]})
    after = run_traced(decoder, rows, layout, plan, 1, 2)
    for ours, is_visual, row in zip(after, RAGGED, rows, strict=True):
        assert_close(ours, float64_layer(decoder, 1, is_visual, row, *setting), 1e-5)
        if setting == (SKIP, SKIP):
            np.testing.assert_array_equal(ours[is_visual], row[is_visual])
    dense = run_traced(decoder, rows, layout, Plan(), 1, 2)
    for ours, plain, is_visual in zip(after, dense, RAGGED, strict=True):
        assert_close(ours[~is_visual], plain[~is_visual], 1e-5)  # the layer's own text rows do not change
    assert setting == (FULL, FULL) or error(after[0], dense[0]) > 1e-3


@pytest.mark.parametrize("chunk", [None, 16])
def test_static_plans_compute_the_same(decoder, rows, chunk):
    layout = make_layout(RAGGED, spare=(2, 3))
    expected = run_traced(decoder, rows, layout, MIXED)
    static, record = run_static(decoder, rows, layout, MIXED, chunk=chunk)
    for ours, theirs in zip(static, expected, strict=True):
        assert_close(ours, theirs, 1e-5)
    # Layer 1 keeps more units than layer 4; both have all of theirs.
    units = np.asarray(record.kept.units)[:, 0]
    assert units.shape == (5, 27)
    assert [len(set(units[layer, :count].tolist())) for layer, count in ((1, 27), (4, 16))] == [27, 16]
    assert not units[[0, 2, 3]].any()
    assert not units[4, 16:].any()


def test_layers_that_are_all_frozen_make_keys_and_values_of_the_embeddings(decoder, rows):
    layout = make_layout(RAGGED, spare=(2, 3))
    layers = dict.fromkeys(range(CONFIG.num_layers), SKIP)
    states, record = run_static(decoder, rows, layout, Plan.of(layers, layers))
    x, rotary = jnp.asarray(pack(rows, layout)), context(decoder, layout).rotary
    visual = slice(layout.bucket.text, None)
    for layer in range(CONFIG.num_layers):
        module = decoder.layer(layer)
        for ours, expected in zip((record.k, record.v), module.attention.keys_values(module.input_norm(x), rotary), strict=True):
            assert_close(ours[layer][:, :, visual], expected[:, :, visual], 1e-5)
    for ours, is_visual, row in zip(states, RAGGED, rows, strict=True):
        np.testing.assert_array_equal(ours[is_visual], row[is_visual])
        assert not len(row) or error(ours[~is_visual], row[~is_visual]) > 1e-3


@pytest.mark.parametrize("attention", [STANDARD, 1, TEXT, SKIP])
def test_a_setting_of_the_last_layer_changes_no_logit_of_text(decoder, rows, attention):
    layout, last = make_layout(RAGGED, spare=(2, 3)), CONFIG.num_layers - 1
    dense = run_traced(decoder, rows, layout, Plan())
    changed = run_traced(decoder, rows, layout, Plan.of({last: attention}, {last: SKIP}))
    for ours, theirs, is_visual in zip(changed, dense, RAGGED, strict=True):
        assert_close(ours[~is_visual], theirs[~is_visual], 1e-5)
    assert error(changed[0], dense[0]) > 1e-3


def lowered(decoder: Decoder, layout, attention: Level, ffn: Level, reduction: Reduction = REDUCTION):
    """The program of one static layer."""
    graph, state = nnx.split(decoder.layer(0))
    x = jnp.zeros((len(layout.num_text), layout.bucket.slots, decoder.config.width))

    def layer(state, x, layout):
        return nnx.merge(graph, state)(x, context(decoder, layout), reduction, attention, ffn, jnp.int32(0))[0]

    return jax.jit(layer).lower(state, x, layout)


def test_levels_that_leave_nothing_out_have_the_dense_program(decoder):
    layout = make_layout(RAGGED, spare=(2, 3))
    dense = lowered(decoder, layout, FULL, FULL).as_text()
    num_visual = layout.bucket.visual
    assert lowered(decoder, layout, num_visual, 0.995).as_text() == dense  # U is rounded to F
    everything = Reduction(attention_range=num_visual + 1, active_fraction=1)
    assert lowered(decoder, layout, STANDARD, STANDARD, everything).as_text() == dense
    assert lowered(decoder, layout, num_visual - 1, FULL).as_text() != dense
    assert lowered(decoder, layout, FULL, 0.98).as_text() != dense
    # One visual token is all that a range of 1 can see; attention to text leaves it out.
    one = make_layout([run_length(2, 1, 3)])
    assert lowered(decoder, one, 1, FULL).as_text() == lowered(decoder, one, FULL, FULL).as_text()
    assert lowered(decoder, one, TEXT, FULL).as_text() != lowered(decoder, one, FULL, FULL).as_text()


def test_skipped_rows_are_not_computed():
    """The compiled program's own count of FLOPs falls by what a level leaves out."""
    sizes = LayerSizes(width=64, query_width=128, kv_width=32, ffn_width=256)
    config = replace(CONFIG, width=64, num_heads=8, head_dim=16, rope_sections=(8,), ffn_width=256)
    decoder, layout = random_decoder(config, 0.2), make_layout([run_length(5, 128, 11)])

    def flops(attention: Level, ffn: Level) -> float:
        return lowered(decoder, layout, attention, ffn).compile().cost_analysis()["flops"]

    def products(attention: Level, ffn: Level) -> int:
        """Multiply-adds of Q, O and the FFN, without those of pairs: dense attention computes about half of these."""
        cost = layer_cost(sizes, 16, 128, REDUCTION, attention=attention, ffn=ffn, with_probes=True)
        pairs = 16 if attention == SKIP else 144
        return cost - 2 * 144 * pairs * sizes.query_width

    dense = flops(FULL, FULL)
    for setting in ((SKIP, FULL), (FULL, SKIP), (SKIP, SKIP), (FULL, 0.5), (SKIP, STANDARD)):
        left_out = 2 * (products(FULL, FULL) - products(*setting))
        assert dense - flops(*setting) >= 0.95 * left_out, setting


def test_a_run_compiles_its_own_levels_only(decoder, rows):
    layout = make_layout(RAGGED)
    x = jnp.asarray(pack(rows, layout))

    def num_branches(levels: Levels) -> list[int]:
        plan = as_data(Plan(), CONFIG.num_layers, levels)
        arguments = (*nnx.split(decoder), x, layout, plan, jnp.int32(0), jnp.int32(5), levels)
        text = traced_layers.trace(*arguments).jaxpr
        return sorted(branch_counts(text.jaxpr))

    assert num_branches(Levels()) == [2, 2]
    assert num_branches(Levels((FULL,), (FULL, SKIP))) == [2]
    assert num_branches(LEVELS) == [2, 2, 3, 5]  # whether skipped, and what else


def branch_counts(jaxpr) -> list[int]:
    counts = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "cond":
            counts.append(len(equation.params["branches"]))
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                counts += branch_counts(inner)
    return counts
