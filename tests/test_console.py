import io
import os
import signal
import subprocess
import sys
import time

import pytest

from rlens_jax.console import Progress, StopRequested, run_command, say, show
from rlens_jax.errors import UserError, foreign, printable
from rlens_jax.forecast import Forecast, Work


def ended(main, capsys, argv=(), **options):
    with pytest.raises(SystemExit) as end:
        run_command(main, argv=argv, **options)
    return end.value.code, *capsys.readouterr()


def test_a_command_gets_its_arguments_and_ends_with_0(capsys):
    assert ended(lambda argv: print(*argv), capsys, ["--seed", "3"]) == (0, "--seed 3\n", "")


def test_bad_input_is_one_line_and_exit_code_2(capsys):
    def main(argv):
        raise UserError("no model folder 'x'")

    assert ended(main, capsys) == (2, "", "error: no model folder 'x'\n")


def test_ctrl_c_says_that_the_run_can_be_resumed_and_ends_with_130(capsys):
    def main(argv):
        raise KeyboardInterrupt

    code, out, err = ended(main, capsys)
    assert (code, out) == (130, "")
    assert "the same command goes on from there" in err
    assert "stopped here" in ended(main, capsys, interrupted="stopped here")[2]


def test_our_own_mistakes_go_through():
    def main(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(main, argv=[])


def test_the_console_and_the_configuration_start_without_jax():
    code = "import sys, rlens_jax.console, rlens_jax.commands.rank; print('jax' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert run.stdout == "False\n", run.stderr


def test_foreign_text_is_escaped_and_long_lines_are_cut(capsys):
    def main(argv):
        show("answer \x1b[2J\ttab\nline 2 \u202e")
        say("name\r\x07")
        raise UserError("bad \ud83d name \u2028 " + "x" * 5000 + " end\n  second line")

    code, out, err = ended(main, capsys)
    assert (code, out) == (2, "answer \\x1b[2J\ttab\nline 2 \\u202e\n")
    said, error, second = err.splitlines()
    assert said == r"name\r\x07"
    assert error.startswith(r"error: bad \ud83d name \u2028 xxx") and error.endswith("x end") and len(error) < 1600
    assert second == "  second line"


def test_what_the_terminal_cannot_write_is_escaped():
    code = "from rlens_jax.console import show; show('Größe 図')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "latin-1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert (run.returncode, run.stdout, run.stderr) == (0, "Größe \\u56f3\n".encode("latin-1"), b"")


def test_printable_leaves_ordinary_text_of_all_scripts():
    text = "Größe 図表 קובץ → 3 \N{NO-BREAK SPACE}€ 🙂"
    assert printable(text) == text


def test_the_guard_of_libraries_turns_their_errors_into_one_line_and_lets_signals_pass():
    panic = type("PanicException", (BaseException,), {})  # as the libraries in Rust have it
    for error in (ValueError("bad\nfile"), panic("bad"), RuntimeError()):
        with pytest.raises(UserError, match=r"^a\.json \((bad|RuntimeError)\); copy it$"), foreign("a.json", "; copy it"):
            raise error
    for signal_error in (StopRequested, KeyboardInterrupt, SystemExit):
        with pytest.raises(signal_error), foreign("a.json"):
            raise signal_error
    with pytest.raises(UserError, match="mine"), foreign("a.json"):
        raise UserError("mine")


def test_a_reader_of_stdout_may_leave_early():
    command = [sys.executable, "-m", "rlens_jax.cost", "qwen2-vl-7b"]
    reading, writing = os.pipe()
    os.close(reading)
    run = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (run.returncode, run.stderr) == (141, b"")


def test_an_argument_that_is_not_utf_8_is_one_line():
    for command in (["-m", "rlens_jax.cost"], ["-m", "rlens_jax", "cost"], ["-m", "rlens_jax"]):
        run = subprocess.run([sys.executable, *command, b"caf\xe9", "--visual=3"], capture_output=True)
        assert (run.returncode, run.stdout) == (2, b"")
        assert run.stderr.startswith(b"error: ") and run.stderr.count(b"\n") == 1
        assert rb"caf\udce9" in run.stderr


NOISE = """
import logging, os, sys, warnings
from rlens_jax.console import run_command, say

def main(argv):
    from absl import logging as absl_logging

    absl_logging.warning("noise of absl")
    logging.getLogger("PIL").warning("noise of a logger")
    logging.getLogger("x").error("noise of a logger")
    warnings.warn("noise of a warning")
    os.write(2, b"noise of C\\n")
    say("own line")
    if argv == ["abort"]:
        os.abort()
    if argv == ["raise"]:
        raise ZeroDivisionError

try:
    run_command(main)
finally:
    os.write(2, b"after\\n")
"""


def noisy(*arguments, **environment):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run([sys.executable, "-c", NOISE, *arguments], capture_output=True, text=True, env=environment)


def test_nothing_of_the_libraries_reaches_the_terminal():
    run = noisy()
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "own line\nafter\n")


def test_all_of_the_libraries_reaches_the_terminal_on_request():
    assert noisy(TF_CPP_MIN_LOG_LEVEL="0").stderr.count("noise of") == 5


def test_our_own_mistakes_and_crashes_in_c_are_told():
    run = noisy("raise")
    assert (run.returncode, "noise" in run.stderr) == (1, False)
    assert "ZeroDivisionError" in run.stderr
    run = noisy("abort")
    assert (run.returncode, "noise" in run.stderr) == (-signal.SIGABRT, False)
    assert "Fatal Python error: Aborted" in run.stderr and "in main" in run.stderr


@pytest.mark.slow
@pytest.mark.tpu_compiler
def test_libtpu_says_nothing_on_a_machine_without_a_tpu():
    """Also transformers without PyTorch says nothing."""
    code = """
import sys
sys.modules["torch"] = None
from rlens_jax.console import run_command

def main(argv):
    import jax
    import transformers

    print(jax.devices()[0].platform)

run_command(main)
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "TF_CPP_MIN_LOG_LEVEL")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout in ("cpu\n", "tpu\n", "gpu\n")


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_without_a_terminal_progress_is_a_line_every_few_seconds(monkeypatch):
    stream, clock = io.StringIO(), Clock()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("rlens_jax.console.time.monotonic", clock)
    with Progress("ranking ffn", 240, "plans") as progress:
        progress.advance(40, resumed=True)
        for _ in range(100):
            clock.now += 0.2
            progress.advance()
        assert stream.getvalue().splitlines() == [
            "ranking ffn: 0/240 plans",
            "ranking ffn: 65/240 plans, 5.0 plans/s, 35 s left",
            "ranking ffn: 90/240 plans, 5.0 plans/s, 30 s left",
            "ranking ffn: 115/240 plans, 5.0 plans/s, 25 s left",
            "ranking ffn: 140/240 plans, 5.0 plans/s, 20 s left",
        ]
        clock.now += 200
        progress.advance(100)
    assert stream.getvalue().splitlines()[-1] == "ranking ffn: 240/240 plans, 1.1 s each, took 3 min 40 s"
    with Progress("joint search", 2, "steps") as progress:
        progress.advance(3)  # more than was expected
    assert stream.getvalue().splitlines()[-1] == "joint search: 3/3 steps"


def test_the_time_left_of_the_whole_run_is_shown(monkeypatch):
    stream, clock = io.StringIO(), Clock()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("rlens_jax.console.time.monotonic", clock)
    forecast = Forecast({"ranking ffn": Work([6.0] * 10), "held-out curves": Work([60.0])})
    with Progress("ranking ffn", 10, "candidates", forecast) as progress:
        for _ in range(10):
            clock.now += 6
            progress.advance()
    lines = stream.getvalue().splitlines()
    assert lines[1] == "ranking ffn: 1/10 candidates, 54 s left, 1 min 54 s for the whole run"
    assert lines[-1] == "ranking ffn: 10/10 candidates, 6.0 s each, took 1 min 0 s"


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress("ranking ffn", 10, "plans") as progress:
        progress.advance(4, resumed=True)
        progress.advance(6)
    assert "ranking ffn: 100%" in stream.getvalue()
    assert "10/10 plans" in stream.getvalue()


def test_sigterm_ends_with_143_and_leaves_the_handler_as_it_was(capsys):
    def main(argv):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    before = signal.getsignal(signal.SIGTERM)
    code, out, err = ended(main, capsys)
    assert (code, out) == (143, "")
    assert "the same command goes on from there" in err
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_muted_process_says_nothing():
    code = """
import sys
from rlens_jax import console
from rlens_jax.console import Progress, mute, say
console.SECONDS_BETWEEN_LINES = 0
sys.stderr.isatty = lambda: len(sys.argv) > 1
mute()
say("a message")
with Progress("ranking ffn", 2, "plans") as shown:
    shown.advance()
    shown.advance()
print("an error", file=sys.stderr)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for terminal in ([], ["terminal"]):
        run = subprocess.run([sys.executable, "-c", code, *terminal], capture_output=True, text=True, check=True, env=environment)
        assert (run.stdout, run.stderr) == ("", "an error\n")
