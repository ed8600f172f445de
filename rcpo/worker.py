"""One rank of a run: `python -m rcpo.worker RUN [--resume]`, or called by `rcpo.launch` in its own process.

Reads the frozen RUN/config.yaml and never composes. Owns joining the other ranks, the log file, the exit code
and run.json's last word.
"""

import contextlib
import logging
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from rcpo.config.schema import Config
from rcpo.errors import UserError
from rcpo.run_folder import RunFolder, now, open_run

logger = logging.getLogger(__name__)


def run_worker(run: RunFolder, config: Config, resume: bool) -> int:
    """Train as this process's rank; returns the exit code (0, 2 for bad input, 1 for a fault, 130
    interrupted)."""
    import torch

    from rcpo.distributed import initialize, rank, shut_down
    from rcpo.logs import log_to_file

    device = initialize(config.train.device or "cpu")
    log_to_file(run.logs, rank())
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with _outcome_recorded(run, rank()):
            _train(run, config, device, resume)
        return 0
    except UserError as error:
        logger.error("%s", error)
        if rank() == 0:
            print(f"rcpo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if rank() == 0:
            print(
                f"rcpo: interrupted; `rcpo resume {run.path}` continues from the newest checkpoint",
                file=sys.stderr,
            )
        return 130
    finally:
        shut_down()


def _train(run: RunFolder, config: Config, device: "object", resume: bool) -> None:
    from rich.console import Console

    from rcpo.distributed import rank
    from rcpo.inputs import read_inputs
    from rcpo.report import print_report
    from rcpo.trainer import train

    inputs = read_inputs(config)
    for line in inputs.report:
        logger.info("%s", line)
    summary = train(config, run, inputs, device, resume)  # type: ignore[arg-type]
    if rank() == 0:
        run.update_run(summary=summary)
        print_report(Console(), run, config, summary)


@contextlib.contextmanager
def _outcome_recorded(run: RunFolder, rank: int) -> Iterator[None]:
    """Write to run.json how the run ended; rank 0 alone writes, every rank logs."""

    def record(status: str, reason: str | None) -> None:
        if rank == 0:
            run.update_run(status=status, exit_reason=reason, ended=now())

    try:
        yield
        record("done", None)
    except UserError as error:
        record("failed", str(error))
        raise
    except KeyboardInterrupt:
        record("interrupted", "SIGINT")
        raise
    except BaseException as error:
        logger.error("%s", traceback.format_exc())
        last = next((line for line in reversed(str(error).splitlines()) if line.strip()), "")
        record("failed", f"{type(error).__name__}: {last}"[:500])
        raise


def main(words: list[str]) -> int:
    """Entry of a started rank."""
    if not words or len(words) > 2 or words[1:] not in ([], ["--resume"]):
        print("usage: python -m rcpo.worker RUN [--resume]", file=sys.stderr)
        return 2
    try:
        run, config = open_run(str(Path(words[0])))
    except UserError as error:
        print(f"rcpo: {error}", file=sys.stderr)
        return 2
    return run_worker(run, config, resume=len(words) == 2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
