"""Which sinks a run gets, and the two files that are the truth."""

import logging
import math
from pathlib import Path

import pytest

from rcpo.commands.train import prepare
from rcpo.config.schema import Config
from rcpo.monitor.sinks import JsonlSink, build_sinks
from rcpo.monitor.step_line import ConsoleSink
from rcpo.monitor.tracking import WandbSink
from rcpo.ranks.logs import log_to_file
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import config_tree


def made_run(tmp_path: Path, *words: str) -> tuple[Config, RunFolder]:
    config = prepare(["train.device=cpu", f"run_dir={tmp_path / 'run'}", *words])
    assert config is not None
    run = RunFolder(tmp_path / "run")
    run.create(config, config_tree(config))
    return config, run


@pytest.mark.parametrize(
    ("words", "kinds"),
    [
        (["tracking=none"], [JsonlSink, ConsoleSink]),
        (["tracking.mode=disabled"], [JsonlSink, ConsoleSink]),
        (["tracking.mode=offline"], [JsonlSink, WandbSink, ConsoleSink]),
    ],
)
def test_a_run_has_files_and_console_always_and_tracking_when_asked(
    tmp_path: Path, words: list[str], kinds: list[type]
) -> None:
    config, run = made_run(tmp_path, *words)
    sinks = build_sinks(config, run, num_steps=3, start_step=0)
    try:
        assert [type(sink) for sink in sinks] == kinds
    finally:
        for sink in sinks:
            sink.close({}, 0)


def test_rows_are_on_disk_at_once_and_come_back_as_they_were(tmp_path: Path) -> None:
    """Read while the sink is open, as a crash would leave them: infinities and nan too."""
    _, run = made_run(tmp_path)
    sink = JsonlSink(run)
    sink.log_step({"step": 1, "band/lower": -math.inf, "band/upper": math.inf})
    sink.log_eval({"step": 1, "displacement/chosen": 0.1 + 0.2})
    assert run.rows(run.metrics) == [{"step": 1, "band/lower": -math.inf, "band/upper": math.inf}]
    assert run.rows(run.eval) == [{"step": 1, "displacement/chosen": 0.1 + 0.2}]
    sink.close({}, 0)


def test_a_resumed_run_appends(tmp_path: Path) -> None:
    _, run = made_run(tmp_path)
    for step in (1, 2):
        sink = JsonlSink(run)
        sink.log_step({"step": step, "train/loss": math.nan})
        sink.close({}, 0)
    assert [row["step"] for row in run.rows(run.metrics)] == [1, 2]


@pytest.mark.parametrize("rank", [0, 1])
def test_warnings_reach_the_log_and_rank_zeros_the_user_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """Libraries' warnings and rcpo's errors go to the log alone: who ends the run prints the error."""
    root, ours = logging.getLogger(), logging.getLogger("rcpo")
    monkeypatch.setattr(root, "handlers", root.handlers)
    monkeypatch.setattr(ours, "handlers", ours.handlers)
    log_to_file(tmp_path, rank)
    logging.getLogger("rcpo.training.loop").warning("policy and reference differ by %.1f nats", 0.5)
    logging.getLogger("rcpo.training.loop").error("an error")
    logging.getLogger("rcpo.training.loop").info("a detail")
    logging.getLogger("a_library").warning("a library's warning")
    logging.captureWarnings(False)
    root.handlers[0].close()
    captured = capsys.readouterr()
    expected = "rcpo: warning: policy and reference differ by 0.5 nats\n" if rank == 0 else ""
    assert (captured.out, captured.err) == ("", expected)
    log = (tmp_path / f"rank-{rank:04d}.log").read_text()
    for part in ("differ by 0.5 nats", "an error", "a detail", "a library's warning"):
        assert part in log
