"""Load, read a plan, generate: from Python and from the command line, with all that can be wrong."""

import io
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import rlens_jax
from rlens_jax.checkpoints import leaves
from rlens_jax.checkpoints.model_folder import find_model
from rlens_jax.commands.generate import main
from rlens_jax.console import run_command
from rlens_jax.data.pages import make_page
from rlens_jax.drops import DART, PyramidDrop, SparseVLM
from rlens_jax.engine import deployed_model
from rlens_jax.engine.deployed_model import DeployedModel, automatic_chunk, make_sample
from rlens_jax.engine.model_programs import Program
from rlens_jax.engine.shapes import row_buckets, slot_sizes
from rlens_jax.errors import UserError
from rlens_jax.families.generation_config import Decoding, GenerationConfig
from rlens_jax.kept_tokens import DivPrune, Pooling, StridedTokens, VisionZip
from rlens_jax.plan_file import FORMAT, PlanFile
from rlens_jax.plans import SKIP, Plan
from rlens_jax.pruning import VTW, FastV
from tests.engine.toy import damaged

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]

QUESTIONS = ("digit at row 1 column 2 ?", "largest digit of row 2 ?", "ink at row 2 column 1 ?")
"""Answers of one word."""
TOKENS = 4


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(make_page(np.random.default_rng(seed), "test", augment=False).pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "page.png"
    path.write_bytes(png(0))
    return path


@pytest.fixture(scope="module")
def plan_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan that hurts: its answers differ from the dense ones."""
    fields = {
        "format": FORMAT,
        "num_layers": 12,
        "attention": list(range(12)),
        "ffn": list(range(12)),
        "attention_range": 1,
        "active_fraction": 0.01,
    }
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    path.write_text(json.dumps(fields))
    return path


@pytest.fixture(scope="module")
def model() -> DeployedModel:
    return rlens_jax.load("embedded", batch_size=4)


def test_batches_and_plans_share_the_decoding_program(model: DeployedModel, page: Path, plan_path: Path) -> None:
    plan = rlens_jax.read_plan(plan_path)
    images = [[page], [png(1)], [png(2)]]
    dense = model.generate(images=images, prompt=QUESTIONS, max_new_tokens=TOKENS)
    assert len(dense) == 3
    assert dense[0].strip().isdigit() and dense[1].strip().isdigit()
    assert model.programs.traces == {"encode": 1, "prefill": 1, "decode": 1}
    reduced = model.generate(images=images, prompt=QUESTIONS, plan=plan, max_new_tokens=TOKENS)
    assert reduced != dense
    # The plan has a prefill of its own, and decodes in the program that was there.
    assert model.programs.traces == {"encode": 1, "prefill": 2, "decode": 1}
    for given, asked, answer in zip(images, QUESTIONS, reduced, strict=True):
        assert model.generate(given, asked, plan, max_new_tokens=TOKENS) == answer
    assert model.programs.traces == {"encode": 2, "prefill": 3, "decode": 2}  # for batches of one, whatever is asked
    assert model.generate(images=[], prompt=[]) == []


def test_prompts_about_the_same_images_share_a_row(model: DeployedModel, page: Path, plan_path: Path, tmp_path: Path) -> None:
    """Contents count, not names; the answers are those of prompts alone, in the order of the prompts."""
    (tmp_path / "copy.png").write_bytes(page.read_bytes())
    (tmp_path / page.name).write_bytes(png(1))
    images = [page, tmp_path / page.name, tmp_path / "copy.png", page]
    asked = [QUESTIONS[0], QUESTIONS[0], QUESTIONS[2], QUESTIONS[1]]
    samples = [make_sample("a prompt", [image], text, False) for image, text in zip(images, asked, strict=True)]
    together, alone = (model.prepare(samples, Decoding(TOKENS), sharing=sharing) for sharing in (True, False))
    assert [size.sharers for size in together.sizes] == [3, 1, 3, 3]
    assert [size.sharers for size in alone.sizes] == [1, 1, 1, 1]
    for plan in (PlanFile(), rlens_jax.read_plan(plan_path)):
        answers = {}
        for batch in alone.batches:
            answers |= model.answer_batch(alone, batch, plan, Decoding(TOKENS))[0]
        shared = model.generate([[image] for image in images], asked, plan, max_new_tokens=TOKENS)
        assert shared == [answers[number].text for number in range(len(samples))]
        assert len(set(shared)) > 1


def test_two_devices_share_the_images(model: DeployedModel, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = model.programs.mesh.devices.flat[0].client.local_devices()[:2]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    asked = [[page], [png(1)], [page], [png(1)]], [*QUESTIONS[:2], *QUESTIONS[1:]]
    both = rlens_jax.load("embedded", batch_size=2)
    assert both.programs.groups == 2
    assert both.generate(*asked, max_new_tokens=TOKENS) == model.generate(*asked, max_new_tokens=TOKENS)
    assert both.programs.traces == {"encode": 1, "prefill": 1, "decode": 1}


def test_what_cannot_share_a_row(model: DeployedModel, page: Path) -> None:
    """Prompts with their image at the end, and branches that do not fit into a row together."""

    def sharers(model: DeployedModel, questions: Sequence[str], marks: bool) -> list[int]:
        samples = [make_sample("a prompt", [page], text, marks) for text in questions]
        return [size.sharers for size in model.prepare(samples, Decoding(TOKENS), sharing=True).sizes]

    assert sharers(model, [f"{question} <image>" for question in QUESTIONS], True) == [1, 1, 1]
    small = replace(model.shapes, rows=row_buckets((32,), (128,)))
    assert sharers(model, QUESTIONS, False) == [3, 3, 3]
    smaller = DeployedModel(model.programs, model.preparer, small, model.kind, model.generation)
    assert sharers(smaller, QUESTIONS, False) == [2, 2, 1]


def test_with_token_pruning(model: DeployedModel, page: Path, tmp_path: Path) -> None:
    path, answers = tmp_path / "plan.json", {}
    for share in (0, 0.96):
        pruning = {"method": "fastv", "layer": 2, "share": share}
        path.write_text(json.dumps({"format": FORMAT, "pruning": pruning}))
        plan = rlens_jax.read_plan(path)
        answers[share] = model.generate([page], QUESTIONS[0], plan, max_new_tokens=TOKENS)
    assert answers[0] == model.generate([page], QUESTIONS[0], max_new_tokens=TOKENS)
    assert answers[0.96] != answers[0]


def test_methods_before_the_first_layer(model: DeployedModel, page: Path) -> None:
    """One that keeps all tokens is the dense model, and decodes in its program."""
    dense = model.generate([page], QUESTIONS[0], max_new_tokens=TOKENS)
    before = Counter(model.programs.traces)
    assert model.generate([page], QUESTIONS[0], PlanFile(pruning=StridedTokens(1.0)), max_new_tokens=TOKENS) == dense
    for pruning in (DivPrune(20), VisionZip(20)):
        model.generate([page], QUESTIONS[0], PlanFile(pruning=pruning), max_new_tokens=TOKENS)
    new = model.programs.traces - before
    assert (new["encode"], new["prefill"]) == (1, 3)  # VisionZip's images have marks
    assert new["decode"] <= 1  # none if another test decoded from a cache of this length
    with pytest.raises(UserError, match="those of qwen2_vl do not; possible are random"):
        model.generate([page], QUESTIONS[0], PlanFile(pruning=Pooling(20)), max_new_tokens=TOKENS)


def test_one_program_decodes_after_all_methods_of_one_cache_length(model: DeployedModel, page: Path) -> None:
    """Where a layer begins and ends in the cache is data. The cache is smaller than the dense one all the same."""
    methods = [FastV(2, 0.6), DART(0.4), PyramidDrop((2, 5), (0.5, 0.3)), SparseVLM((0.6, 0.4, 0.3)), VTW(5), DivPrune(0.5)]
    prompts = model.prepare([make_sample("a prompt", [page], QUESTIONS[0], False)], Decoding(TOKENS), sharing=False)
    (batch,), slots, tokens = prompts.batches, {}, {}
    for pruning in (None, *methods):
        before = model.programs.traces["decode"]
        prefilled = model.programs.prefill(model.programs.put(batch.visual), batch.inputs, PlanFile(pruning=pruning), TOKENS)
        tokens[pruning], _ = model.programs.decode(prefilled, batch.inputs, TOKENS)
        slots[pruning] = prefilled.cache.k.shape[2], model.programs.traces["decode"] - before
    assert len({slots[pruning][0] for pruning in methods}) == 1
    assert [slots[pruning][1] for pruning in methods[1:]] == [0] * 5
    assert slots[methods[0]][0] < 0.8 * slots[None][0]
    assert len({str(np.asarray(row)) for row in tokens.values()}) > 1


def test_answers_have_numbers_of_tokens_and_times(model: DeployedModel, page: Path) -> None:
    asked = [[page], [png(1)], [png(2)]], QUESTIONS
    answers = model.answers(*asked, max_new_tokens=TOKENS)
    assert answers.texts == model.generate(*asked, max_new_tokens=TOKENS)
    assert answers.num_tokens == [answer.num_tokens for answer in answers.answers] and all(a.ended for a in answers.answers)
    assert min(answers.prepare_seconds, answers.prefill_seconds, answers.decode_seconds) > 0
    cut = model.answers(*asked, max_new_tokens=1)
    assert (cut.num_tokens, [answer.ended for answer in cut.answers]) == ([1, 1, 1], [False, False, False])


def test_a_conversation(model: DeployedModel, page: Path) -> None:
    """What was said before is in the prompt; each prompt of a batch has turns of its own."""
    turns = [("digit at row 1 column 1 ?", "7")]
    spoken = {"system": "row 1", "max_new_tokens": TOKENS}
    samples = [make_sample("s", [page], QUESTIONS[0], False, "row 1", given) for given in (turns, ())]
    longer, shorter = (size.text for size in model.prepare(samples, Decoding(TOKENS), sharing=False).sizes)
    assert longer > shorter + 5
    alone = [model.generate([page], QUESTIONS[0], turns=given, **spoken) for given in (turns, ())]
    assert model.generate([[page]] * 2, [QUESTIONS[0]] * 2, turns=[turns, ()], **spoken) == alone


def test_a_repetition_penalty(model: DeployedModel, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint's, unless one is given; the shards of a vocabulary agree on it. Half of it is on each device."""
    asked, spoken = ([[page], [png(1)]], QUESTIONS[:2]), {"system": "0 1 2 3 4 5 6 7 8 9", "max_new_tokens": TOKENS}
    penalised = model.generate(*asked, repetition_penalty=50, **spoken)
    plain = model.generate(*asked, **spoken)
    assert penalised != plain
    own = DeployedModel(model.programs, model.preparer, model.shapes, model.kind, GenerationConfig(50.0))
    assert own.generate(*asked, **spoken) == penalised
    assert own.generate(*asked, repetition_penalty=1, **spoken) == plain
    devices = model.programs.mesh.devices.flat[0].client.local_devices()[:2]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    halves = rlens_jax.load("embedded", batch_size=4, model_shards=2)
    assert halves.generate(*asked, repetition_penalty=50, **spoken) == penalised


def test_the_checkpoints_bound_of_prompt_and_answer(model: DeployedModel, page: Path) -> None:
    plain = model.answers([[page]], QUESTIONS[:1], max_new_tokens=TOKENS)
    (size,) = model.prepare([make_sample("s", [page], QUESTIONS[0], False)], Decoding(TOKENS), sharing=False).sizes
    bounded = replace(model.generation, max_length=size.tokens + 1)
    own = DeployedModel(model.programs, model.preparer, model.shapes, model.kind, bounded)
    (cut,) = own.answers([[page]], QUESTIONS[:1]).answers
    assert plain.answers[0].text.startswith(cut.text) and (cut.num_tokens, cut.ended) == (1, False)
    assert own.generate([page], QUESTIONS[0], max_new_tokens=TOKENS) == plain.texts[0]
    own = DeployedModel(model.programs, model.preparer, model.shapes, model.kind, replace(bounded, max_length=9))
    with pytest.raises(
        UserError, match=f"the prompt: {size.tokens} tokens, but max_length 9 of the checkpoint's generation_config"
    ):
        own.generate([page], QUESTIONS[0])


def test_what_a_checkpoint_asks_for_in_vain_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(find_model("embedded"), tmp_path / "model")
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"do_sample": True, "top_k": 20, "max_new_tokens": TOKENS}))
    rlens_jax.load(folder)
    assert capsys.readouterr().err == f"note: answers are greedy; of {path} this is not applied: sampling (top_k 20)\n"
    path.write_text(json.dumps({"repetition_penalty": "much"}))
    assert run([str(folder), "--prompt=x"]) == 2
    assert capsys.readouterr().err == f"error: {path}: repetition_penalty must be a positive number, not 'much'\n"


def test_in_chunks_the_answers_are_the_same(model: DeployedModel, page: Path, plan_path: Path) -> None:
    plan = rlens_jax.read_plan(plan_path)
    chunked = rlens_jax.load("embedded", chunk=24)
    for given in (None, plan):
        plain = model.generate([page], QUESTIONS[0], given, max_new_tokens=TOKENS)
        assert chunked.generate([page], QUESTIONS[0], given, max_new_tokens=TOKENS) == plain


def test_the_command_prints_what_the_model_says(
    model: DeployedModel, page: Path, plan_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--image={page}", f"--prompt={QUESTIONS[0]}", f"--plan={plan_path}", f"--max-new-tokens={TOKENS}"]
    options += ["--system=row 1", "--turn", QUESTIONS[1], "9", "--repetition-penalty=2"]
    assert run(["embedded", *options]) == 0
    plan, spoken = rlens_jax.read_plan(plan_path), {"system": "row 1", "turns": [(QUESTIONS[1], "9")]}
    expected = model.generate([page], QUESTIONS[0], plan, max_new_tokens=TOKENS, repetition_penalty=2.0, **spoken)
    assert capsys.readouterr().out == expected + "\n"


def run(arguments: Sequence[str]) -> int:
    with pytest.raises(SystemExit) as stopped:
        run_command(main, argv=arguments)
    return int(stopped.value.code or 0)


def test_weights_that_overflow(model: DeployedModel, page: Path) -> None:
    message = "the prompt: numbers are infinite or undefined under the plan dense, first in the FFN of layer 7; check"
    overflowing = damaged(model.programs, "decoder.layers.ffn.down_proj.kernel", 7, 3e38)
    with overflowing, pytest.raises(UserError, match=message):
        model.generate([page], QUESTIONS[0], max_new_tokens=TOKENS)


def test_bad_input(model: DeployedModel, page: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(page.read_bytes()[:60])
    for prompt in ("", " \n"):
        with pytest.raises(UserError, match="the prompt: is empty"):
            model.generate([page], prompt)
    with pytest.raises(UserError, match=r"prompt 2: image .*broken.png cannot be"):
        model.generate([[page], [broken]], [QUESTIONS[0]] * 2)
    with pytest.raises(UserError, match=r"image 1: no such file: .*none.png"):
        model.generate([tmp_path / "none.png"], QUESTIONS[0])
    with pytest.raises(UserError, match="2 prompts, but images for 1"):
        model.generate([[page]], [QUESTIONS[0]] * 2)
    with pytest.raises(UserError, match="1 prompts, but turns for 2"):
        model.generate([[page]], QUESTIONS[:1], turns=[(), ()])
    with pytest.raises(UserError, match="the prompt: turns must be pairs of a question and its answer"):
        model.generate([page], QUESTIONS[0], turns=["a b"])
    with pytest.raises(UserError, match="max_tiles: a model of the type qwen2_vl has no such setting"):
        rlens_jax.load("embedded", limits={"max_tiles": 4})
    with pytest.raises(UserError, match=r"unknown option max_tokens \(did you mean 'max_new_tokens'\?\)"):
        model.generate([page], QUESTIONS[0], max_tokens=4)
    with pytest.raises(UserError, match="must be a list of files"):
        model.generate(str(page), QUESTIONS[0])
    with pytest.raises(UserError, match=r"2 <image> mark\(s\) for 1 image"):
        model.generate([page], "<image> <image> ?", marks=True)
    with pytest.raises(UserError, match="max_new_tokens must be at least 1"):
        model.generate([page], QUESTIONS[0], max_new_tokens=0)
    with pytest.raises(UserError, match=r"too many tokens: .* with 5000 new ones is 2048 \(the prompt: 145\)"):
        model.generate([page], QUESTIONS[0], max_new_tokens=5000)
    with pytest.raises(UserError, match="batch_size must be at least 1"):
        rlens_jax.load("embedded", batch_size=0)
    with pytest.raises(UserError, match="the FFN path kernel needs a TPU"):
        rlens_jax.load("embedded", ffn_path="kernel")


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"num_layers": 28, "ffn": [27]}, "the plan is for a model with 28 layers, but this model has 12"),
        ({"ffn": [12]}, "reduces ffn in layer 12, but the model has 12 layers"),
    ],
)
def test_a_plan_for_another_model(model: DeployedModel, page: Path, tmp_path: Path, fields, complaint: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"format": FORMAT, **fields}))
    with pytest.raises(UserError, match=complaint):
        model.generate([page], QUESTIONS[0], rlens_jax.read_plan(path))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--promt=x"], "did you mean '--prompt'"),
        (["--prompt=x", "--plam=y"], "unknown option --plam=y (did you mean '--plan'?)"),
        (["--prompt=x", "--max-new-tokens=0"], "--max-new-tokens must be at least 1, not 0"),
        (["--prompt=x", "--repetition-penalty=nan"], "--repetition-penalty must be a positive number, not nan"),
        (["--prompt=x", "--first=ffn=3"], "--first needs a --plan"),
        (["--prompt=x", "--plan=none.json"], "cannot read none.json: No such file"),
        ([], "--prompt TEXT is missing"),
    ],
)
def test_bad_options(options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["embedded", *options]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("available", "advice"), [(10**12, "a batch size of 2 does"), (1, "nor does one; use more model shards")]
)
def test_running_out_of_memory_names_a_batch_that_fits(
    model: DeployedModel, available: int, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Program.__call__

    def call(program: Program, *arguments: Any) -> Any:
        if program.name == "prefill":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes.")
        return real(program, *arguments)

    monkeypatch.setattr(Program, "__call__", call)
    monkeypatch.setattr(deployed_model, "device_bytes", lambda mesh: available)
    images = [[png(seed)] for seed in range(4)]
    with pytest.raises(UserError, match=rf"^4 prompts of \d+ tokens do not fit into the .* GB of a device; {advice}"):
        model.generate(images=images, prompt=[QUESTIONS[0]] * 4, max_new_tokens=TOKENS)


@pytest.mark.parametrize(
    ("part", "complaint"),
    [
        ("encode", "the vision tower runs out of memory; use smaller images, a smaller batch size or more model shards"),
        ("decode", "decoding 1 rows with 8 new tokens runs out of memory; use a smaller batch size or more model shards"),
    ],
)
def test_running_out_of_memory_beside_the_prefill_is_one_line(
    model: DeployedModel, part: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Program.__call__

    def call(program: Program, *arguments: Any) -> Any:
        if program.name == part:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes.")
        return real(program, *arguments)

    monkeypatch.setattr(Program, "__call__", call)
    with pytest.raises(UserError, match=f"^{complaint}$"):
        model.generate(images=[png(0)], prompt=QUESTIONS[0], max_new_tokens=8)


def test_bucket_sizes() -> None:
    assert slot_sizes(32, 200) == (32, 48, 64, 96, 128, 192, 200)
    assert slot_sizes(64, 64) == (64,)


def test_chunks_are_for_long_prompts_only() -> None:
    assert automatic_chunk(rows=1, slots=1920, ffn_width=4864, itemsize=4) is None
    assert automatic_chunk(rows=1, slots=8192, ffn_width=18944, itemsize=2) == 1024
    assert automatic_chunk(rows=8, slots=8192, ffn_width=18944, itemsize=2) == 128
    # The hidden units of a chunk stay within the bound wherever the least number of tokens allows it.
    assert 1 * 4096 * 4864 * 4 > 64e6 > 1 * 2048 * 4864 * 4
    assert automatic_chunk(rows=1, slots=8192, ffn_width=4864, itemsize=4) == 2048


def test_layers_that_the_plan_leaves_whole_are_stored_as_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a kernel reads half rows. Of a plan that reduces no FFN, all layers."""
    monkeypatch.setattr(leaves, "suited_form", lambda *sizes: "rows" if sizes[-1] == "gathered" else "halves")
    stored = {}
    for plan in (Plan(attention=(3,)), Plan(ffn=(3, 5)), Plan.of({}, {3: SKIP, 5: 0.5})):
        decoder = rlens_jax.load("embedded", plan=PlanFile(plan)).programs.model().decoder
        stored[plan] = decoder.layers.ffn.form, [layer for layer in range(12) if layer not in decoder.whole]
    assert list(stored.values()) == [("rows", [*range(12)]), ("halves", [3, 5]), ("halves", [5])]
