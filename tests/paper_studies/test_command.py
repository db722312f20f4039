"""The command line: bad input in one line, before JAX starts; and one small run of the command itself."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from rlens_jax.commands.studies import main
from rlens_jax.config import RunConfig
from rlens_jax.console import run_command
from rlens_jax.errors import UserError
from rlens_jax.files import json_text, replace_file
from rlens_jax.paper_studies import studies_run
from rlens_jax.paper_studies.studies_run import read_orders
from rlens_jax.paper_studies.study import STUDY_NAMES
from rlens_jax.search.ranking_file import ranking_fields
from tests.reporting.synthetic import synthetic_results


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "NAME is missing; choose one of layers, text,"),
        (["layer"], "there is no study 'layer' (did you mean 'layers'?); choose"),
        (["--model", "x"], "NAME is missing"),
        (["text", "--rankings", "x"], "unknown option --rankings (did you mean '--ranking'?)"),
        (["text", "--ranking"], "argument --ranking: expected one argument"),
        (["text", "--data.test_sampels", "3"], "(did you mean '--data.test_samples'?)"),
        (["text", "--search.objective", "generation"], "search.objective must be teacher_forced"),
        (["text", "--search.operators", "ffn", "--search.base_attention", "1"], "must be empty"),
        (["all", "--compute.model_shards", "2"], "compute.model_shards must be 1 for the study text"),
        (["text", "--hosts.num_processes", "2", "--hosts.process_id", "0", "--hosts.coordinator", "a:1"], "one process"),
    ],
)
def test_bad_input_is_answered_in_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_command(main, argv=arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def requested(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[Sequence[str], RunConfig, Path | None]:
    """What the command passes on to the studies."""
    requests = []
    monkeypatch.setattr("rlens_jax.commands.studies.read_ranking", lambda path: None)
    monkeypatch.setattr(studies_run, "run_studies", lambda *request, restart: requests.append(request) or [])
    main(arguments)
    (request,) = requests
    return request


def test_the_defaults_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    names, config, ranking = requested(monkeypatch, "all")
    assert names == STUDY_NAMES
    assert ranking is None
    assert config.output == "runs/studies"
    assert config.data.test_samples == 80


def test_options_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--ranking=a.json", "--config", "embedded", "--output", "b", "--reduction.attention_range=8"]
    names, config, ranking = requested(monkeypatch, "range", *options)
    assert names == ("range",)
    assert ranking == Path("a.json")
    assert config.output == "b"
    assert config.reduction.attention_range == 8
    assert config.data.test_samples == 100


def test_bad_input_needs_no_jax() -> None:
    code = (
        "import sys\nfrom rlens_jax.commands.studies import main\nfrom rlens_jax.errors import UserError\n"
        "try: main(['all', '--search.objective=generation'])\n"
        "except UserError: print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def written(folder: Path, **changes: object) -> Path:
    """A ranking.json of a model with 6 layers."""
    fields = {**ranking_fields(synthetic_results(num_layers=6, samples=20)), **changes}
    return replace_file(folder / "ranking.json", json_text(fields).encode())


def test_orders_of_a_finished_ranking(tmp_path: Path) -> None:
    orders = {"attention": (2, 0, 1, 5, 4, 3), "ffn": (0, 1, 2, 3, 4, 5)}
    path = written(tmp_path, rankings={operator: list(order) for operator, order in orders.items()})
    assert read_orders(path, "sha256:5f1c") == orders


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "rlens-study/1"}, "must be 'rlens-ranking/1', not 'rlens-study/1'"),
        ({"model": {"path": "", "hash": "other", "num_layers": 6}}, "ranks the layers of another model"),
        ({"rankings": {"attention": [0, 1, 2, 3, 4, 5], "ffn": [0, 1, 2, 3, 4, 4]}}, "rankings.ffn: .* has non-unique elements"),
        (
            {"rankings": {"attention": [0, 1, 2, 3, 4, 5], "ffn": [0, 1, 2]}},
            "rankings.ffn: must name each of the layers 0 to 5 once",
        ),
        ({"rankings": {"ffn": 3}}, "rankings.ffn: 3 is not of type 'array'"),
        ({"rankings": []}, "rankings: .* is not of type 'object'"),
        ({"model": None}, "model: None is not of type 'object'"),
    ],
)
def test_a_ranking_that_cannot_be_used(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = written(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        read_orders(path, "sha256:5f1c")


def test_an_unusable_ranking_leaves_no_run_folder(tmp_path: Path) -> None:
    path, output = written(tmp_path), tmp_path / "run"
    with pytest.raises(UserError, match="ranks the layers of another model"):
        main(["layers", "--ranking", str(path), "--output", str(output)])
    assert not output.exists()
