"""Sweeps on a real SLURM: six virtual nodes on this machine (`slurm_cluster`), real cells, faults injected.

All scenarios run at once, each in a thread of the fixture `played`, because a rank takes seconds to start;
the tests then look at what came of them. Run alone: pytest tests/ci/test_slurm.py -v
"""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from helpers.slurm_cluster import CPUS, Cluster
from helpers.slurm_stage import NUM_STEPS, Stage, Sweep, comparable, events, said
from rcpo.cli import dispatch
from rcpo.sweep.folder import SweepFolder
from rcpo.sweep.slurm import submit as slurm
from rcpo.sweep.states import CellStatus, State

pytestmark = pytest.mark.ci("SLURM", needs="slurm")

MAX_ARRAY_SIZE = 3
ONE_RANK = {"time": "00:10:00", "processes": "1", "mem": "1000M"}
HOSTILE = 'it\'s $(touch PWNED) `touch PWNED` %j; "touch PWNED" ü #'


# The scenarios. Each returns the sweep or sweeps that its tests look at.


def play_grid(stage: Stage) -> tuple[Sweep, dict[str, Any]]:
    """2 x 2 cells of 2 ranks on two nodes each, submitted by the real command from inside a job, to a folder
    with a hostile name, in arrays of at most three, two cells at a time."""
    file, profile = stage.write(
        "grid",
        ONE_RANK | {"nodes": "2", "sbatch": ["--nodelist=n[0-1]"]},
        axes={"objective": ["dpo", "simpo"], "calibration": ["off", "on"]},
    )
    out = stage.folder / HOSTILE
    words = ["sweep", str(file), "--slurm", str(profile), "--out", str(out), "--max-parallel", "2"]
    command = shlex.join([sys.executable, "-m", "rcpo.cli", *words])
    leaks = "RANK=5 WORLD_SIZE=7 LOCAL_RANK=5 MASTER_ADDR=nowhere MASTER_PORT=1 SBATCH_PARTITION=none"
    script = f"cd {shlex.quote(str(stage.folder))} && export {leaks} && {command} >grid.out 2>grid.err"
    job = stage.cluster.run(
        "sbatch", "--parsable", "--wait", "--nodes=1", "--nodelist=n1", "--output=/dev/null", "--wrap", script
    ).strip()
    sweep = Sweep(SweepFolder(out), stage)
    arrays = [item["job"] for item in json.loads(sweep.folder.slurm.read_text())["submissions"]]
    shown = [stage.cluster.run("scontrol", "--oneliner", "show", "job", array) for array in arrays]
    again = sweep.submit()
    sweep.wait_for(State.DONE)
    return sweep, {"job": job, "arrays": arrays, "shown": shown, "again": again}


def play_preemption(stage: Stage) -> tuple[Sweep, Sweep]:
    """One config twice, on all of two nodes: the one that runs is preempted by the other."""
    profile = ONE_RANK | {"nodes": "2", "cpus_per_task": str(CPUS), "sbatch": ["--nodelist=n[2-3]"]}
    preempted = stage.freeze("preempted", profile, axes={"seed": [0]})
    undisturbed = stage.freeze("undisturbed", profile | {"partition": "urgent"}, axes={"seed": [0]})
    preempted.submit()
    preempted.wait_for_rows("seed0")
    preempted.send("seed0", signal.SIGSTOP)  # SLURM sends SIGCONT before SIGTERM
    undisturbed.submit_by_hand()
    undisturbed.wait_for(State.DONE)
    preempted.wait_for(State.DONE)
    return preempted, undisturbed


def play_crash(stage: Stage) -> tuple[Sweep, dict[str, CellStatus], dict[str, int]]:
    """Two cells of two ranks on one node: of one a rank is killed, the data of the other are not there. Both
    are submitted again when that is mended."""
    data = stage.folder / "pairs.jsonl"
    pairs = [
        {
            "prompt": f"what is {number} ?",
            "chosen": f"it is {'right ' * idx}.",
            "rejected": f"it is {number} .",
        }
        for idx, number in enumerate(("one", "two", "three", "four") * 6)
    ]
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    sweep = stage.freeze(
        "crash",
        {"time": "00:10:00", "processes": "2", "mem": "1000M", "sbatch": ["--nodelist=n0"]},
        axes={"data": ["arithmetic", {"label": "missing", "overrides": ["data=file", f"data.path={data}"]}]},
    )
    data.rename(data.with_suffix(".away"))
    sweep.submit()
    sweep.wait(lambda: sweep.num_rows("arithmetic") >= 45, "45 steps", may_fail=True)
    os.kill(sweep.ranks("arithmetic")[1], signal.SIGKILL)
    sweep.wait_for_no_job()
    failed = sweep.statuses()
    steps = {"arithmetic": sweep.num_rows("arithmetic")}
    data.with_suffix(".away").rename(data)
    with said():
        assert dispatch(["resume", str(sweep.folder.path)]) == 0
    sweep.wait_for(State.DONE, may_fail=True)
    return sweep, failed, steps


def play_time_limit(stage: Stage) -> Sweep:
    """A cell that its time limit stops: the limit is set when it trains, and its rank is paused until SLURM
    has asked it to stop."""
    sweep = stage.freeze(
        "limit",
        ONE_RANK | {"signal_seconds": "10"},
        overrides=["tracking=wandb", "tracking.mode=offline"],
        axes={"seed": [0]},
    )
    submitted = time.monotonic()
    sweep.submit()
    sweep.wait_for_rows("seed0")
    sweep.send("seed0", signal.SIGSTOP)
    minutes = int(time.monotonic() - submitted + 30) // 60 + 1  # at least half a minute from now
    job = slurm.jobs_of_sweep(sweep.folder)[0].id
    stage.cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
    sweep.wait(lambda: "SIGUSR2: asks" in sweep.log("seed0"), "SLURM asks the cell to stop")
    sweep.send("seed0", signal.SIGCONT)
    sweep.wait_for(State.DONE)
    return sweep


def play_cancel(stage: Stage) -> tuple[Sweep, dict[str, CellStatus], list[str]]:
    """Two cells: all processes of one are killed with its batch script, `rcpo cancel` ends the other."""
    sweep = stage.freeze("cancel", ONE_RANK, overrides=["train.steps=100000"], axes={"seed": [0, 1]})
    sweep.submit()
    for name in ("seed0", "seed1"):
        sweep.wait_for_rows(name)
    jobs = {name: slurm.jobs_of_sweep(sweep.folder)[idx].id for idx, name in enumerate(("seed0", "seed1"))}
    stage.cluster.kill_task(jobs["seed0"])
    sweep.wait(lambda: not sweep.statuses()["seed0"].queued, "the job is gone")
    with said() as text:
        assert dispatch(["cancel", str(sweep.folder.path)]) == 0
    return sweep, sweep.statuses(), [*jobs.values(), text.getvalue()]


def play_lost_node(stage: Stage) -> tuple[Sweep, list[str]]:
    """The node of a cell loses its power; there is another one."""
    sweep = stage.freeze("lost", ONE_RANK | {"constraint": "spare"}, axes={"seed": [0]})
    sweep.submit()
    sweep.wait_for_rows("seed0", 45)
    node = sweep.statuses()["seed0"].node
    assert node is not None
    stage.cluster.lose_node(node)
    sweep.wait_for(State.DONE)
    last = re.findall(r"starts: (\S+),", sweep.log("seed0"))
    stage.cluster.start_node(node)
    return sweep, [node, *last]


def play_growth(stage: Stage) -> tuple[Sweep, list[str], list[bytes]]:
    """Two short cells that end, then a file with one more value, by the same command both times; what it
    said, and the configs and rows of the first two before and after."""
    file, profile = stage.write("growth", ONE_RANK, overrides=["train.steps=3"], axes={"seed": [0, 1]})
    out, texts = stage.folder / "sweeps/growth", []

    def submit() -> Sweep:
        with said() as text:
            assert dispatch(["sweep", str(file), "--slurm", str(profile), "--out", str(out)]) == 0
        texts.append(text.getvalue())
        sweep = Sweep(SweepFolder(out), stage)
        sweep.wait_for(State.DONE)
        return sweep

    def first_two() -> bytes:
        runs = [sweep.run(name) for name in ("seed0", "seed1")]
        return b"".join(run.config.read_bytes() + run.metrics.read_bytes() for run in runs)

    sweep = submit()
    before = first_two()
    file.write_text(file.read_text().replace("- 1\n", "- 1\n  - 2\n"))
    sweep = submit()
    return sweep, texts, [before, first_two()]


SCENARIOS: dict[str, Callable[[Stage], Any]] = {
    "limit": play_time_limit,  # the one that takes longest starts first
    "lost node": play_lost_node,
    "grid": play_grid,
    "preemption": play_preemption,
    "crash": play_crash,
    "cancel": play_cancel,
    "growth": play_growth,
}


NUM_PORTS_TAKEN = 60
"""Jobs whose first port is taken: more than there are."""


def first_port(job: int) -> int:
    return 20000 + job % 1500 * 8


class Played:
    """What the scenarios return, or raise."""

    def __init__(self, stage: Stage, futures: dict[str, "Future[Any]"]) -> None:
        self.stage, self._futures = stage, futures

    def __getitem__(self, name: str) -> Any:
        return self._futures[name].result()


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    folder = tmp_path_factory.mktemp("slurm")
    cluster = Cluster(folder / "cluster", num_nodes=4, spare=2, max_array_size=MAX_ARRAY_SIZE)
    stage = Stage(cluster, folder)
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            patch.delenv(name, raising=False)
        patch.setenv("SLURM_CONF", str(cluster.conf))
        patch.setenv("RCPO_CACHE", str(folder / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        stack.callback(cluster.stop)
        cluster.start()
        for job in range(1, NUM_PORTS_TAKEN):
            with contextlib.suppress(OSError):  # somebody else has taken it
                stranger = stack.enter_context(socket.socket())
                stranger.bind(("127.0.0.1", first_port(job)))
                stranger.listen()
        pool = stack.enter_context(ThreadPoolExecutor(len(SCENARIOS)))
        futures = {name: pool.submit(play, stage) for name, play in SCENARIOS.items()}
        for future in futures.values():
            future.exception()  # waits
        yield Played(stage, futures)


def test_a_grid_runs_as_arrays_of_two_node_cells(played: Played) -> None:
    """4 cells of 2 ranks, one on each node; MaxArraySize is 3, so two arrays, the second after the first."""
    sweep, facts = played["grid"]
    for cell in sweep.folder.read_cells():
        run = sweep.run(cell.name)
        assert [row["step"] for row in run.rows(run.metrics)] == list(range(1, NUM_STEPS + 1))
        assert (run.read_run()["world_size"], run.read_run()["num_resumed"]) == (2, 0)
        assert [path.name for path in sorted(run.logs.glob("rank-*"))] == ["rank-0000.log", "rank-0001.log"]
        assert events(sweep.log(cell.name)) == ["starts: n[0-1], restart 0", "ends: done"]
    first, second = facts["shown"]
    assert "ArrayTaskThrottle=2" in first
    assert f"afterany:{facts['arrays'][0]}" in second
    assert facts["again"].splitlines()[0] == "left alone: 4 queued or running"


def test_a_hostile_name_and_an_environment_of_another_job_do_no_harm(played: Played) -> None:
    """The grid was submitted from inside a job, with rank variables and SBATCH_PARTITION set, to a folder
    whose name holds quotes and substitutions."""
    sweep, facts = played["grid"]
    assert sweep.folder.path.name == HOSTILE
    assert not list(played.stage.folder.rglob("PWNED"))
    assert not Path("PWNED").exists()
    assert facts["job"] not in facts["arrays"]
    assert "submitted 3 cells as job" in (played.stage.folder / "grid.out").read_text()


def test_no_secret_and_nothing_of_the_submitting_job_is_in_the_script(played: Played) -> None:
    sweep, _ = played["grid"]
    script = sweep.folder.submit.read_text()
    assert "nowhere" not in script
    assert not re.search(r"WANDB_API_KEY=|SLURM_JOB_ID=", script)


def test_cells_on_one_node_never_share_a_port(played: Played) -> None:
    """Cells of several sweeps ran on n0 at the same time, each start at a port of its own, and not at the
    first of its job, where a stranger listens."""
    grid, _ = played["grid"]
    crash, _, _ = played["crash"]
    preempted, undisturbed = played["preemption"]
    ports = []
    for sweep in (grid, crash, preempted, undisturbed):
        for path in sweep.folder.logs.glob("*.log"):
            starts = re.findall(r"^== \S+ \S+ (\S+) ranks meet at \S+:(\d+)$", path.read_text(), flags=re.M)
            ports += sorted(set(starts))
    assert len(ports) >= 8
    assert len({port for _, port in ports}) == len({task for task, _ in ports})
    assert not {int(port) for _, port in ports} & {first_port(job) for job in range(1, NUM_PORTS_TAKEN)}


def test_a_preempted_cell_ends_as_an_undisturbed_one(played: Played) -> None:
    """Stopped by SIGTERM in SLURM's grace time, requeued by its script, and continued: the same rows, bit for
    bit but for times; the same W&B id."""
    preempted, undisturbed = played["preemption"]
    assert events(preempted.log("seed0")) == [
        "starts: n[2-3], restart 0", "ends: requeued", "starts: n[2-3], restart 1", "ends: done",
    ]  # fmt: skip
    assert events(undisturbed.log("seed0")) == ["starts: n[2-3], restart 0", "ends: done"]
    run, other = preempted.run("seed0"), undisturbed.run("seed0")
    assert comparable(run) == comparable(other)
    assert run.read_run()["num_resumed"] == 1
    assert preempted.frozen_ids["seed0"] == run.read_run()["wandb_id"]


def test_a_crashed_cell_shows_why_and_finishes_after_resume(played: Played) -> None:
    """A killed rank and missing data: failed, not requeued, one line of reason; then done, with every step
    once."""
    sweep, failed, _ = played["crash"]
    assert {name: status.state for name, status in failed.items()} == {
        "arithmetic": State.FAILED, "missing": State.FAILED,
    }  # fmt: skip
    assert "pairs.jsonl" in (failed["missing"].reason or "")
    assert failed["arithmetic"].reason
    for name, ending in (("arithmetic", "ends: failed"), ("missing", "ends: failed")):
        starts = events(sweep.log(name))
        assert [line.split(",")[0] for line in starts[::2]] == ["starts: n0", "starts: n0"]
        assert "restart 0" in starts[2]
        assert starts[1].startswith(ending)
        run = sweep.run(name)
        assert [row["step"] for row in run.rows(run.metrics)] == list(range(1, NUM_STEPS + 1))


def test_a_time_limit_is_a_checkpoint_and_a_requeue(played: Played) -> None:
    """All starts belong to one W&B run, and its first file has every step up to the first stop; on a busy
    machine the 150 steps need more than two."""
    sweep = played["limit"]
    limits = sweep.log("seed0").count("ends: requeued")
    assert 1 <= limits <= 4
    assert [line.split(",")[-1] for line in events(sweep.log("seed0"))] == [
        event for start in range(limits) for event in (f" restart {start}", "ends: requeued")
    ] + [f" restart {limits}", "ends: done"]  # fmt: skip
    run = sweep.run("seed0")
    assert [row["step"] for row in run.rows(run.metrics)] == list(range(1, NUM_STEPS + 1))
    wandb_id = sweep.frozen_ids["seed0"]
    assert run.read_run()["wandb_id"] == wandb_id
    files = sorted(run.path.glob("wandb/offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{wandb_id}.wandb"] * (1 + limits)
    stopped = re.findall(r"stopped by SIGUSR2 after step (\d+) of 150", sweep.log("seed0"))
    assert len(stopped) == limits
    assert files[0].read_bytes().count(b"train/grad_norm") >= int(stopped[0])


def test_cancel_ends_exactly_its_jobs(played: Played) -> None:
    """The killed cell is lost, the cancelled one has a checkpoint; neither is requeued, and no other job was
    cancelled."""
    sweep, statuses, (_, cancelled, text) = played["cancel"]
    assert (statuses["seed0"].state, statuses["seed0"].reason) == (State.LOST, "ended without a word")
    assert statuses["seed1"].state is State.PREEMPTED
    assert (statuses["seed1"].reason or "").startswith("cancelled")
    assert text == "cancelled 1 jobs\n"
    assert list(sweep.run("seed1").checkpoints.glob("step-*"))
    assert not any(status.queued for status in statuses.values())
    jobs = played.stage.cluster.run("squeue", "--array", "-h", "-t", "cancelled", "-o", "%F_%K").split()
    assert sorted(jobs) == [cancelled]


def test_a_sweep_that_grows_submits_its_new_cell_alone(played: Played) -> None:
    """The second submission is an array of one; the two that are done keep names, configs and rows."""
    sweep, (first, second), (before, after) = played["growth"]
    assert "submitted 2 cells" in first
    assert "3 cells" in second
    assert "1 of them new" in second
    assert "submitted 1 cell as" in second
    assert "left alone: 2 done" in second
    assert [cell.name for cell in sweep.folder.read_cells()] == ["seed0", "seed1", "seed2"]
    assert after == before
    for name in ("seed0", "seed1", "seed2"):
        assert [line.split(": ")[-1] for line in events(sweep.log(name))[1:]] == ["done"]
        assert sweep.num_rows(name) == 3


def test_a_lost_node_costs_the_steps_since_the_checkpoint(played: Played) -> None:
    """SLURM starts the cell again on the other node, where it goes on from step 40."""
    sweep, (lost, first, second) = played["lost node"]
    assert (first, second) == (lost, {"n4": "n5", "n5": "n4"}[lost])
    run = sweep.run("seed0")
    assert [row["step"] for row in run.rows(run.metrics)] == list(range(1, NUM_STEPS + 1))
    assert events(sweep.log("seed0"))[-2:] == [f"starts: {second}, restart 1", "ends: done"]


def test_status_speaks_to_programs(played: Played) -> None:
    """The real command, on a sweep of SLURM."""
    sweep, _, _ = played["cancel"]
    done = subprocess.run(
        [sys.executable, "-m", "rcpo.cli", "status", str(sweep.folder.path), "--json"],
        env=played.stage.cluster.env, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    cells = {cell["name"]: cell for cell in json.loads(done.stdout)["cells"]}
    assert [cells[name]["state"] for name in ("seed0", "seed1")] == ["lost", "preempted"]
    assert cells["seed1"]["step"] >= 3
