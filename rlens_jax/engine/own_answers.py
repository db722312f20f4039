"""The dense model's own answers, which a search by fidelity compares plans on.

They are generated greedily, with the end token, once per sample, in a session before the search: its rows can be laid out only
when the answers are known. `own_answers.json` in the run's folder keeps them, with what they depend on:

    {"schema": "rlens-own-answers/1", "identity": {...}, "answers": {"a.jpg/0": {"tokens": [5, 7], "cut": false}}}

An answer that reaches `search.max_new_tokens` without its end is cut: it has no end token, and is marked.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlens_jax.config import RunConfig
from rlens_jax.console import say
from rlens_jax.engine.generating import generated_tokens
from rlens_jax.engine.session import ModelFolder, Session, encode_split_of, load
from rlens_jax.errors import UserError
from rlens_jax.files import json_text, read_json, replace_file
from rlens_jax.hosts.processes import Processes
from rlens_jax.models.generation import Tokens
from rlens_jax.plans import Plan

OWN_ANSWERS_FILE = "own_answers.json"
SCHEMA = "rlens-own-answers/1"
_LARGEST = 2**30
_PROCESSOR_FILES = ("*.json", "*.jinja", "*.txt", "*.model")


def own_answers(folder: ModelFolder, config: RunConfig, processes: Processes) -> dict[str, tuple[int, ...]]:
    """The tokens of the dense model's answer to each sample that needs one, by the sample's id; every process calls it.

    Raises:
        UserError: as `Session.open` and `load`, or the file is damaged.
    """
    path = config.folder / OWN_ANSWERS_FILE
    search = replace(config.search, objective="generation", method="greedy", one_shot_by="outcome")
    asking = replace(config, output=f"{config.output}/own_answers", search=search)
    with Session.open(folder, asking, processes, bare=True) as session:
        settings = {"data_hash": session.data_hash, "processor_hash": _processor_hash(folder.path)}
        identity = folder.identity({**settings, "dtype": session.config.compute.dtype, "most_tokens": search.max_new_tokens})
        answers = processes.agreed(lambda: _read(path, identity))
        if answers is None:
            answers = _generated(session)
            if processes.leads:
                fields = {"schema": SCHEMA, "identity": identity, "answers": answers}
                replace_file(path, json_text(fields).encode())
    cut = sum(answer["cut"] for answer in answers.values())
    note = f", {cut} of them cut at search.max_new_tokens = {search.max_new_tokens}" if cut else ""
    say(f"the dense model's own answers to {len(answers)} questions{note}")
    return {name: tuple(answer["tokens"]) for name, answer in answers.items()}


def _generated(session: Session) -> dict[str, Any]:
    loaded = load(session)
    programs, ends = loaded.programs(session.config), loaded.preparer.chat.stop_tokens
    answers = {}
    for name in session.splits:
        split = encode_split_of(session, loaded, programs, name)
        for sample, tokens in zip(split.samples, generated_tokens(programs, split, Plan()), strict=True):
            answer = until_end(tokens, ends)
            answers[sample.id] = {"tokens": answer, "cut": answer[-1] not in ends}
    return answers


def until_end(tokens: Sequence[int], ends: Tokens) -> list[int]:
    """The tokens up to the first that ends a turn, with it."""
    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[: end + 1])


def _processor_hash(folder: Path) -> str:
    """SHA-256, in hex, of the small files of a model folder: tokenizer, chat template and image processor among them."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _PROCESSOR_FILES for path in folder.glob(pattern)}):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _read(path: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The answers in the file, None if there are none of this model to these samples."""
    if not path.exists():
        return None
    fields = read_json(path, _LARGEST)
    if not isinstance(fields, dict) or fields.get("schema") != SCHEMA or not isinstance(fields.get("answers"), dict):
        raise UserError(f"{path} is damaged; delete it, and the answers are generated again")
    return fields["answers"] if fields.get("identity") == identity else None
