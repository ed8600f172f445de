"""`rcpo watch`: what it shows of runs that go on, from files that grow while they are read."""

import json
import math
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from helpers.compare_folders import make_run
from rcpo import cli
from rcpo.report.live import BARS, Board, LiveRun, gauge, sparkline
from rcpo.runs.folder import RunFolder


def test_only_what_is_new_is_read_and_a_line_in_the_making_waits(tmp_path: Path) -> None:
    metrics = make_run(tmp_path / "run", status="running", steps=4) / "metrics.jsonl"
    run = LiveRun(metrics.parent)
    run.look()
    assert (run.last["step"], run.history["displacement/chosen"]) == (
        4,
        [-0.1, -0.2, pytest.approx(-0.3), -0.4],
    )
    with metrics.open("a") as stream:
        stream.write('{"step": 5, "displacement/chosen": -9.0}\n{"step": 6, "displa')
    run.look()
    assert (run.last["step"], run.history["displacement/chosen"][4:]) == (5, [-9.0])
    with metrics.open("a") as stream:
        stream.write('cement/chosen": null}\nnot a row\n')
    run.look()
    assert run.last["step"] == 6
    assert math.isnan(run.history["displacement/chosen"][5])
    # A resumed run has dropped the rows after its checkpoint.
    metrics.write_text('{"step": 1, "displacement/chosen": 7.0}\n')
    run.look()
    assert (run.last["step"], run.history["displacement/chosen"]) == (1, [7.0])


def test_a_folder_without_anything_yet_is_shown_too(tmp_path: Path) -> None:
    run = RunFolder(make_run(tmp_path / "run", status="pending"))
    for path in (run.metrics, run.eval):
        path.unlink()
    board = Board([run.path])
    board.look()
    assert not board.all_ended()
    assert "pending" in text_of(board)
    run.run_json.write_text("{")
    board.look()
    assert "pending" in text_of(board)


def text_of(board: Board, width: int = 200) -> str:
    console = Console(width=width, file=open(os.devnull, "w"), record=True)  # noqa: SIM115
    console.print(board)
    return console.export_text()


def test_the_last_steps_the_held_out_pairs_and_the_time_left_are_shown(tmp_path: Path) -> None:
    """Chosen: -0.1 ... -0.8, of which the mean is -0.45; held out -0.5. Two steps of 30 s are left. The last
    step stands at 0.8, far above the band's edge of 0.25."""
    path = make_run(tmp_path / "run", status="running", settings={"train.steps": 10})
    with (path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 8, "speed/step_seconds": 30.0}\n')
    board = Board([path])
    board.look()
    text = text_of(board)
    assert re.search(r"run +running +8/10 +-0.45 +█▇▆▅▄▃▂▁ +-0.50 +1.000 +▁{8} +\[ +\] ●", text)
    assert "1:00" in text
    assert "1 running" in text


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_narrow_terminal_shows_fewer_columns_and_no_cut_ones(tmp_path: Path, width: int) -> None:
    make_run(tmp_path / "run", status="running")
    board = Board([tmp_path / "run"])
    board.look()
    text = text_of(board, width)
    assert "…" not in text
    assert "running" in text
    assert all(len(line) <= width for line in text.splitlines())


def test_at_80_columns_band_and_time_left_stay_and_sparklines_go(tmp_path: Path) -> None:
    """With names as `rcpo train` gives them."""
    path = make_run(
        tmp_path / "dpo-feedback-tiny-20261128-142718", status="running", settings={"train.steps": 10}
    )
    with (path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 8, "speed/step_seconds": 30.0}\n')
    board = Board([path])
    board.look()
    heads = next(line for line in text_of(board, 80).splitlines() if "status" in line)
    assert {"run", "status", "step", "chosen", "band", "left"} <= set(heads.split())
    assert "batches" not in heads
    assert "so far" not in heads
    assert "1:00" in text_of(board, 80)


def test_a_run_that_writes_nothing_any_more_is_silent(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", status="running")
    os.utime(path / "metrics.jsonl", (time.time() - 7200, time.time() - 7200))
    board = Board([path])
    board.look()
    assert "silent 2:00:0" in text_of(board)


def test_why_a_run_failed_or_cannot_be_read_is_said_below(tmp_path: Path) -> None:
    make_run(tmp_path / "good")
    make_run(tmp_path / "bad", status="failed", exit_reason="out of\nmemory")
    (make_run(tmp_path / "torn") / "config.yaml").write_text("[")
    board = Board([tmp_path / name for name in ("good", "bad", "torn")])
    board.look()
    text = text_of(board)
    assert "bad: failed: out of memory\n" in text
    assert "torn: config.yaml cannot be read\n" in text
    assert "good:" not in text


def test_sparklines_and_gauges_by_hand() -> None:
    """28 values become 14 means, 0 to 13, drawn by the whole eighths of value / 13. The gauge has 13 places,
    its edges are the third and the eleventh."""
    assert sparkline([0.0, 1.0], BARS) == "▁█"
    assert sparkline([float(idx // 2) for idx in range(28)], BARS) == "▁▁▂▂▃▄▄▅▅▆▇▇██"
    assert sparkline([2.0] * 3, BARS) == "▁▁▁"
    assert sparkline([math.nan, math.inf], BARS) == ""

    def shown(position: float, lower: float = -1.0, upper: float = 1.0) -> str:
        return gauge({"band/position": position, "band/lower": lower, "band/upper": upper}, "o")

    assert shown(0.0) == "  [   o   ]  "
    assert shown(1.0) == "  [       o  "
    assert shown(-99.0) == "o [       ]  "
    assert shown(0.0, -math.inf, math.inf) == "     open    "
    assert shown(math.nan) == ""
    assert gauge({}, "o") == ""


def test_a_console_that_is_no_terminal_gets_it_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run", status="running")
    assert cli.dispatch(["watch", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.count("1 running") == 1
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere: is not there"),
        (["run", "--loud"], "unrecognized arguments: --loud"),
        (["--once"], "arguments are required: PATH"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["watch", *words])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_on_a_terminal_it_goes_on_until_all_runs_have_ended(tmp_path: Path) -> None:
    run = RunFolder(make_run(tmp_path / "run", status="running"))
    terminal, side = pty.openpty()
    command = [sys.executable, "-m", "rcpo.cli", "watch", str(run.path)]
    env = os.environ | {"TERM": "xterm", "COLUMNS": "120", "LINES": "30"}
    with subprocess.Popen(command, stdout=side, stderr=side, stdin=side, env=env) as watching:
        os.close(side)
        _read_until(terminal, "1 running")
        assert watching.poll() is None
        with run.metrics.open("a") as stream:
            stream.write(json.dumps({"step": 77}) + "\n")
        run.update_run(status="done")
        seen = _read_until(terminal, "1 done")
        # A frame may come in pieces, or may have been drawn between the status and the rows.
        _read_until(terminal, "77", seen)
        assert watching.wait(timeout=60) == 0
    os.close(terminal)


def _read_until(terminal: int, text: str, seen: str = "") -> str:
    """What the terminal shows until `text` is there, behind what was `seen` before."""
    deadline = time.monotonic() + 90
    while text not in seen:
        assert time.monotonic() < deadline, seen
        if select.select([terminal], [], [], 1)[0]:
            seen += os.read(terminal, 65536).decode()
    return seen
