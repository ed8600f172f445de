"""Several ranks as a user starts, interrupts and loses them: the real CLI, signals by process id, no process
left."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from helpers import forked
from rcpo.common.errors import UserError
from rcpo.launch.processes import FAULT_FILE, Fault, _Ranks
from rcpo.launch.start import resume
from rcpo.runs.folder import RunFolder

ENDLESS = ["train.steps=100000", "train.save_every=5", "train.eval_every=0"]
TRAIN = [
    sys.executable, "-m", "rcpo.cli", "train", "tracking=none", "train.pairs_per_step=4",
    "data.train_pairs=64", "data.eval_pairs=8", "train.device=cpu",
]  # fmt: skip
SECONDS_TO_START = 120
REST = pytest.mark.ci("real processes")


def processes_of(run_dir: Path) -> dict[int, str]:
    """Pid and command line of every process that names the run folder."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if any(str(run_dir).encode() in word for word in words):
                found[int(entry.name)] = b" ".join(words).decode()
    return found


def pid_of_rank(run_dir: Path, rank: int) -> int:
    for pid, command in processes_of(run_dir).items():
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if "rcpo.launch.worker" in command and f"RANK={rank}".encode() in environment:
            return pid
    raise AssertionError(f"no rank {rank} runs")


@contextmanager
def started(words: list[str], run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """`rcpo train WORDS` into `run_dir`; whatever it has started is ended at the end."""
    process = subprocess.Popen(
        [*TRAIN, *words, f"run_dir={run_dir}"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=_hear_sigint,
    )  # fmt: skip
    try:
        yield process
    finally:
        for pid in processes_of(run_dir):
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.communicate()


def _hear_sigint() -> None:
    """As at a terminal: tests that a shell runs in the background inherit a SIGINT that is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for_steps(run: RunFolder, process: subprocess.Popen[str], num_steps: int) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while not run.metrics.is_file() or run.metrics.read_bytes().count(b"\n") < num_steps:
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_none(run_dir: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while processes_of(run_dir):
        assert time.monotonic() < deadline, processes_of(run_dir)
        time.sleep(0.05)


@REST
@pytest.mark.timeout(400)
def test_a_rank_that_dies_ends_the_run_and_resume_finishes_it(tmp_path: Path) -> None:
    """SIGKILL of rank 1: soon (a few seconds on an idle machine) exit code 1, one line with the rank and its
    log, run.json says failed, no process stays. `rcpo resume` then does the steps from the newest checkpoint
    on."""
    run = RunFolder(tmp_path / "run")
    words = ["launch.processes=2", "train.steps=60", "train.save_every=5", "train.eval_every=0"]
    with started(words, run.path) as process:
        wait_for_steps(run, process, 7)
        os.kill(pid_of_rank(run.path, 1), signal.SIGKILL)
        killed = time.monotonic()
        _, stderr = process.communicate(timeout=30)
        assert time.monotonic() - killed < 30
        assert process.returncode == 1
        wait_for_none(run.path, 1)
    said = [line for line in stderr.splitlines() if line.startswith("rcpo: ")]
    assert said == [f"rcpo: rank 1 was ended by signal 9 (SIGKILL); its log is {run.logs / 'rank-0001.log'}"]
    assert "Traceback" not in stderr
    state = run.read_run()
    assert (state["status"], state["exit_reason"]) == ("failed", "rank 1 was ended by signal 9 (SIGKILL)")
    done = forked.rcpo("resume", run.path, cwd=tmp_path, seconds=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["step"] for row in run.rows(run.metrics)] == list(range(1, 61))
    finished = run.read_run()
    assert (finished["status"], finished["exit_reason"]) == ("done", None)
    assert (finished["wandb_id"], finished["num_resumed"]) == (state["wandb_id"], 1)
    assert (run.final / "model.safetensors").is_file()
    assert [path.name for path in sorted(run.logs.iterdir())] == ["rank-0000.log", "rank-0001.log"]


@pytest.mark.timeout(300)
@REST
def test_ctrl_c_interrupts_the_run(tmp_path: Path) -> None:
    """Exit code 130, one line that names `rcpo resume`, run.json says interrupted."""
    run = RunFolder(tmp_path / "run")
    with started(["launch.processes=2", *ENDLESS], run.path) as process:
        wait_for_steps(run, process, 2)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=25)
        assert process.returncode == 130, stderr[-3000:]
        wait_for_none(run.path, 1)
    assert words_of(stderr) == [
        f"rcpo: interrupted; `rcpo resume {run.path}` continues from the newest checkpoint"
    ]
    state = run.read_run()
    assert (state["status"], state["exit_reason"]) == ("interrupted", "SIGINT")


@pytest.mark.timeout(300)
@REST
@pytest.mark.parametrize(("processes", "number"), [(1, signal.SIGTERM), (2, signal.SIGUSR2)])
def test_a_scheduler_s_signal_checkpoints_and_stops_all_ranks(
    tmp_path: Path, processes: int, number: signal.Signals
) -> None:
    """Exit code 75, run.json says preempted, one line; without train.save_every there is the one checkpoint
    of the last step done, and `rcpo resume` goes on from there, for 3 steps more."""
    run = RunFolder(tmp_path / "run")
    words = [f"launch.processes={processes}", "train.steps=100000", "train.eval_every=0"]
    with started(words, run.path) as process:
        wait_for_steps(run, process, 2)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 75, stderr[-3000:]
        wait_for_none(run.path, 1)
    done = len(run.rows(run.metrics))
    line = (
        f"stopped by {number.name} after step {done} of 100000, with a checkpoint; "
        f"`rcpo resume {run.path}` goes on"
    )
    assert words_of(stderr) == [f"rcpo: {line}"]
    state = run.read_run()
    assert (state["status"], state["exit_reason"]) == ("preempted", line)
    assert [path.name for path in run.checkpoints.iterdir()] == [f"step-{done:06d}"]
    finished = forked.rcpo("resume", run.path, "--allow-change", f"train.steps={done + 3}", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert [row["step"] for row in run.rows(run.metrics)] == list(range(1, done + 4))
    assert run.read_run()["status"] == "done"


@REST
@pytest.mark.timeout(300)
def test_a_signal_before_the_first_step_stops_at_once(tmp_path: Path) -> None:
    """While the reference pass runs there is nothing to save: exit code 75, preempted, and a later resume
    starts from the first step."""
    run = RunFolder(tmp_path / "run")
    words = ["launch.processes=2", "data.train_pairs=9000", "train.steps=5000", "train.eval_every=0"]
    with started(words, run.path) as process:
        deadline = time.monotonic() + SECONDS_TO_START
        log = run.logs / "rank-0001.log"
        while not (log.is_file() and "trainable parameters" in log.read_text()):
            assert process.poll() is None, process.communicate()[1][-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=40)
        assert process.returncode == 75, stderr[-3000:]
        wait_for_none(run.path, 1)
    assert words_of(stderr) == ["rcpo: stopped by SIGTERM before the first step"]
    assert run.read_run()["status"] == "preempted"
    assert not run.metrics.exists()


def words_of(stderr: str) -> list[str]:
    """rcpo's own lines, of which none is a traceback."""
    assert "Traceback" not in stderr
    return [line for line in stderr.splitlines() if line.startswith("rcpo: ")]


@REST
@pytest.mark.timeout(300)
def test_ranks_do_not_outlive_their_launcher(tmp_path: Path) -> None:
    """SIGKILL of the process that the user started: both ranks end within seconds by themselves."""
    run = RunFolder(tmp_path / "run")
    with started(["launch.processes=2", *ENDLESS], run.path) as process:
        wait_for_steps(run, process, 2)
        assert len(processes_of(run.path)) >= 3
        process.kill()
        process.wait()
        wait_for_none(run.path, 5)


@pytest.mark.ci("torchrun")
@pytest.mark.timeout(300)
def test_ranks_of_torchrun_join_one_run(tmp_path: Path) -> None:
    """2 ranks by torchrun: one run folder, a log each, no second launcher; another number of ranks cannot
    resume it."""
    run = RunFolder(tmp_path / "run")
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m",
        "rcpo.cli",
    ]  # fmt: skip
    words = [*TRAIN[3:], "train.steps=3", "train.save_every=2", "deepspeed.stage=2", f"run_dir={run.path}"]
    done = subprocess.run([*torchrun, *words], capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["step"] for row in run.rows(run.metrics)] == [1, 2, 3]
    assert (run.read_run()["world_size"], run.read_run()["status"]) == (2, "done")
    assert [path.name for path in sorted(run.logs.iterdir())] == ["rank-0000.log", "rank-0001.log"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    run.update_run(status="failed")
    torchrun[4] = "1"
    done = subprocess.run(
        [*torchrun, "resume", str(run.path)], capture_output=True, text=True, timeout=200, cwd=tmp_path
    )
    assert done.returncode != 0
    assert f"rcpo: {run.path}: is a run of 2 ranks; start that many, not 1" in done.stderr.splitlines()


def test_the_fault_that_came_first_is_the_cause(tmp_path: Path) -> None:
    """Rank 0 lost its connection because rank 2 had failed before: rank 2 is named, though it still runs; a
    rank ended by a signal comes before all, since it could say nothing."""
    ranks = _Ranks(RunFolder(tmp_path), 3, False, tmp_path)
    (tmp_path / "0").write_text(json.dumps({"time": 20.0, "reason": "failed (connection)", "exit_code": 1}))
    (tmp_path / "2").write_text(json.dumps({"time": 10.0, "reason": "failed (cause)", "exit_code": 2}))
    ranks.processes = [subprocess.Popen([sys.executable, "-c", code]) for code in ("exit(1)", "", "input()")]
    ranks.processes[0].wait()
    ranks.processes[1].wait()
    try:
        assert ranks.faults() == [
            Fault(10.0, 2, "failed (cause)", 2), Fault(20.0, 0, "failed (connection)"),
        ]  # fmt: skip
    finally:
        ranks.end()
    ranks.processes[1] = subprocess.Popen([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    ranks.processes[1].wait()
    assert [fault.rank for fault in ranks.faults()][:2] == [1, 2]
    assert ranks.faults()[0].reason == "was ended by signal 9 (SIGKILL)"


@pytest.mark.timeout(100)
def test_a_started_rank_tells_why_it_failed(tmp_path: Path) -> None:
    """`python -m rcpo.launch.worker` on a folder that is no run, as a started rank: exit code 2, nothing
    printed, the reason in its fault file."""
    env = os.environ | {FAULT_FILE: str(tmp_path / "fault")}
    command = [sys.executable, "-m", "rcpo.launch.worker", str(tmp_path / "none")]
    with subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.wait(timeout=95) == 2
        assert process.stderr is not None
        assert "rcpo:" not in process.stderr.read()
    fault = json.loads((tmp_path / "fault").read_text())
    assert fault["exit_code"] == 2
    assert re.match(rf"{tmp_path}/none: is not a run folder", fault["reason"])


def test_a_run_of_several_nodes_is_not_resumed_on_one_host(tmp_path: Path) -> None:
    """Its 2 ranks would all be started here: refused with what to type."""
    from helpers.cases import Case, Layout, make_config, make_run, write_inputs

    write_inputs(tmp_path)
    config = make_config(tmp_path, tmp_path / "run", Case("dpo", "off", "llama", "sgd"), Layout(1, 8))
    run = make_run(config)
    run.config.write_text(run.config.read_text().replace("nodes: 1", "nodes: 2"))
    run.update_run(config=yaml.safe_load(run.config.read_text()))
    with pytest.raises(UserError, match="was trained on 2 nodes; start `rcpo resume` on each with torchrun"):
        resume(str(run.path))
