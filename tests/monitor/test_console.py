"""What users see while a run goes on: the live line at several widths, plain lines elsewhere, lost pipes."""

import io
import os
import pty
import re
import subprocess
import sys

import pytest
from rich.console import Console

from helpers import ROOT
from helpers.console_rows import EVALUATION, step_row
from rcpo.common.console import duration, nats, number, passes_shown, percent
from rcpo.monitor.step_line import ConsoleSink, StepLine, evaluation_line


def step_line(num_rows: int, alpha: float = 1.25) -> StepLine:
    line = StepLine(num_steps=40, start_step=0)
    for step in range(1, num_rows + 1):
        line.add(step_row(step, alpha))
    return line


def rendered(line: StepLine, width: int, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=stream, width=width).print(line)
    stream.seek(0)
    return stream.read()


@pytest.mark.parametrize(
    ("width", "shown", "left_out"),
    [
        (24, ["20/40", "chosen -3.88"], ["rejected", "loss", "left"]),
        (40, ["20/40", "chosen -3.88", "rejected -1.00"], ["loss", "pairs/s", "in band"]),
        (80, ["loss 0.5", "chosen -3.88", "rejected -1.00", "\u03b1 1.250", "left"], ["pairs/s"]),
        (120, ["loss 0.5", "\u03b1 1.250", "in band 50%", "480 pairs/s", "left", "\u2501" * 5], []),
        (200, ["loss 0.5", "\u03b1 1.250", "in band 50%", "480 pairs/s", "left", "\u2501" * 20], []),
    ],
)
def test_the_live_line_is_one_line_and_drops_the_least_important_first(
    width: int, shown: list[str], left_out: list[str]
) -> None:
    """20 steps: the mean of the last ten chosen values -0.25 * (11 .. 20) is -3.875; half are inside."""
    text = rendered(step_line(20), width)
    assert text.endswith("\n")
    assert text.count("\n") == 1
    assert len(text.rstrip("\n")) <= width
    assert [part for part in shown if part not in text] == []
    assert [part for part in left_out if part in text] == []


@pytest.mark.parametrize("width", [1, 5, 9, 20])
def test_the_live_line_never_wraps_however_narrow(width: int) -> None:
    assert rendered(step_line(20), width).count("\n") == 1


def test_the_live_line_is_ascii_where_the_encoding_is() -> None:
    text = rendered(step_line(20), 120, encoding="ascii")
    assert text.isascii()
    assert "alpha 1.250" in text


def test_the_live_line_before_the_first_step_shows_only_the_count() -> None:
    assert rendered(StepLine(150, 0), 80).split()[-1] == "0/150"


def test_without_calibration_and_band_neither_is_shown() -> None:
    line = StepLine(10, 0)
    row = step_row(1, alpha=1.0)
    del row["band/inside"]
    line.add(row)
    assert "alpha" not in line.plain()
    assert "in band" not in line.plain()


def test_time_left_counts_from_the_end_of_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """First step done at 100 s, third at 104 s: 2 s a step, 7 steps left of 10, so 14 s."""
    clock = iter([100.0, 104.0])
    monkeypatch.setattr("rcpo.monitor.step_line.time.monotonic", lambda: next(clock))
    line = StepLine(10, 0)
    for step in (1, 2, 3):
        line.add(step_row(step))
    assert line.plain().endswith("left 0:14")


def plain_sink(log_every: int = 1) -> tuple[ConsoleSink, io.StringIO]:
    stream = io.StringIO()
    return ConsoleSink(Console(file=stream), num_steps=100, start_step=0, log_every=log_every), stream


def test_elsewhere_than_on_a_terminal_steps_are_lines_at_most_one_in_two_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step a second from 1 to 100, log_every=5: the first, the last, and every fifth between."""
    now = [0.0]
    monkeypatch.setattr("rcpo.monitor.step_line.time.monotonic", lambda: now[0])
    sink, stream = plain_sink(log_every=5)
    for step in range(1, 101):
        now[0] = float(step)
        sink.log_step(step_row(step))
    steps = [int(found) for found in re.findall(r"^step (\d+)/100 ", stream.getvalue(), re.M)]
    assert steps == [1, *range(5, 101, 5)]
    now[0] += 0.5
    sink.log_step(step_row(95))
    assert stream.getvalue().count("\n") == len(steps)


def test_plain_lines_are_ascii_without_markup_or_escape_codes() -> None:
    sink, stream = plain_sink()
    sink.log_eval(EVALUATION)
    sink.log_step(step_row(1))
    sink.close({}, 0)
    assert stream.getvalue().isascii()
    assert "\x1b" not in stream.getvalue()
    assert "[" not in stream.getvalue()
    assert stream.getvalue().count("\n") == 2


@pytest.mark.parametrize("is_terminal", [True, False])
def test_passes_over_pairs_are_a_bar_on_a_terminal_and_one_line_elsewhere(is_terminal: bool) -> None:
    """The bar reaches 100 % when all pairs are done; the line says how many there are."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=is_terminal, force_interactive=is_terminal, width=80)
    with passes_shown(console, "reference log-probs", 40) as done:
        done(30)
        done(10)
    if is_terminal:
        assert "100%" in stream.getvalue()
    else:
        assert stream.getvalue() == "reference log-probs of 40 pairs\n"


def test_an_evaluation_fits_into_80_columns() -> None:
    line = evaluation_line(EVALUATION)
    assert line == "held-out at step 150: chosen -11.23 (94% fell), rejected -12.50, accuracy 0.79"
    assert len(line) <= 80


def test_what_rounding_may_have_made_is_marked() -> None:
    """In bf16: -11.23 is above a floor of 12, and so is not -12.50."""
    line = evaluation_line(EVALUATION | {"displacement/noise_floor": 12.0})
    assert "chosen -11.23~ (94% fell), rejected -12.50, accuracy 0.79, noise floor 12" in line


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.51234, "0.512"),
        (12.345, "12.3"),
        (4821.2, "4821"),
        (1e-5, "1e-05"),
        (float("nan"), "nan"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_nats_percent_and_duration_by_hand() -> None:
    assert [nats(value) for value in (-0.001, 0.0, 1.005, -2.346)] == ["+0.00", "+0.00", "+1.00", "-2.35"]
    assert percent(0.0625) == "6%"
    assert [duration(seconds) for seconds in (0.4, 61, 3600)] == ["0:00", "1:01", "1:00:00"]


SHOW = """
import sys
from rcpo.common.console import RunConsole
from rcpo.monitor.step_line import ConsoleSink
sys.path.insert(0, {tests!r})
from helpers.console_rows import EVALUATION, step_row
console = RunConsole()
sink = ConsoleSink(console, 2000, 0, 1)
sink.log_eval(EVALUATION)
for step in range(1, 2001):
    sink.log_step(step_row(step))
    if step % 500 == 0:
        sink.log_eval(EVALUATION)
    if step == 1000:
        print("to stderr", file=sys.stderr)
sink.close({{}}, 0)
print("survived", file=sys.stderr)
"""


def show(**changes: str) -> tuple[list[str], dict[str, str]]:
    """A child that shows 2000 steps, as command and environment."""
    command = [sys.executable, "-c", SHOW.format(tests=str(ROOT / "tests"))]
    hidden = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
    env = {key: value for key, value in os.environ.items() if key not in hidden}
    return command, env | {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1"} | changes


def on_a_terminal(**changes: str) -> tuple[str, str]:
    """What the child writes to a terminal, and to a stderr that is none."""
    command, env = show(**changes)
    leader, follower = pty.openpty()
    child = subprocess.Popen(command, env=env, stdout=follower, stderr=subprocess.PIPE, text=True)
    os.close(follower)
    shown = b""
    try:
        while chunk := _read(leader):
            shown += chunk
        _, errors = child.communicate(timeout=60)
    finally:
        child.kill()
        child.wait()
        os.close(leader)
    assert child.returncode == 0, errors
    return shown.decode(), errors


def _read(leader: int) -> bytes:
    try:
        return os.read(leader, 65536)
    except OSError:  # Linux's way to say that the other end is closed
        return b""


@pytest.mark.timeout(120)
def test_on_a_terminal_the_line_is_live_and_the_cursor_comes_back() -> None:
    shown, errors = on_a_terminal()
    assert "\x1b[?25l" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    assert "2000/2000" in shown
    assert shown.count("held-out at step 150") == 5
    assert errors.split("\n") == ["to stderr", "survived", ""]


@pytest.mark.timeout(120)
def test_a_dumb_terminal_gets_plain_lines() -> None:
    shown, _ = on_a_terminal(TERM="dumb")
    assert "\x1b" not in shown
    assert shown.isascii()
    assert "step 2000/2000  loss 0.5" in shown


@pytest.mark.timeout(120)
@pytest.mark.parametrize("changes", [{}, {"FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1"}])
def test_a_pipe_gets_no_escape_codes_whatever_the_environment_says(changes: dict[str, str]) -> None:
    command, env = show(**changes)
    done = subprocess.run(command, env=env, capture_output=True, timeout=60, check=True)
    assert b"\x1b" not in done.stdout
    assert done.stdout.isascii()
    assert done.stdout.endswith(
        b"\nheld-out at step 150: " + evaluation_line(EVALUATION)[22:].encode() + b"\n"
    )


@pytest.mark.timeout(120)
def test_a_reader_that_goes_away_stops_nothing() -> None:
    """`| head -1`: the pipe is closed after one line; the child says "survived" and exits with 0."""
    command, env = show()
    child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.readline()
        child.stdout.close()
        errors = child.stderr.read()
        child.wait(60)
    finally:
        child.kill()
        child.wait()
    assert errors == b"to stderr\nsurvived\n"
    assert child.returncode == 0
