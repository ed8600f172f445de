"""The fork server itself: its children are what real processes are, and none stays."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers import ROOT, forked
from helpers.same_run import final_weights, metrics
from rcpo.runs.folder import RunFolder

WORDS = [
    "train", "objective=bco", "calibration=exact", "calibration.warmup_steps=3", "train.steps=4",
    "train.pairs_per_step=4", "train.pairs_per_device=2", "data.train_pairs=16", "data.eval_pairs=4",
    "train.save_every=2", "deepspeed.stage=2", "tracking=none", "train.device=cpu",
]  # fmt: skip


@pytest.mark.ci("real processes")
def test_forked_ranks_give_the_bits_of_real_ones(tmp_path: Path) -> None:
    """`rcpo train`, of two ranks by a real launcher and real ranks, and by forks: the same words, rows,
    evaluations and weights."""
    words = [*WORDS, "launch.processes=2"]
    real, fork = (RunFolder(tmp_path / name) for name in ("real", "fork"))
    done = subprocess.run(
        [sys.executable, "-m", "rcpo.cli", *words, f"run_dir={real.path}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    child = forked.rcpo(*words, f"run_dir={fork.path}", cwd=tmp_path)
    assert (done.returncode, child.returncode) == (0, 0), done.stderr + child.stderr
    assert child.stderr == done.stderr
    assert repr(metrics(fork)) == repr(metrics(real))
    assert fork.eval.read_bytes() == real.eval.read_bytes()
    expected = final_weights(real)
    assert all(torch.equal(weight, expected[name]) for name, weight in final_weights(fork).items())
    assert sorted(path.name for path in fork.path.rglob("*")) == sorted(
        path.name for path in real.path.rglob("*")
    )


STARTS_ANOTHER = """
import os, subprocess, sys, time
other = subprocess.Popen(["sleep", "600"])
print(os.getpid(), other.pid, flush=True)
time.sleep(600)
"""


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_child_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    forked.script("", cwd=tmp_path)  # the server has started
    with pytest.raises(AssertionError, match=r"not done within 1 s"):
        forked.script(STARTS_ANOTHER, cwd=tmp_path, seconds=1, output=tmp_path / "said")
    pids = [int(word) for word in (tmp_path / "said").read_text().split()]
    assert len(pids) == 2
    assert not any(map(is_there, pids))


def test_no_child_outlives_its_client(tmp_path: Path) -> None:
    """A server of its own, whose client goes as a killed pytest does: without a word."""
    code = (
        "import time; from helpers import forked\n"
        "print(forked.ForkServer(light=True).start('time:sleep', 600).started(), flush=True); time.sleep(600)"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    client = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env)
    assert client.stdout is not None
    child = int(client.stdout.readline())
    assert is_there(child)
    client.kill()
    client.wait()
    deadline = time.monotonic() + 10
    while is_there(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_exit_code_is_the_interpreters(tmp_path: Path) -> None:
    def code_of(script: str) -> tuple[int, str]:
        done = forked.script(script, cwd=tmp_path)
        return done.returncode, done.stderr

    assert code_of("") == (0, "")
    assert code_of("raise SystemExit") == (0, "")
    assert code_of("raise SystemExit(75)") == (75, "")
    assert code_of("raise SystemExit('a word')") == (1, "a word\n")
    assert code_of("import os; os.kill(os.getpid(), 9)") == (-9, "")
    code, said = code_of("1 / 0")
    assert code == 1
    assert said.endswith("ZeroDivisionError: division by zero\n")
