"""One rank of a run: `python -m rcpo.launch.worker RUN [--resume]`, or called by `rcpo.launch.start` in its
own process.

Reads the frozen RUN/config.yaml and never composes. Owns joining the other ranks, the log file, the exit code
and run.json's last word.
"""

import contextlib
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rcpo.common.doing import doing
from rcpo.common.errors import UserError
from rcpo.common.files import write_atomically
from rcpo.common.imports import quick_imports

if TYPE_CHECKING:  # imported where they are used: a rank must hear Ctrl-C quietly while torch is loading
    import torch

    from rcpo.config.resolved import ResolvedConfig
    from rcpo.data.inputs import Inputs
    from rcpo.runs.folder import RunFolder

logger = logging.getLogger(__name__)


def run_worker(
    run: "RunFolder", config: "ResolvedConfig", resume: bool, inputs: "Inputs | None" = None
) -> int:
    """Train as this process's rank, on `inputs` where they have been read already; returns the exit code: 0,
    that of a UserError (`rcpo.common.errors`), or 130 after Ctrl-C. A fault is raised, after it has been
    recorded."""
    from rcpo.launch.processes import interrupted_line
    from rcpo.ranks.distributed import rank

    with _joined_to_ranks(run, config) as device:
        # Among ranks that rcpo.launch.processes started, it is the one that speaks at the end.
        speaks = rank() == 0 and not _is_started_rank()
        try:
            with _outcome_recorded(run, rank()):
                _train(run, config, device, resume, inputs)
            return 0
        except UserError as error:
            logger.error("%s", error)
            if speaks:
                print(f"rcpo: {error}", file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            if speaks:
                print(f"rcpo: {interrupted_line(run)}", file=sys.stderr)
            return 130


def train_raising(
    run: "RunFolder", config: "ResolvedConfig", resume: bool, inputs: "Inputs | None" = None
) -> None:
    """`run_worker` for a run of one rank in a process that goes on afterwards (`rcpo.library`): what stops
    the run is raised, after it has been recorded."""
    with _joined_to_ranks(run, config) as device:
        try:
            with _outcome_recorded(run, 0):
                _train(run, config, device, resume, inputs)
        except UserError as error:
            logger.error("%s", error)
            raise


@contextlib.contextmanager
def _joined_to_ranks(run: "RunFolder", config: "ResolvedConfig") -> "Iterator[torch.device]":
    """While open, this process is a rank of the run, with its log, its allocator and its signal handlers;
    gives its device."""
    import torch

    from rcpo.ranks import stopping
    from rcpo.ranks.allocator import keep_freed_memory
    from rcpo.ranks.deterministic import deterministic_algorithms
    from rcpo.ranks.distributed import initialize, rank, shut_down
    from rcpo.ranks.logs import log_to_file

    with deterministic_algorithms(config.train.deterministic):
        device = initialize(config.train.device)
        log_to_file(run.logs, rank())
        torch.backends.cuda.matmul.allow_tf32 = False
        if device.type == "cpu":
            keep_freed_memory()
        if rank() == 0:
            stopping.stop_at_once()
        try:
            yield device
        finally:
            stopping.stop_silently()
            shut_down()


def _train(
    run: "RunFolder",
    config: "ResolvedConfig",
    device: "torch.device",
    resume: bool,
    inputs: "Inputs | None",
) -> None:
    from rcpo.common.console import RunConsole
    from rcpo.launch.at_end import scores_at_end
    from rcpo.monitor.summary import print_report, print_start
    from rcpo.ranks.deterministic import missing_algorithms_refused
    from rcpo.ranks.distributed import rank
    from rcpo.records.load import NOTE

    with quick_imports():
        from rcpo.training.loop import train
        from rcpo.training.read_inputs import read_inputs

    inputs = inputs or read_inputs(config)
    for line in inputs.report:
        logger.info("%s", line)
    if rank() == 0:
        console = RunConsole()
        print_start(console, config, inputs.num_train, inputs.num_held_out, inputs.kind)
        said = inputs.account.lines() if inputs.account.has_losses else []
        # What a user asked to be left out is said where he looks.
        said += [line for line in inputs.report if line.startswith(("data.filter", NOTE))]
        for line in said:
            console.print(line, soft_wrap=True, markup=False, highlight=False)
        doing(f"loading model {config.model.path}")
    with missing_algorithms_refused():
        summary = train(config, run, inputs, device, resume, at_end=scores_at_end(config, run))
    if rank() == 0:
        run.update_run(summary=summary)
        print_report(RunConsole(), run, config, summary)


@contextlib.contextmanager
def _outcome_recorded(run: "RunFolder", rank: int) -> Iterator[None]:
    """Write to run.json how the run ended; rank 0 alone writes, every rank logs and tells who started it."""
    from rcpo.runs.folder import now

    def record(status: str, reason: str | None) -> None:
        if rank == 0:
            run.update_run(status=status, exit_reason=reason, ended=now())

    try:
        yield
        record("done", run.read_run().get("summary", {}).get("stopped_early") if rank == 0 else None)
    except UserError as error:
        _tell_fault(str(error), error.exit_code)
        record(error.status, str(error))
        raise
    except KeyboardInterrupt:
        record("interrupted", "SIGINT")
        raise
    except BaseException as error:
        last = next((line for line in reversed(str(error).splitlines()) if line.strip()), "")
        reason = f"{type(error).__name__}: {last}"[:500]
        _tell_fault(f"failed ({reason})")
        logger.error("%s", traceback.format_exc())
        record("failed", reason)
        raise


def _is_started_rank() -> bool:
    """Whether `rcpo.launch.processes` started this process among others."""
    from rcpo.launch.processes import FAULT_FILE

    return FAULT_FILE in os.environ


def _tell_fault(reason: str, exit_code: int = 1) -> None:
    """Tell `rcpo.launch.processes` why this rank fails, at once: the others fail of that a moment later."""
    from rcpo.launch.processes import FAULT_FILE

    path = os.environ.get(FAULT_FILE)
    if path and not Path(path).exists():  # what came first is the cause
        fault = {"time": time.time(), "reason": reason, "exit_code": exit_code}
        write_atomically(Path(path), json.dumps(fault))


def _end_with_parent() -> None:
    """End this process when the one that started it is gone: stdin is a pipe from there, closed by its
    death."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main(words: list[str]) -> int:
    """Entry of a started rank; what it fails of is in its log and told to `rcpo.launch.processes`."""
    if not words or len(words) > 2 or words[1:] not in ([], ["--resume"]):
        print("usage: python -m rcpo.launch.worker RUN [--resume]", file=sys.stderr)
        return 2
    try:
        if _is_started_rank():
            _end_with_parent()
        with quick_imports():
            from rcpo.runs.frozen import open_run

            run, config = open_run(str(Path(words[0])))  # loads torch
        return run_worker(run, config, resume=len(words) == 2)
    except UserError as error:
        _tell_fault(str(error), error.exit_code)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not _is_started_rank():
            raise
        _tell_fault(f"failed ({type(error).__name__}: {error})")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
