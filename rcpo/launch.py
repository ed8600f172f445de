"""From a resolved config to running ranks: in this process, in processes started here, or joined to what
torchrun or srun started.

Owns the order "check everything, make the run folder, start", and ending all ranks when one fails. Called by
`rcpo.commands.train` and `rcpo.commands.resume`.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from rcpo.config.schema import Config
from rcpo.distributed import RANK_VARIABLES, free_port, from_rank_zero, initialize, joined_world_size, rank
from rcpo.errors import UserError
from rcpo.inputs import read_inputs
from rcpo.logs import log_path
from rcpo.run_folder import RunFolder, config_tree, open_run
from rcpo.worker import run_worker

GRACE_SECONDS = 20
"""Between asking the other ranks to end and ending them."""


def start(prepare: Callable[[], Config | None]) -> int:
    """Prepare a config, check its inputs, make its run folder and train; returns the exit code.

    `prepare` composes and resolves; it runs in one process only and returns None when there is nothing to
    run.
    """
    if joined_world_size() is not None:
        return _joined(lambda: _make_run(prepare), resume=False)
    made = _make_run(prepare)
    return 0 if made is None else _run_here(*made, resume=False)


def resume(path: str) -> int:
    """Continue the run in `path`; returns the exit code."""
    if joined_world_size() is not None:
        return _joined(lambda: open_run(path), resume=True)
    return _run_here(*open_run(path), resume=True)


def _make_run(prepare: Callable[[], Config | None]) -> tuple[RunFolder, Config] | None:
    """Everything that can be wrong with config and data is found before the folder exists."""
    config = prepare()
    if config is None:
        return None
    assert config.run_dir is not None
    run = RunFolder(config.run_dir)
    run.refuse_existing()
    read_inputs(config)
    run.create(config, config_tree(config))
    return run, config


def _run_here(run: RunFolder, config: Config, resume: bool) -> int:
    num_ranks = config.world_size()
    code = run_worker(run, config, resume) if num_ranks == 1 else _run_ranks(run, num_ranks, resume)
    _discard_if_empty(run, code, resume)
    return code


def _discard_if_empty(run: RunFolder, code: int, resume: bool) -> None:
    """A run that bad input stopped before its first step leaves no half-made folder."""
    if code == 2 and not resume and not run.rows(run.metrics):
        shutil.rmtree(run.path, ignore_errors=True)


def _joined(open_or_make: Callable[[], tuple[RunFolder, Config] | None], resume: bool) -> int:
    """One of the ranks that torchrun or srun started: rank 0 prepares, the others read the frozen config."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    initialize(device)
    answer: dict[str, Any] = {}
    if rank() == 0:
        try:
            made = open_or_make()
            answer = {"run": None if made is None else str(made[0].path)}
        except UserError as error:
            answer = {"error": str(error)}
    answer = from_rank_zero(answer)
    if "error" in answer:
        if rank() == 0:
            raise UserError(answer["error"])
        return 2
    if answer["run"] is None:
        return 0
    run, config = open_run(answer["run"])
    if config.train.device != device:
        raise UserError(
            f"train.device={config.train.device}: ranks that torchrun or srun started use {device} here; "
            "hide the GPUs with CUDA_VISIBLE_DEVICES='' to train on CPUs"
        )
    code = run_worker(run, config, resume)
    if rank() == 0:
        _discard_if_empty(run, code, resume)
    return code


def _run_ranks(run: RunFolder, num_ranks: int, resume: bool) -> int:
    """Start one process a rank on this host and wait; when one fails the others are ended. Returns the exit
    code."""
    shared = dict(zip(RANK_VARIABLES, ("", str(num_ranks), "", "127.0.0.1", str(free_port())), strict=True))
    threads = {} if "OMP_NUM_THREADS" in os.environ else {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num_ranks))
    }  # fmt: skip
    command = [sys.executable, "-m", "rcpo.worker", str(run.path), *(["--resume"] if resume else [])]
    ranks: list[subprocess.Popen[bytes]] = []
    with _signals_forwarded(ranks):
        for number in range(num_ranks):
            env = os.environ | shared | threads | {"RANK": str(number), "LOCAL_RANK": str(number)}
            if number == 0:
                ranks.append(subprocess.Popen(command, env=env, start_new_session=True))
                continue
            with log_path(run.logs, number).open("ab") as log:
                ranks.append(
                    subprocess.Popen(
                        command, env=env, start_new_session=True, stdout=log, stderr=subprocess.STDOUT
                    )
                )
        failed = _first_failure(ranks)
        if failed is None:
            return 0
        _end_all(ranks)
    code = ranks[failed].returncode
    if code not in (2, 130) or failed != 0:
        what = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
        print(f"rcpo: rank {failed} {what}; its log is {log_path(run.logs, failed)}", file=sys.stderr)
    if code in (1, 2, 130):
        return code
    run.update_run(status="failed", exit_reason=f"rank {failed} ended with {code}")
    return 1


def _first_failure(ranks: list[subprocess.Popen[bytes]]) -> int | None:
    """Wait until all ranks are done (None) or one has failed (its number)."""
    while True:
        codes = [process.poll() for process in ranks]
        failures = [number for number, code in enumerate(codes) if code not in (None, 0)]
        if failures:
            return failures[0]
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.1)


def _end_all(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Ask the ranks that still run to end, then end them."""
    for process in ranks:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in ranks:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class _signals_forwarded:  # noqa: N801  (a context manager, used like a function)
    """While open, SIGINT and SIGTERM of this process go to every rank once; the ranks decide how to end."""

    def __init__(self, ranks: list[subprocess.Popen[bytes]]) -> None:
        self._ranks = ranks
        self._saved: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._saved[number] = signal.signal(number, self._forward)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._saved.items():
            signal.signal(number, handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        for process in self._ranks:
            if process.poll() is None:
                process.send_signal(number)
