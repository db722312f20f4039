"""Properties of the decoder that need no reference model; parity with Hugging Face is in test_qwen2_vl.py."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec

from rlens_jax.checkpoints import leaves
from rlens_jax.checkpoints.leaves import place
from rlens_jax.engine.model_programs import ROWS, ModelPrograms
from rlens_jax.layout import visible
from rlens_jax.models.decoder import Context, Decoder, TracedPlan, as_data
from rlens_jax.models.forward import VisionLanguageModel
from rlens_jax.ops.ffn_paths import GATHERED
from rlens_jax.plans import FULL, SKIP, STANDARD, Plan, Reduction
from rlens_jax.sharding.mesh import make_mesh
from rlens_jax.sharding.model_axis import MODEL, WORK
from tests.numerics import assert_close, error
from tests.sequences import make_layout, pack, random_rows, run_length, unpack
from tests.toy_decoder import TOY as CONFIG
from tests.toy_decoder import random_decoder

pytestmark = pytest.mark.slow

REDUCTION = Reduction(attention_range=3, active_fraction=0.3)
RAGGED = [run_length(3, 31, 5), run_length(2, 7, 4, 11, 6), run_length(7), run_length(1, 1, 1)]
PLANS = [Plan(attention=(1, 3, 4)), Plan(ffn=(0, 2)), Plan(attention=(0, 3), ffn=(3, 4)), Plan(attention=range(5), ffn=range(5))]
KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return random_decoder(CONFIG, 0.2)


def make_context(decoder: Decoder, layout) -> Context:
    """Rotary positions are the sequence positions."""
    return decoder.context(layout, layout.slots.position[:, None], KEY)


@partial(jax.jit, static_argnames=("graph", "plan", "reduction", "layers"))
def run_prefill(graph, state, x, layout, plan, reduction, layers):
    decoder = nnx.merge(graph, state)
    return decoder.prefill(x, make_context(decoder, layout), plan, reduction, layers)


@partial(jax.jit, static_argnames=("graph", "reduction", "layers"))
def run_recorded(graph, state, x, layout, plan, reduction, layers):
    decoder = nnx.merge(graph, state)
    return decoder.prefill(x, make_context(decoder, layout), plan, reduction, layers)


@partial(jax.jit, static_argnames=("graph", "reduction"))
def run_layers(graph, state, x, layout, plan, reduction, start, stop):
    decoder = nnx.merge(graph, state)
    return decoder.run_layers(x, make_context(decoder, layout), plan, reduction, start, stop)


def prefill(decoder, rows, layout, plan, reduction=REDUCTION, padding=np.zeros, layers=None):
    run = run_prefill if isinstance(plan, Plan) else run_recorded
    return run(*nnx.split(decoder), jnp.asarray(pack(rows, layout, padding)), layout, plan, reduction, layers)


def traced_prefill(decoder, rows, layout, plan, reduction=REDUCTION):
    x, whole = jnp.asarray(pack(rows, layout)), (jnp.int32(0), jnp.int32(CONFIG.num_layers))
    return run_layers(*nnx.split(decoder), x, layout, as_data(plan, CONFIG.num_layers), reduction, *whole)


def assert_rows_close(packed, expected, layout, tolerance=1e-5):
    for ours, theirs in zip(unpack(packed, layout), unpack(expected, layout), strict=True):
        assert_close(ours, theirs, tolerance)


@pytest.fixture(scope="module")
def rows() -> list[np.ndarray]:
    return random_rows(np.random.default_rng(2), RAGGED, CONFIG.width)


@pytest.mark.parametrize("plan", PLANS, ids=Plan.label)
def test_static_and_traced_plans_agree(decoder, rows, plan):
    layout = make_layout(RAGGED, spare=(2, 3))
    static, record = prefill(decoder, rows, layout, plan)
    traced, scored = traced_prefill(decoder, rows, layout, plan)
    assert_rows_close(traced, static, layout)
    assert scored.all()
    assert record.kept.scored.all()
    recorded, same_record = prefill(decoder, rows, layout, as_data(plan, CONFIG.num_layers))
    assert_rows_close(recorded, static, layout)
    with_images = np.asarray(layout.num_visual) > 0
    np.testing.assert_array_equal(same_record.kept.units[:, with_images], record.kept.units[:, with_images])
    dense, _ = prefill(decoder, rows, layout, Plan())
    for i, count in enumerate(layout.num_visual):
        difference = error(unpack(static, layout)[i], unpack(dense, layout)[i])
        if count > REDUCTION.attention_range:
            assert difference > 1e-3
        if count == 0:
            assert difference < 1e-5


def test_an_empty_plan_is_the_dense_model_bit_for_bit(decoder, rows):
    """However the reductions are set; the traced program is another one, equal to rounding."""
    layout = make_layout(RAGGED, spare=(2, 3))
    extreme = Reduction(attention_range=1, active_fraction=0.02)
    static, traced = (
        [unpack(run(decoder, rows, layout, Plan(), reduction)[0], layout) for reduction in (REDUCTION, extreme)]
        for run in (prefill, traced_prefill)
    )
    for ours, other, dense in zip(*static, traced[0], strict=True):
        np.testing.assert_array_equal(other, ours)
        assert_close(dense, ours, 1e-5)
    for ours, other in zip(*traced, strict=True):
        np.testing.assert_array_equal(other, ours)


def test_reductions_that_drop_nothing_are_the_dense_model(decoder, rows):
    layout = make_layout(RAGGED)
    everything = Reduction(attention_range=layout.bucket.visual, active_fraction=1)
    reduced, _ = prefill(decoder, rows, layout, PLANS[-1], everything)
    dense, _ = prefill(decoder, rows, layout, Plan())
    assert_rows_close(reduced, dense, layout)


def test_one_program_serves_every_traced_plan_and_every_start(decoder, rows):
    layout = make_layout(RAGGED)
    x = jnp.asarray(pack(rows, layout))
    run_layers.clear_cache()
    for plan in [Plan(), *PLANS]:

        def run(x, start, stop, plan=plan):
            bounds = jnp.int32(start), jnp.int32(stop)
            return run_layers(*nnx.split(decoder), x, layout, as_data(plan, CONFIG.num_layers), REDUCTION, *bounds)[0]

        np.testing.assert_array_equal(run(run(x, 0, 2), 2, 5), run(x, 0, 5))
    assert run_layers._cache_size() == 1


def test_a_static_prefill_can_stop_and_go_on(decoder, rows):
    layout, plan = make_layout(RAGGED), PLANS[2]
    whole, record = prefill(decoder, rows, layout, plan)
    first, lower = prefill(decoder, rows, layout, plan, layers=range(2))
    second, upper = prefill(decoder, unpack(first, layout), layout, plan, layers=range(2, 5))
    assert_rows_close(second, whole, layout)
    joined = jnp.concatenate([lower.kept.units, upper.kept.units])
    np.testing.assert_array_equal(joined, record.kept.units)


@pytest.mark.parametrize("plan", [Plan(), PLANS[2], as_data(PLANS[2], CONFIG.num_layers)], ids=["dense", "static", "traced"])
def test_a_prefill_of_no_layers_changes_nothing(decoder, rows, plan):
    layout = make_layout(RAGGED)
    states, record = prefill(decoder, rows, layout, plan, layers=range(2, 2))
    np.testing.assert_array_equal(states, pack(rows, layout))
    kept = REDUCTION.kept_units(CONFIG.ffn_width)
    assert record.k.shape == (0, len(RAGGED), CONFIG.num_kv_heads, layout.bucket.slots, CONFIG.head_dim)
    assert record.kept.units.shape == (0, len(RAGGED), kept)


def test_only_reduced_layers_report_kept_units(decoder, rows):
    _, record = prefill(decoder, rows, make_layout(RAGGED), PLANS[2])
    kept = np.asarray(record.kept.units)
    assert kept.shape == (5, len(RAGGED), REDUCTION.kept_units(CONFIG.ffn_width))
    assert [bool(units[0].any()) for units in kept] == [False, False, False, True, True]


@pytest.mark.parametrize("plan", [Plan(), PLANS[-1]], ids=Plan.label)
def test_padding_never_leaks(decoder, rows, plan):
    layout, rng = make_layout(RAGGED, spare=(2, 13)), np.random.default_rng(3)
    clean, _ = prefill(decoder, rows, layout, plan)
    garbage, record = prefill(decoder, rows, layout, plan, padding=lambda shape: 1e3 * rng.standard_normal(shape))
    assert record.kept.scored.all()
    for ours, expected in zip(unpack(garbage, layout), unpack(clean, layout), strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("plan", [Plan(), PLANS[-1]], ids=Plan.label)
def test_a_sample_does_not_depend_on_its_batch(decoder, rows, plan):
    layout = make_layout(RAGGED, spare=(1, 4))
    together = unpack(prefill(decoder, rows, layout, plan)[0], layout)
    for i in (1, 3):
        own = make_layout([RAGGED[i]])
        assert_close(together[i], unpack(prefill(decoder, [rows[i]], own, plan)[0], own)[0], 1e-5)


def test_random_probes_follow_the_key(decoder, rows):
    layout, plan = make_layout(RAGGED), Plan(ffn=range(5))
    reduction = Reduction(probe="random", active_fraction=0.3)
    x = jnp.asarray(pack(rows, layout))
    traced = as_data(plan, CONFIG.num_layers)

    @jax.jit
    def states(key):
        context = decoder.context(layout, layout.slots.position[:, None], key)
        static, _ = decoder.prefill(x, context, plan, reduction)
        return static, decoder.run_layers(x, context, traced, reduction, jnp.int32(0), jnp.int32(5))[0]

    static, from_data = states(jax.random.key(0))
    assert_rows_close(from_data, static, layout)
    other, _ = states(jax.random.key(1))
    assert error(unpack(other, layout)[0], unpack(static, layout)[0]) > 1e-3
    np.testing.assert_array_equal(unpack(other, layout)[2], unpack(static, layout)[2])


def test_random_probes_differ_between_layers(decoder, rows):
    """The same parameters under two layer numbers."""
    layout = make_layout(RAGGED)
    x, reduction = jnp.asarray(pack(rows, layout)), Reduction(probe="random", active_fraction=0.3)
    graph, stack = nnx.split(decoder.layers)
    module = nnx.merge(graph, jax.tree.map(lambda parameter: parameter[0], stack))

    @jax.jit
    def kept(layer):
        return module(x, make_context(decoder, layout), reduction, FULL, STANDARD, layer)[1].kept.units

    first, same, other = (set(kept(jnp.int32(layer))[0].tolist()) for layer in (0, 0, 1))
    assert first == same != other


def test_influence_within_a_hollow_layer_is_exactly_what_the_mask_says(decoder):
    mask = run_length(2, 7, 2, 6, 3)
    layout = make_layout([mask])
    x = jnp.asarray(pack(random_rows(np.random.default_rng(4), [mask], CONFIG.width), layout))
    weights = jnp.asarray(np.random.default_rng(5).standard_normal(CONFIG.width), jnp.float32)

    def output(x):
        y, _ = decoder.prefill(x, make_context(decoder, layout), Plan(attention=(0,)), REDUCTION, range(1))
        return jnp.einsum("BTD,D->BT", y, weights)[0]

    influence = np.abs(jax.jit(jax.jacrev(output))(x)[:, 0]).max(axis=2)
    np.testing.assert_array_equal(influence != 0, visible(layout.slots, layout.slots, REDUCTION.attention_range)[0])


LEVELS = Plan.of({0: SKIP, 1: 0, 2: 2, 3: SKIP}, {0: SKIP, 2: 0.5, 4: SKIP})


@pytest.mark.parametrize("plan", [Plan(), PLANS[2], LEVELS], ids=Plan.label)
def test_decoding_equals_the_prefill_of_the_whole(decoder, plan):
    """Each sample's last tokens, which are text, one by one through the cache; neither is ever reduced."""
    masks, steps = [run_length(3, 31, 9), run_length(2, 7, 4, 11, 8), run_length(12)], 7
    rng = np.random.default_rng(6)
    ids = [rng.integers(0, CONFIG.vocabulary, len(mask)).astype(np.int32) for mask in masks]
    visual = [rng.standard_normal((len(mask), CONFIG.width)).astype(np.float32) for mask in masks]

    @jax.jit
    def start(text_ids, visual, layout):
        x, record = decoder.prefill(decoder.embed(text_ids, visual), make_context(decoder, layout), plan, REDUCTION)
        return decoder.logits(x), decoder.make_cache(record, layout, steps)

    def prefill_all(cut):
        layout = make_layout([mask[: len(mask) - cut] for mask in masks], spare=(2, 3))
        text_ids = pack([row[: len(row) - cut] for row in ids], layout)[:, : layout.bucket.text]
        vectors = pack([row[: len(row) - cut] for row in visual], layout)[:, layout.bucket.text :]
        logits, cache = start(jnp.asarray(text_ids), jnp.asarray(vectors), layout)
        return layout, unpack(logits, layout), cache

    _, expected, _ = prefill_all(0)
    layout, logits, cache = prefill_all(steps)
    for ours, theirs in zip(logits, expected, strict=True):
        assert_close(ours, theirs[: len(ours)], 1e-4)
    decode = jax.jit(decoder.decode)
    for step in range(steps):
        position = (layout.num_text + layout.num_visual + step)[:, None]
        newest = jnp.asarray([[row[len(row) - steps + step]] for row in ids])
        logits, cache = decode(newest, cache, position, position[:, None], jnp.int32(steps - step))
        for ours, theirs in zip(logits, expected, strict=True):
            assert_close(ours[0], theirs[len(theirs) - steps + step], 1e-4)
    assert decode._cache_size() == 1


def blind(decoder: Decoder) -> VisionLanguageModel:
    """A model that is shown no image, with the decoder's stack at the path that loaders know."""
    return VisionLanguageModel(np.zeros, decoder)


def test_units_stored_as_half_rows_are_fetched_by_the_kernel(rows, monkeypatch):
    """In bfloat16, as on a TPU, and run here by Pallas' interpreter of TPU memory."""
    plain = Decoder(replace(CONFIG, ffn_width=64), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    for linear in (plain.layers.ffn.gate_proj, plain.layers.ffn.up_proj, plain.layers.ffn.down_proj):
        linear.kernel.set_value(linear.kernel[...] * 4)  # the FFN matters
    monkeypatch.setattr(leaves, "suited_form", lambda *_: "halves")
    halved = place(blind(plain), make_mesh(jax.devices()[:1], 1), "kernel").decoder
    layout = make_layout(RAGGED, spare=(2, 3))
    x = jnp.asarray(pack(rows, layout), jnp.bfloat16)

    def last_states(decoder: Decoder, plan: TracedPlan) -> jax.Array:
        with pltpu.force_tpu_interpret_mode():
            return run_layers(*nnx.split(decoder), x, layout, plan, REDUCTION, jnp.int32(0), jnp.int32(5))[0]

    for plan in (Plan(), Plan(ffn=(3,))):
        expected = np.asarray(last_states(plain, as_data(plan, CONFIG.num_layers)), np.float32)
        assert_rows_close(np.asarray(last_states(halved, as_data(plan, CONFIG.num_layers)), np.float32), expected, layout, 2e-2)
    dense = np.asarray(last_states(plain, as_data(Plan(), CONFIG.num_layers)), np.float32)
    assert max(map(error, unpack(expected, layout), unpack(dense, layout))) > 0.1
    program = jax.make_jaxpr(lambda plan: last_states(halved, plan))(as_data(Plan(), CONFIG.num_layers))
    assert "fetched_ffn" in str(program)


def test_layers_that_a_plan_leaves_whole_keep_their_rows(rows, monkeypatch):
    """Beside half rows: a prefill and a decoding step equal those of rows alone, under a plan that reduces such a layer, too.

    On one device, and on four that hold half of the units each. The interpreter of the kernel would not end there, since
    simulated devices wait for each other.
    """
    plain, layout = random_decoder(replace(CONFIG, ffn_width=64), 0.2), make_layout(RAGGED, spare=(2, 3))

    def run(model, x, layout, ids):
        x, record = model.decoder.prefill(x, make_context(model.decoder, layout), Plan(ffn=(0, 1)), REDUCTION)
        position = (layout.num_text + layout.num_visual)[:, None]
        cache = model.decoder.make_cache(record, layout, 1)
        return x, model.decoder.decode(ids, cache, position, position[:, None], jnp.int32(1))[0]

    arguments = jnp.asarray(pack(rows, layout)), layout, jnp.ones((len(RAGGED), 1), jnp.int32)
    expected, logits = jax.jit(run)(blind(plain), *arguments)
    monkeypatch.setattr(leaves, "suited_form", lambda *_: "halves")
    for devices, shards, path in ((4, 2, "masked"), (1, 1, "kernel")):
        mesh = make_mesh(jax.devices()[:devices], shards)
        mixed = place(blind(plain), mesh, path).decoder
        mixed.keep_rows((0, 2, 3), GATHERED)
        assert [kernel.shape for kernel in mixed.layers.ffn.kernels] == [(2, 64, 2, CONFIG.width // 2)] * 3
        assert [kernel.shape for kernel in mixed.whole_ffn.kernels] == [(3, 64, CONFIG.width)] * 3
        for kernel in (*mixed.layers.ffn.kernels, *mixed.whole_ffn.kernels):
            assert kernel.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(None, MODEL)), kernel.ndim)
        program = ModelPrograms(blind(mixed), mesh).program("run", run, (ROWS,) * 3, (ROWS, PartitionSpec(WORK, None, MODEL)))
        with pltpu.force_tpu_interpret_mode():
            found, same_logits = program(*arguments)
        assert_rows_close(found, expected, layout, 1e-4)
        assert_close(same_logits[..., : CONFIG.vocabulary], np.asarray(logits), 1e-4)
    with pytest.raises(ValueError, match="stored alike"):
        traced_prefill(mixed, rows, layout, Plan())

    def parts(layer: int) -> bool:
        """Whether a dense layer is computed in parts that are cut out of the stack of half rows."""
        x = jnp.asarray(pack(rows, layout))
        run = jax.make_jaxpr(
            lambda x: mixed.prefill(x, make_context(mixed, layout), Plan(), REDUCTION, range(layer, layer + 1))[0]
        )
        return "layout_constraint" in str(run(x))

    assert [parts(layer) for layer in (2, 4)] == [False, True]
