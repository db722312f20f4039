"""The kinds of malformed inputs: how one is made from a base input, how the program reads it, and what it may accept.

A kind is a function of a `Case`. It damages a copy of a base input in `case.folder`, reads it with `case.read`, and raises
`WrongTreatmentError` if what was accepted changes a result silently.
"""

import importlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlens_jax.checkpoints.checkpoint import load_model, read_model_kind
from rlens_jax.checkpoints.conversion import to_orbax, to_safetensors
from rlens_jax.checkpoints.leaves import arrays_of
from rlens_jax.commands.options import CONFIG, read_config
from rlens_jax.console import check_arguments
from rlens_jax.data.benchmarks.catalogue import BENCHMARKS
from rlens_jax.data.benchmarks.catalogue import instance as read_instance
from rlens_jax.data.benchmarks.tsv import scan
from rlens_jax.data.images import load_image, load_images
from rlens_jax.data.jsonl import read_jsonl
from rlens_jax.data.samples import Sample
from rlens_jax.parity.bundle import CASE_FIELDS, open_case, read_manifest
from rlens_jax.parity.constants import compare_constants
from rlens_jax.parity.reference_case import ReferenceCase
from rlens_jax.plan_file import read_plan
from rlens_jax.reporting.report_page import report_html
from rlens_jax.reporting.run_files import read_run
from rlens_jax.search.journal import Journal
from tests.fuzz.base_inputs import FINGERPRINT, JOURNAL, TSV, BaseInputs
from tests.fuzz.guards import WrongTreatmentError, outcome
from tests.fuzz.mutations import Damage, damage_file, damaged_bytes, damaged_json

TEXT_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json", "generation_config.json"),
    *("added_tokens.json", "special_tokens_map.json"),
)
COMMANDS = ("rank", "generate", "evaluate", "convert", "validate", "cost", "bench", "report", "studies")
ARGUMENTS = (
    *("--model", "--data", "--output", "--plan", "--config", "--json", "--dtype", "--seed", "--first", "--rankings", "-x", "--"),
    *("", "nowhere", "../x", "\udcff", "a\0b", "9" * 5000, "x" * 5000, "nan", "-1", "1e400", "embedded", "a,b", "\x1b[31m"),
)
PIXEL_FILES = ("preprocessor_config.json", "processor_config.json")
TEMPLATES = (
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{{ 'x' * 10**10 }}",
    "{{ 'x' * 10**8 }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% include '/etc/passwd' %}",
    "{{ raise_exception('no') }}",
    "{% for",
    "{{ messages[0]['nope']['x'] }}",
    "{{ 1 // 0 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ '%9999999999d' % 1 }}",
    "{% set x = namespace(y='x') %}{% for i in range(40) %}{% set x.y = x.y + x.y %}{% endfor %}{{ x.y }}",
    "",
    "constant",
)
"""Templates that never end, take all memory, or reach for what a template has no business with."""
TEXT_PIECES = (
    *(
        "what ",
        "is ",
        "<image>",
        "<|im_end|>",
        "<|im_start|>",
        "<|endoftext|>",
        "<|vision_start|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ),
    *("<img>", "</img>", "<IMG_CONTEXT>", "<unk>", "<image_id>", "<slice>", "</slice>", "<video>", "{{ 7 * 7 }}", "{% raw %}"),
    *("\x00", "\x1b[31m", "\ud83d", "e\u0301", "\u202e", "\U0001f600", "\n", " ", "\t", "x" * 3000, "'", '"', "\\"),
)


@dataclass
class Case:
    """One malformed input."""

    rng: Random
    base: BaseInputs
    folder: Path
    """An empty folder for the input and what is written."""
    outside: Path
    """A folder that must not be touched."""
    accepted: dict[str, Any]
    """What the undamaged base inputs are read as, by name; shared by all cases."""
    damage: Damage = field(default_factory=lambda: Damage("none"))
    refusal: str | None = None

    def copy(self, source: Path) -> Path:
        """A copy of a base input."""
        target = self.folder / source.name
        if source.is_dir():
            return Path(shutil.copytree(source, target))
        return Path(shutil.copy(source, target))

    def baseline(self, name: str, run: Callable[[], Any]) -> Any:
        """What an undamaged input is read as."""
        if name not in self.accepted:
            self.accepted[name] = run()
        return self.accepted[name]

    def read(self, run: Callable[[], Any]) -> Any:
        """The result of reading the input, None if it was refused in one line."""
        self.refusal, result = outcome(run)
        return result


def config_json(case: Case) -> None:
    """A wrong value may be accepted only if it changes nothing."""
    name = case.rng.choice(sorted(case.base.preparable))
    source = case.base.preparable[name]
    expected = case.baseline(f"config {name}", lambda: read_model_kind(source).config)
    folder = case.copy(source)
    case.damage = damage_file(case.rng, folder / "config.json", case.outside)

    def read() -> Any:
        kind = read_model_kind(folder)
        if kind.config != expected:
            kind.abstract(jnp.float32)  # sizes that no module takes
        return kind.config

    config = case.read(read)
    if config is not None and case.damage.is_wrong_value and config != expected:
        raise WrongTreatmentError(f"accepted as another model: {_changes(config, expected)}")


def image_processor(case: Case) -> None:
    """A wrong value may be accepted only if the pixels stay the same; a finite number is one that the file asks for."""
    folders = sorted(case.base.preparable.items())
    name, file = case.rng.choice([(name, file) for name, f in folders for file in PIXEL_FILES if (f / file).exists()])
    pixels = _prepare_damaged(case, name, file)
    expected = _prepared(case, name)
    is_number = isinstance(case.damage.value, int | float) and math.isfinite(case.damage.value)
    if pixels is not None and case.damage.is_wrong_value and not is_number:
        same = len(pixels[0]) == len(expected[0]) and all(map(np.array_equal, pixels[0], expected[0]))
        if not same:
            raise WrongTreatmentError("accepted with other pixels")


def text_files(case: Case) -> None:
    """Tokenizer, template and end tokens: token ids stay within the vocabulary."""
    name = case.rng.choice(sorted(case.base.preparable))
    folder = case.base.preparable[name]
    file = case.rng.choice([file for file in TEXT_FILES if (folder / file).exists()])
    prepared = _prepare_damaged(case, name, file)
    vocabulary = read_model_kind(folder).config.decoder.vocabulary
    if prepared is not None and not all(0 <= token < vocabulary for ids in prepared[1] for token in ids):
        raise WrongTreatmentError("a token beyond the vocabulary")


def _prepare_damaged(case: Case, name: str, file: str) -> Any:
    folder = case.copy(case.base.preparable[name])
    if "template" in (folder / file).read_text() and case.rng.random() < 0.4:
        case.damage = _hostile_template(case.rng, folder / file)
    else:
        case.damage = damage_file(case.rng, folder / file, case.outside)
    return case.read(lambda: _prepare(folder, case.base.data))


def warm_up(case: Case) -> None:
    """Read the undamaged inputs first: libraries make folders of their own when they are imported."""
    for name in case.base.preparable:
        _prepared(case, name)


def _hostile_template(rng: Random, path: Path) -> Damage:
    template = rng.choice(TEMPLATES)
    if path.suffix == ".json":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    else:
        path.write_text(template)
    return Damage(f"{path.name}: {template}")


def user_text(case: Case) -> None:
    """A user's text is text: no token of it is special."""
    name = case.rng.choice(sorted(case.base.preparable))
    text = "".join(case.rng.choice(TEXT_PIECES) for _ in range(case.rng.randrange(1, 6)))
    case.damage = Damage(f"{name}: {text[:60]!r}")
    source = case.base.preparable[name]
    preparer = case.baseline(f"preparer {name}", lambda: read_model_kind(source).preparer(source))
    plain, odd = (Sample("s", "d", (case.base.data / "0.png",), question, ("a",)) for question in ("what", text))
    images = [image.tokens for image in preparer.images(load_images(plain, preparer.transparency), "s")]
    vocabulary = json.loads((source / "tokenizer.json").read_text())
    # A tokenizer of words reads unknown letters as <unk>.
    special = {token["id"] for token in vocabulary["added_tokens"] if token["content"].strip() not in ("", "<unk>")}

    def count(sample: Sample) -> int:
        return sum(token in special for token in preparer.prompt(sample, images, None).token_ids.tolist())

    expected, found = count(plain), case.read(lambda: count(odd))
    if found is not None and found > expected:
        raise WrongTreatmentError(f"{found - expected} tokens of the text are special")


def _prepared(case: Case, name: str) -> Any:
    folder = case.base.preparable[name]
    return case.baseline(f"prepared {name}", lambda: _prepare(folder, case.base.data))


def _prepare(folder: Path, data: Path) -> tuple[list[np.ndarray], list[list[int]]]:
    """Arrays and token ids of a sample, with and without an answer."""
    kind = read_model_kind(folder)
    preparer = kind.preparer(folder)
    sample = Sample("s", "d", (data / "0.png",), "What is this?", ("a",))
    images = preparer.images(load_images(sample, preparer.transparency), sample.id)
    tokens = [image.tokens for image in images]
    prompts = [preparer.prompt(sample, tokens, answer) for answer in (None, "a")]
    stop = list(preparer.chat.stop_tokens)
    text = preparer.chat.decode(prompts[1].token_ids[-prompts[1].answer_length :].tolist())
    assert isinstance(text, str)
    return [array for image in images for array in image.arrays], [*(p.token_ids.tolist() for p in prompts), stop]


def weights(case: Case) -> None:
    """Headers of safetensors files, the index, and the small files beside them; accepted weights are the same weights."""
    expected = case.baseline("weights", lambda: arrays_of(load_model(case.base.model, jnp.float32)[1]))
    folder = case.copy(case.base.model)
    file = case.rng.choice(
        ("model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    )
    if file.endswith(".json") or case.rng.random() < 0.1:
        case.damage = damage_file(case.rng, folder / file, case.outside)
        if file.endswith(".safetensors") and "flip" in case.damage.text:
            return  # of the data, perhaps: published files have no checksums
    else:
        case.damage = _damage_header(case.rng, folder / file)
    model = case.read(lambda: load_model(folder, jnp.float32)[1])
    if model is not None:
        found = arrays_of(model)
        if any(not np.array_equal(found[name], array) for name, array in expected.items()):
            raise WrongTreatmentError("accepted with other weights")


def _damage_header(rng: Random, path: Path) -> Damage:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    if rng.random() < 0.8:
        header, damage = damaged_json(rng, json.loads(header))
    else:
        header, damage = damaged_bytes(rng, header)
    size = len(header) if rng.random() < 0.9 else rng.choice((0, 2**63, len(header) + 1, 10**12))
    path.write_bytes(size.to_bytes(8, "little") + header + data)
    return Damage(f"{path.name}, header: {damage.text}, length {size}", damage.path, damage.value)


def orbax_folder(case: Case) -> None:
    """Any damage to a converted folder: converting it back gives the source's bytes or nothing, and writes nothing elsewhere."""
    folder = case.copy(case.base.converted)
    # Orbax draws the names of its data files; their sizes hardly change.
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: (path.suffix, path.stat().st_size))
    record = [path for path in files if path.name == "conversion.json"]
    path = case.rng.choice([*files, *record * len(files)])
    if path.suffix == ".json" or case.rng.random() < 0.2:
        case.damage = damage_file(case.rng, path, case.outside)
    else:
        content, case.damage = damaged_bytes(case.rng, path.read_bytes())
        path.write_bytes(content)
    case.damage = Damage(f"{path.relative_to(folder)}: {case.damage.text}", case.damage.path, case.damage.value)
    back = case.folder / "back"
    done = case.read(lambda: to_safetensors(folder, back, lambda num_bytes: None))
    if done is None and back.exists():
        raise WrongTreatmentError("a half-written folder")
    if done is not None:
        for file in case.base.model.glob("*.safetensors"):
            if not (back / file.name).exists() or (back / file.name).read_bytes() != file.read_bytes():
                raise WrongTreatmentError(f"accepted, and {file.name} is another one")


def conversion_source(case: Case) -> None:
    """A source of a conversion: converted whole or not at all."""
    folder = case.copy(case.base.model)
    file = case.rng.choice(sorted(path.name for path in folder.iterdir()))
    if file.endswith(".safetensors"):
        case.damage = _damage_header(case.rng, folder / file)
    else:
        case.damage = damage_file(case.rng, folder / file, case.outside)
    target = case.folder / "target"
    done = case.read(lambda: to_orbax(folder, target, None, lambda num_bytes: None, name="x"))
    if (done is None) == target.exists():
        raise WrongTreatmentError("a half-written folder")


def image_file(case: Case) -> None:
    """An image is refused, or is some RGB image."""
    source = case.rng.choice(sorted(path for path in case.base.data.iterdir() if path.suffix not in (".jsonl", ".tsv")))
    path = case.copy(source)
    case.damage = damage_file(case.rng, path, case.outside)
    inside = case.rng.random() < 0.5
    image = case.read(
        lambda: load_image(path if inside or not path.is_file() else path.read_bytes(), "image", "white", upright=True)
    )
    if image is not None and (image.mode != "RGB" or image.width < 1 or image.height < 1):
        raise WrongTreatmentError(f"read as {image.mode} {image.size}")


def _damage_line(case: Case, path: Path) -> int:
    """Damage the JSON value of one line, most often, or the file. Returns the number of the line, from 0."""
    lines = path.read_bytes().splitlines(keepends=True)
    number = case.rng.randrange(len(lines))
    if case.rng.random() < 0.8:
        content, damage = damaged_json(case.rng, json.loads(lines[number]))
        lines[number] = content + b"\n"
        path.write_bytes(b"".join(lines))
        case.damage = Damage(f"line {number + 1}: {damage.text}", damage.path, damage.value)
    else:
        case.damage = damage_file(case.rng, path, case.outside)
    return number


def jsonl(case: Case) -> None:
    """A row is read as it is written, or the file is refused."""
    folder = case.copy(case.base.data)
    path = folder / "rows.jsonl"
    number = _damage_line(case, path)
    samples = case.read(lambda: [(sample, load_images(sample, "white")) for sample in read_jsonl(path)])
    if samples is None or case.damage.path is None:
        return
    if case.damage.path[0] == "question" and samples[number][0].question != case.damage.value:
        raise WrongTreatmentError(f"the question is read as {samples[number][0].question!r}")
    if case.damage.value in ([], {}, "", [[]]) and case.damage.path[0] in ("question", "answer", "image", "dataset", "answers"):
        raise WrongTreatmentError("accepted an empty field")


def tsv(case: Case) -> None:
    """A benchmark's file: each row and its images are read, or the file is refused."""
    path = case.copy(case.base.data / f"{TSV}.tsv")
    content, case.damage = damaged_bytes(case.rng, path.read_bytes())
    if case.rng.random() < 0.4:
        rows = path.read_text().split("\n")
        number = case.rng.randrange(len(rows))
        cells = rows[number].split("\t")
        place = case.rng.randrange(len(cells))
        cells[place] = case.rng.choice(
            ("", "x" * 200_000, '"', "nan", "0", "-1", "9" * 5000, "AAAA" * 40, "a\rb", "\x1b[31m", "../x")
        )
        rows[number] = "\t".join(cells)
        content, case.damage = "\n".join(rows).encode(), Damage(f"cell {place} of row {number}")
    path.write_bytes(content)
    benchmark = BENCHMARKS[TSV]

    def read() -> int:
        table = scan(path, benchmark.needed, benchmark.optional)
        items = [read_instance(benchmark, table, row) for row in table.rows]
        return sum(bool(item.images) for item in items)

    case.read(read)


def yaml_config(case: Case) -> None:
    """A configuration has each value as written, or is refused."""
    expected = case.baseline("config", lambda: read_config([(CONFIG, str(case.base.config))]))
    path = case.copy(case.base.config)
    lines = path.read_text().splitlines()
    number = case.rng.randrange(len(lines))
    name = lines[number].partition(":")[0]
    values = (
        "[" * 10_000,
        "&a [1]\nx: *a",
        "9" * 5000,
        "1e400",
        ".nan",
        ".inf",
        "-1",
        "{a: 1}",
        "!!python/object:os.system x",
        "2026-99-99",
    )
    values += (
        "",
        "'x'",
        "[1, 2]",
        "~",
        "yes",
        "0x10",
        "\t",
        "'\\ud83d'",
        "1_0",
        "1:30",
        '"\\0"',
        "1e-99999999",
        "-.inf",
        "- 1",
        "99999999999",
    )
    kind = case.rng.choice(("value", "value", "value", "twice", "bytes", "file"))
    if kind == "file":
        case.damage = damage_file(case.rng, path, case.outside)
    elif kind == "bytes":
        content, case.damage = damaged_bytes(case.rng, path.read_bytes())
        path.write_bytes(content)
    else:
        value = case.rng.choice(values)
        lines[number : number + (kind == "value")] = [f"{name}: {value}"]
        case.damage = Damage(f"{name.strip()}: {value[:40]!r} ({kind})")
        path.write_text("\n".join(lines) + "\n")
    config = case.read(lambda: read_config([(CONFIG, str(path))]))
    if config is not None and kind == "twice" and config != expected:
        raise WrongTreatmentError(f"a field that is given twice: {_changes(config, expected)}")


def plan(case: Case) -> None:
    """A plan has each value as written, or is refused."""
    path = case.copy(case.base.plan)
    case.damage = damage_file(case.rng, path, case.outside)
    read = case.read(lambda: read_plan(path))
    if read is None or case.damage.path is None:
        return
    read.label()
    found = {"num_layers": read.num_layers, "format": "rlens-plan/1", **read.fields()}
    written = json.loads(path.read_bytes())
    for name, value in written.items():
        same = found[name] == value or str(found[name]) == value or (isinstance(value, list) and sorted(value) == found[name])
        if not same and not (isinstance(value, dict) and found[name] is not None):
            raise WrongTreatmentError(f"{name} is read as {found[name]!r}")


def bundle(case: Case) -> None:
    """A bundle: what is read is of the shapes and types that the comparison needs."""
    folder = case.copy(case.base.bundle)
    kind = case.baseline("kind", lambda: read_model_kind(case.base.model))
    tensors = folder / "case_00.safetensors"
    if case.rng.random() < 0.3:
        case.damage = _damage_header(case.rng, tensors)
    else:
        case.damage = damage_file(
            case.rng, case.rng.choice((folder / "manifest.json", folder / "manifest.json", tensors)), case.outside
        )

    def read() -> Any:
        manifest = read_manifest(folder)
        compare_constants(kind.config, manifest.constants, "manifest")
        for item in manifest.cases:
            with open_case(folder, item, kind.family.reference.names) as file:
                reference = ReferenceCase(item, file, kind, case.base.model)
                reference.states(0, "ffn")
        return manifest

    manifest, path = case.read(read), case.damage.path
    if manifest is None or path is None or not case.damage.text.startswith("manifest"):
        return
    is_layers = "plan" in path and case.damage.value in ([], [1, 2])
    in_case = path[2] if path[0] == "cases" and len(path) > 2 else None
    if in_case in CASE_FIELDS and in_case != "attention_range" and case.damage.is_wrong_value and not is_layers:
        raise WrongTreatmentError(f"accepted a wrong value of {in_case}")


def journal(case: Case) -> None:
    """A journal keeps the records that it had, or is refused; only an unfinished last line is cut off."""
    expected = case.baseline("journal", lambda: _records(Path(shutil.copytree(case.base.journal, case.folder / "good"))))
    folder = case.copy(case.base.journal)
    path = folder / "journal.jsonl"
    _damage_line(case, path)
    before = path.read_bytes() if path.is_file() else None
    records = case.read(lambda: _records(folder))
    if records is None and before is not None and path.read_bytes() != before:
        raise WrongTreatmentError("a refused journal was changed")
    if records is not None and case.damage.is_wrong_value and case.damage.path != ("seconds",) and records != expected:
        kept = records == expected[: len(records)]
        if not kept and case.damage.path not in (("split",), ("attention",), ("ffn",)):  # any text is a name, any layers a plan
            raise WrongTreatmentError("accepted other records")


def _records(folder: Path) -> Any:
    with Journal.open(folder, FINGERPRINT) as opened:
        found = (opened.outcomes(split, plan, 5) for split, plan in JOURNAL)
        return tuple(str(outcomes) for outcomes in found if not np.isnan(outcomes).all())


def finished_run(case: Case) -> None:
    """ranking.json and timing.json: a whole report, or none."""
    folder = case.copy(case.base.run)
    file = case.rng.choice(("ranking.json", "ranking.json", "timing.json"))
    case.damage = damage_file(case.rng, folder / file, case.outside)
    page = case.read(lambda: report_html([read_run(folder)]))
    if page is not None and not page.rstrip().endswith("</html>"):
        raise WrongTreatmentError("a page without an end")


def command_line(case: Case) -> None:
    """Arguments: exit code 2 and one line, before anything is made."""
    command = case.rng.choice(COMMANDS)
    arguments = [case.rng.choice(ARGUMENTS) for _ in range(case.rng.randrange(1, 6))]
    wrong = case.rng.choice(("--no-such-option", "--seed=", "--modle=x"))
    arguments.insert(case.rng.randrange(len(arguments) + 1), wrong)
    case.damage = Damage(f"{command} {[argument[:30] for argument in arguments]}")
    module = importlib.import_module(f"rlens_jax.commands.{command}")

    def read() -> None:
        check_arguments(arguments)
        module.main(arguments)

    case.read(read)
    if case.refusal is None or any(case.folder.iterdir()):
        raise WrongTreatmentError("accepted, or something was made")


KINDS: dict[str, Callable[[Case], None]] = {
    "config.json": config_json,
    "image processor": image_processor,
    "text files": text_files,
    "user text": user_text,
    "weights": weights,
    "image": image_file,
    "JSONL": jsonl,
    "TSV": tsv,
    "YAML": yaml_config,
    "plan": plan,
    "bundle": bundle,
    "journal": journal,
    "finished run": finished_run,
    "Orbax folder": orbax_folder,
    "source of a conversion": conversion_source,
    "command line": command_line,
}


def _changes(found: Any, expected: Any) -> str:
    """The fields in which two configs differ."""
    a, b = (
        dict(jax.tree_util.tree_leaves_with_path(vars(config), is_leaf=lambda x: not isinstance(x, dict)))
        for config in (found, expected)
    )
    return "; ".join(f"{name}: {a[name]!r} for {b.get(name)!r}"[:300] for name in a if a[name] != b.get(name))
