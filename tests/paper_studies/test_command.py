"""The command line: bad input in one line, before JAX starts; and one small run of the command itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlens_jax.commands.studies import main
from rlens_jax.console import run_command
from rlens_jax.errors import UserError
from rlens_jax.paper_studies.ranking_file import read_orders
from rlens_jax.paper_studies.request import STUDY_NAMES, read_request


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say which study; there are layers, text,"),
        (["layer"], "no study is called 'layer' (did you mean 'layers'?); there are"),
        (["--model", "x"], "no study is called '--model'"),
        (["text", "--rankings", "x"], "unknown option --rankings (did you mean '--ranking'?)"),
        (["text", "--ranking"], "option --ranking needs a value"),
        (["text", "--data.test_sampels", "3"], "(did you mean '--data.test_samples'?)"),
        (["text", "--search.objective", "generation"], "search.objective must be teacher_forced"),
        (["text", "--search.operators", "ffn", "--search.base_attention", "1"], "must be empty"),
        (["all", "--compute.model_shards", "2"], "compute.model_shards must be 1 for the study text"),
        (
            ["text", "--hosts.num_processes", "2", "--hosts.process_id", "0", "--hosts.coordinator", "a:1"],
            "one process",
        ),
    ],
)
def test_bad_input_is_answered_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_command(main, argv=arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_request() -> None:
    request = read_request(["all"])
    assert request.names == STUDY_NAMES
    assert request.ranking is None
    assert request.config.output == "runs/studies"
    assert request.config.data.test_samples == 80
    request = read_request(
        [
            "range",
            "--ranking=a.json",
            "--config",
            "embedded",
            "--output",
            "b",
            "--reduction.attention_range=8",
        ]
    )
    assert request.names == ("range",)
    assert request.ranking == Path("a.json")
    assert request.config.output == "b"
    assert request.config.reduction.attention_range == 8
    assert request.config.data.test_samples == 150


def test_a_request_needs_no_jax() -> None:
    code = (
        "import sys\nfrom rlens_jax.commands.studies import main\n"
        "from rlens_jax.paper_studies.request import read_request\nread_request(['all'])\nprint('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def ranking(**changes: object) -> dict[str, object]:
    return {
        "schema": "rlens-ranking/1",
        "model": {"hash": "m"},
        "rankings": {"attention": [2, 0, 1], "ffn": [0, 1, 2]},
        **changes,
    }


def test_orders_of_a_finished_ranking(tmp_path: Path) -> None:
    path = tmp_path / "ranking.json"
    path.write_text(json.dumps(ranking()))
    assert read_orders(path, "m", 3) == {"attention": (2, 0, 1), "ffn": (0, 1, 2)}
    path.write_text(json.dumps(ranking(rankings={"ffn": [0, 1, 2]})))
    assert read_orders(path, "m", 3) == {"ffn": (0, 1, 2)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the ranking .*: No such file"),
        ("{", "is not valid JSON"),
        ("[1]", "is no rlens-ranking/1; name the ranking.json"),
        (json.dumps(ranking(schema="rlens-study/1")), "is no rlens-ranking/1"),
        (json.dumps(ranking(model={"hash": "other"})), "ranks the layers of another model"),
        (
            json.dumps(ranking(rankings={"ffn": [0, 1, 1]})),
            "rankings.ffn must name each of the 3 layers once",
        ),
        (json.dumps(ranking(rankings={"ffn": [0, 1]})), "rankings.ffn must name each of the 3 layers once"),
        (json.dumps(ranking(rankings={"ffn": 3})), "rankings.ffn must name each of the 3 layers once"),
        (json.dumps(ranking(rankings=[])), "has no rankings"),
        (json.dumps(ranking(model=None)), "another model"),
    ],
)
def test_a_ranking_that_cannot_be_used(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "ranking.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_orders(path, "m", 3)
