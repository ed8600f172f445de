"""W&B: when it is online, what a real offline run sends (read by W&B's own reader), its failures."""

import json
import logging
import math
import netrc
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
import yaml

from helpers import forked
from helpers.wandb_records import Records, by_step, wandb_rows
from rcpo.commands.train import prepare
from rcpo.config.schema import Config, TrackingConfig
from rcpo.evaluation.results import Results
from rcpo.monitor.other_trackers import ALERT
from rcpo.monitor.tracking import WandbSink, wandb_mode
from rcpo.report import dashboard
from rcpo.runs.answers import read_answers
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import config_tree

KEY = "0123456789abcdef" * 2 + "deadbeef"
VARIABLES = (
    "WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_CONFIG_DIR", "WANDB_IDENTITY_TOKEN_FILE", "NETRC",
)  # fmt: skip


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own without any W&B setting."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


def tracking(mode: str, name: str = "wandb") -> TrackingConfig:
    return TrackingConfig(name=name, mode=mode)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mode", "variable", "with_key", "expected"),
    [
        ("auto", None, False, "offline"),
        ("auto", None, True, "online"),
        ("auto", "offline", True, "offline"),
        ("auto", "dryrun", True, "offline"),
        ("auto", "disabled", True, "disabled"),
        ("auto", "online", True, "online"),
        ("auto", "online", False, "offline"),
        ("online", "disabled", True, "online"),
        ("online", None, False, "offline"),
        ("offline", "online", True, "offline"),
        ("disabled", "online", True, "disabled"),
    ],
)
def test_the_mode_is_the_configs_else_the_environments_else_by_key(
    monkeypatch: pytest.MonkeyPatch, mode: str, variable: str | None, with_key: bool, expected: str
) -> None:
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
    if with_key:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert wandb_mode(tracking(mode)) == expected


def test_tracking_none_is_disabled_whatever_else_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert wandb_mode(tracking("online", name="none")) == "disabled"


def test_rows_wait_in_line_while_wandb_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A start that takes longer than two rows; both are sent with the third, in order, from this thread."""
    config, run = made_run(tmp_path)
    may_start, seen = threading.Event(), list[tuple[int, str]]()
    init, log = wandb.init, wandb.Run.log

    def late(**given: Any) -> Any:
        may_start.wait(60)
        return init(**given)

    def noted(self: wandb.Run, row: dict[str, Any], step: int) -> None:
        seen.append((step, threading.current_thread().name))
        log(self, row, step=step)

    monkeypatch.setattr(wandb, "init", late)
    monkeypatch.setattr(wandb.Run, "log", noted)
    sink = WandbSink(config, run, "offline")
    for step in (0, 1):
        sink.log_eval({"step": step, "displacement/chosen": 0.5 * step})
    assert seen == []
    may_start.set()
    wait_for_start()
    sink.log_step({"step": 2, "train/loss": 0.25})
    assert seen == [(step, threading.main_thread().name) for step in (0, 1, 2)]
    sink.close({}, 0)
    assert sorted(wandb_rows(Records(run))) == [0, 1, 2]
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def wait_for_start() -> None:
    for thread in threading.enumerate():
        if thread.name == "wandb":
            thread.join(60)


def test_a_run_that_ends_before_wandb_is_there_waits_for_it(tmp_path: Path) -> None:
    config, run = made_run(tmp_path)
    feed(WandbSink(config, run, "offline"))
    assert sorted(wandb_rows(Records(run))) == [0, 1, 2]


def test_online_without_a_key_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """W&B would ask for the key on the terminal, under a live display."""
    assert wandb_mode(tracking("online")) == "offline"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "wandb login" in caplog.text
    caplog.clear()
    assert wandb_mode(tracking("auto")) == "offline"
    assert caplog.text == ""


def write_netrc(path: Path, host: str) -> None:
    path.write_text(f"machine {host}\n  login user\n  password {KEY}\n")
    path.chmod(0o600)
    assert netrc.netrc(str(path)).authenticators(host)


@pytest.mark.parametrize(
    ("host", "base_url", "expected"),
    [
        ("api.wandb.ai", None, "online"),
        ("example.org", None, "offline"),
        ("wandb.example.org", "https://wandb.example.org", "online"),
        ("api.wandb.ai", "https://wandb.example.org", "offline"),
        ("api.forge.coreweave.com", None, "online"),
        ("api.wandb.ai", "https://api.forge.coreweave.com", "online"),
    ],
)
@pytest.mark.parametrize("where", ["home", "NETRC"])
@pytest.mark.parametrize("host_set_in", ["environment", "settings"])
def test_a_netrc_entry_counts_for_the_host_that_would_be_asked(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    host: str, base_url: str | None, expected: str, where: str, host_set_in: str,
) -> None:  # fmt: skip
    path = home / ".netrc" if where == "home" else tmp_path / "elsewhere"
    write_netrc(path, host)
    if where == "NETRC":
        monkeypatch.setenv("NETRC", str(path))
    if base_url and host_set_in == "environment":
        monkeypatch.setenv("WANDB_BASE_URL", base_url)
    elif base_url:
        settings = home / ".config" / "wandb" / "settings"
        settings.parent.mkdir(parents=True)
        settings.write_text(f"[default]\nbase_url = {base_url}\n")
    assert wandb_mode(tracking("auto")) == expected


@pytest.mark.parametrize("content", ["machine", "\x00\x01", "machine api.wandb.ai login"])
def test_a_broken_netrc_or_settings_file_is_as_good_as_none(home: Path, content: str) -> None:
    (home / ".netrc").write_text(content)
    settings = home / ".config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text(content)
    assert wandb_mode(tracking("auto")) == "offline"


def environment() -> dict[str, str]:
    """For a run of its own, apart from W&B's service in this process, whose address is in $WANDB_SERVICE."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return kept | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, str]:
    """A real run of three steps by the command line, offline, with a key in the environment; its output."""
    folder = tmp_path_factory.mktemp("tracking")
    words = [
        "train", "objective=dpo", "calibration=on", "train.steps=3", "train.eval_every=2", "train.device=cpu",
        "data.train_pairs=64", "data.eval_pairs=16", "train.pairs_per_step=4", "name=a-run",
        f"run_dir={folder / 'run'}", "tracking.mode=offline", "tracking.group=a-group",
        "tracking.tags=[mine]", "tracking.project=a-project", "tracking.log_model=true",
        "train.evaluate=word_problems",
        "metrics.answers=2", "metrics.answer_tokens=4", "tracking.alert_below=100",
    ]  # fmt: skip
    env = environment() | {"WANDB_API_KEY": KEY, "RCPO_CACHE": str(folder / "cache")}
    done = forked.rcpo(*words, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    (said,) = done.stderr.splitlines()
    assert said.startswith("rcpo: warning: the held-out chosen responses are at ")
    assert said.endswith(" nats at step 2, below tracking.alert_below=100")
    return RunFolder(folder / "run"), done.stdout


@pytest.mark.timeout(300)
def test_wandb_has_every_number_of_both_files(finished: tuple[RunFolder, str]) -> None:
    run, _ = finished
    expected = by_step(run)
    assert sorted(expected) == [0, 1, 2, 3]
    assert {"train/loss", "eval/displacement/chosen", "band/lower"} <= set(expected[2])
    assert "downstream/arithmetic" in expected[3]
    rows = wandb_rows(Records(run))
    assert sorted(rows) == [0, 1, 2, 3]
    for step, row in expected.items():
        assert rows[step] == pytest.approx(row, rel=0, abs=0, nan_ok=True)


@pytest.mark.timeout(300)
def test_scores_that_are_asked_later_go_into_the_same_wandb_run(
    finished: tuple[RunFolder, str], tmp_path: Path
) -> None:
    """A copy of the run without scores, evaluated by hand: a file of the same id, whose one row is over step
    3 and behind it at W&B, where one start is there before. Asked again, nothing is new or sent."""
    run = RunFolder(tmp_path / "run")
    shutil.copytree(finished[0].path, run.path, ignore=shutil.ignore_patterns("wandb", "evaluation*"))
    (run.path / "wandb/run-before-x").mkdir(parents=True)
    env = environment() | {"RCPO_CACHE": str(tmp_path / "cache")}
    for _ in range(2):
        done = forked.rcpo("evaluate", str(run.path), "initial=no", cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
    records = Records(run)
    assert records.run["run_id"] == run.read_run()["wandb_id"]
    value = Results(run.path).of("final")["arithmetic"].main[1].value
    (row,) = records.history
    assert (row["_step"], row["step"], row["downstream/arithmetic"]) == (4, 3, value)


@pytest.mark.timeout(300)
def test_wandb_has_name_group_tags_and_the_whole_resolved_config(finished: tuple[RunFolder, str]) -> None:
    run, _ = finished
    record = Records(run).run
    assert (record["display_name"], record["run_group"], record["project"]) == (
        "a-run",
        "a-group",
        "a-project",
    )
    assert record["run_id"] == run.read_run()["wandb_id"]
    assert sorted(record["tags"]) == ["arithmetic", "calibration-on", "dpo", "mine", "tiny"]
    sent = {key: value for key, value in record["config"]["update"].items() if key != "_wandb"}
    assert sent == yaml.safe_load(run.config.read_text())


@pytest.mark.timeout(300)
def test_wandb_draws_everything_over_step_and_knows_how_the_run_ended(
    finished: tuple[RunFolder, str],
) -> None:
    run, _ = finished
    records = Records(run)
    assert records.metrics["*"] == "step"
    summary = run.read_run()["summary"]
    for key in ("end_chosen", "worst_chosen", "in_band_share"):
        assert summary[key] is not None
    sent = {
        key.removeprefix("summary/"): value for key, value in records.summary.items() if "summary/" in key
    }
    assert sent == {key: value for key, value in summary.items() if value is not None}
    assert records.exit_code == 0


@pytest.mark.timeout(300)
def test_the_last_step_has_the_held_out_pairs_as_a_table_and_as_a_plot_of_it(
    finished: tuple[RunFolder, str],
) -> None:
    run, _ = finished
    records = Records(run)
    last = records.history[-1]
    assert last["_step"] == 3
    assert last["pairs/held_out._type"] == last["pairs/displacement_table._type"] == "table-file"
    (file,) = run.path.glob(f"wandb/offline-run-*/files/{last['pairs/held_out.path']}")
    table = json.loads(file.read_text())
    assert table["columns"] == [
        "pair", "chosen_change", "rejected_change", "chosen_start", "rejected_start",
    ]  # fmt: skip
    start, end = run.load_pair_results(0), run.load_pair_results(3)
    expected = torch.stack([end.z_w - start.z_w, end.z_l - start.z_l, start.z_w, start.z_l], dim=1)
    assert [row[0] for row in table["data"]] == list(range(16))
    assert torch.equal(torch.tensor([row[1:] for row in table["data"]]), expected)
    assert run.read_run()["summary"]["end_chosen"] == pytest.approx(expected[:, 0].mean().item(), rel=1e-5)
    drawn = records.config["_wandb.visualize.pairs/displacement"]["panel_config"]
    assert drawn["fieldSettings"] == {"x": "rejected_change", "y": "chosen_change"}


@pytest.mark.timeout(300)
def test_every_evaluation_has_its_answers_as_a_table(finished: tuple[RunFolder, str]) -> None:
    run, _ = finished
    expected = [list(answer) for answer in read_answers(run)]
    rows = {row["_step"]: row for row in Records(run).history}
    tables = {step: row["answers.path"] for step, row in rows.items() if "answers.path" in row}
    assert sorted(tables) == [0, 2, 3]
    assert len(expected) == 6
    for step, path in tables.items():
        (file,) = run.path.glob(f"wandb/offline-run-*/files/{path}")
        table = json.loads(file.read_text())
        assert table["columns"] == ["step", "pair", "prompt", "initial", "now"]
        assert table["data"] == [answer for answer in expected if answer[0] == step]


@pytest.mark.timeout(300)
def test_an_alert_is_sent_once(finished: tuple[RunFolder, str]) -> None:
    """At the first evaluation behind the start, which is below 100 nats as the last one is."""
    (alert,) = Records(finished[0]).alerts
    assert (alert["title"], alert["level"]) == (ALERT, "WARN")
    assert alert["text"].startswith("a-run: the held-out chosen responses are at ")
    assert alert["text"].endswith(" nats at step 2, below tracking.alert_below=100")


@pytest.mark.timeout(300)
def test_every_metric_and_summary_of_the_dashboard_is_one_that_a_run_sends(
    finished: tuple[RunFolder, str],
) -> None:
    run, _ = finished
    records = Records(run)
    sent = {key for row in records.history for key in row}
    drawn = {key for plots in dashboard.SECTIONS.values() for plot in plots for key in plot.keys}
    assert drawn <= sent
    assert {f"summary/{name}" for name in dashboard.SUMMARY} <= set(records.summary)


@pytest.mark.timeout(300)
def test_the_final_model_is_an_artifact_where_it_was_asked_for(finished: tuple[RunFolder, str]) -> None:
    """What is to be uploaded later lies in the run folder, all of it."""
    run, _ = finished
    artifacts = Records(run).artifacts
    assert sorted(artifacts) == ["model", "run_table"]
    assert artifacts["model"]["name"] == f"model-{run.read_run()['wandb_id']}"
    sent = {entry["path"]: entry["local_path"] for entry in artifacts["model"]["manifest"]["contents"]}
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= set(sent)
    assert sent == {path.name: str(path) for path in run.final.iterdir()}
    (table,) = artifacts["run_table"]["manifest"]["contents"]
    assert Path(table["local_path"]).is_relative_to(run.path / "wandb")


@pytest.mark.timeout(300)
def test_no_file_of_the_run_holds_the_key_the_command_line_or_the_packages(
    finished: tuple[RunFolder, str],
) -> None:
    run, _ = finished
    files = [path for path in run.path.rglob("*") if path.is_file()]
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
    assert [path.name for path in files if path.name in ("wandb-metadata.json", "requirements.txt")] == []


@pytest.mark.timeout(300)
def test_the_report_says_how_to_send_it_and_stdout_is_ascii(finished: tuple[RunFolder, str]) -> None:
    run, output = finished
    assert output.isascii()
    assert "\x1b" not in output
    assert "[WARNING]" not in output
    (offline,) = run.path.glob("wandb/offline-run-*")
    assert f"wandb sync {offline}" in output
    assert output.startswith(
        "objective=dpo calibration=on  tiny on arithmetic: 64 training pairs, 16 held out"
    )


def made_run(tmp_path: Path) -> tuple[Config, RunFolder]:
    config = prepare(["train.device=cpu", f"run_dir={tmp_path / 'run'}"])
    assert config is not None
    run = RunFolder(tmp_path / "run")
    run.create(config, config_tree(config))
    return config, run


def feed(sink: WandbSink) -> None:
    sink.log_eval({"step": 0, "displacement/chosen": 0.0})
    for step in (1, 2):
        sink.log_step({"step": step, "train/loss": 0.5})
    sink.close({"end_chosen": -1.0, "worst_chosen": None}, 0)


def test_values_that_are_not_finite_reach_wandb_as_they_are(tmp_path: Path) -> None:
    config, run = made_run(tmp_path)
    sink = WandbSink(config, run, "offline")
    sink.log_step({"step": 1, "band/lower": -math.inf, "band/upper": math.inf, "dynamics/pathway": math.nan})
    sink.close({}, 0)
    ((step, row),) = wandb_rows(Records(run)).items()
    assert step == 1
    assert (row["band/lower"], row["band/upper"]) == (-math.inf, math.inf)
    assert math.isnan(row["dynamics/pathway"])


def test_wandb_failing_in_the_middle_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The W&B run's own log raises at the second row, as it does when its service has died."""
    config, run = made_run(tmp_path)
    sink = WandbSink(config, run, "offline")
    wait_for_start()
    log = wandb.Run.log

    def dies(self: wandb.Run, row: dict[str, Any], step: int) -> None:
        if step == 1:
            raise BrokenPipeError("the service is gone\nand more")
        log(self, row, step=step)

    started = wandb.run
    monkeypatch.setattr(wandb.Run, "log", dies)
    feed(sink)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        "W&B failed (BrokenPipeError: the service is gone); going on without it; "
        "metrics.jsonl and eval.jsonl have every row"
    ]
    assert started is not None
    started.finish()


def test_wandb_failing_at_the_start_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """W&B refuses a run id with slashes, which a run.json that someone edited could hold."""
    config, run = made_run(tmp_path)
    run.update_run(wandb_id="not/an/id")
    feed(WandbSink(config, run, "offline"))
    (message,) = [record.getMessage() for record in caplog.records if record.name == "rcpo.monitor.tracking"]
    assert message.startswith("W&B failed (")
    assert message.endswith("; going on without it; metrics.jsonl and eval.jsonl have every row")


def test_a_table_or_a_model_that_cannot_be_sent_is_one_warning_and_the_rest_is_sent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The results of the pairs have been deleted; a run whose model was not asked for has no artifact."""
    config, run = made_run(tmp_path)
    sink = WandbSink(config, run, "offline")
    sink.log_eval({"step": 0, "displacement/chosen": 0.0})
    sink.close({"start_step": 0, "end_step": 1, "end_chosen": -1.0}, 0)
    (message,) = [record.getMessage() for record in caplog.records if record.name == "rcpo.monitor.tracking"]
    assert message.startswith("W&B failed (FileNotFoundError: ")
    assert message.endswith("; the table of held-out pairs is not sent; RUN/eval/ has it")
    records = Records(run)
    assert (records.summary["summary/end_chosen"], records.exit_code, records.artifacts) == (-1.0, 0, {})


UNREACHABLE = """
import sys
import rcpo.cli, rcpo.monitor.tracking
rcpo.monitor.tracking.INIT_TIMEOUT_SECONDS = 2.0
rcpo.cli.main(sys.argv[1:])
"""


@pytest.mark.timeout(300)
def test_a_server_that_cannot_be_reached_means_offline_with_one_warning(tmp_path: Path) -> None:
    """Nothing listens on port 9 of this host. The run ends well, and all its rows are in the offline file."""
    words = [
        "train", "train.steps=2", "train.device=cpu", "data.train_pairs=16", "data.eval_pairs=8",
        "train.pairs_per_step=4", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    env = environment() | {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = forked.script(UNREACHABLE, *words, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("wandb: ")]
    assert len(lines) == 1, lines
    (warning,) = lines
    assert warning.startswith("rcpo: warning: W&B failed (")
    assert warning.endswith("; tracking offline")
    run = RunFolder(tmp_path / "run")
    assert sorted(wandb_rows(Records(run))) == [0, 1, 2]
    assert [
        path for path in run.path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()
    ] == []
