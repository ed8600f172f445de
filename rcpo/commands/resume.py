"""`rcpo resume RUN|SWEEP`: continue a run from its newest checkpoint, or a sweep's unfinished cells."""

import argparse
from pathlib import Path

from rcpo.commands.flags import Flags, positive_int
from rcpo.common.errors import UserError
from rcpo.common.imports import quick_imports
from rcpo.common.locks import HeldError, hold, run_lock
from rcpo.ranks.environment import is_first_rank


def add_arguments(parser: Flags) -> None:
    parser.description = """\
Continue a run from its newest whole checkpoint, with the config frozen in RUN/config.yaml. A run
without a checkpoint starts again from its first step. A run that is done is left as it is.

Of a sweep: the same for every cell that is neither done nor running; a sweep that SLURM ran is
submitted again.

A config that has changed since is refused. --allow-change names a key that may: train.steps,
train.epochs, train.save_every, train.keep_last, train.eval_every, train.log_every,
train.on_save_error, train.on_nonfinite, train.max_nonfinite_steps, train.stop_when, train.keep_best
and tracking.* leave every step as it is; launch.*, deepspeed.stage, train.pairs_per_device, train.device and
model.gradient_checkpointing spread the same work otherwise, which changes rounding."""
    parser.epilog = """\
examples:
  rcpo resume runs/dpo-on-1
  rcpo resume runs/dpo-on-1 train.steps=300     (longer)
  rcpo resume runs/dpo-on-1 --from step-000100
  rcpo resume sweeps-out/demo --parallel 2"""
    parser.add_argument("path", metavar="RUN|SWEEP", help="its folder")
    parser.add_argument(
        "changes",
        metavar="KEY=VALUE",
        nargs="*",
        help="of a run: what changes, as after --allow-change: train.steps=300",
    )
    parser.add_argument(
        "--from",
        dest="step",
        metavar="STEP",
        help="of a run: go on from that checkpoint, step-000100 or 100; newer ones are set aside",
    )
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY[=VALUE]",
        help="of a run: a key that may have changed, or that changes to the value",
    )
    parser.add_argument(
        "--parallel", type=positive_int, metavar="N", help="of a sweep: N cells at a time here; default: 1"
    )


def run(options: argparse.Namespace) -> int:
    """Resume; returns the exit code. Raises UserError when the folder is no run or cannot be continued."""
    path, allowed = options.path, [*options.allow_change, *options.changes]
    if (word := next((word for word in options.changes if "=" not in word), None)) is not None:
        raise UserError(f"{word}: is no KEY=VALUE; resume one folder at a time")
    if Path(path, "manifest.jsonl").is_file():
        if options.step is not None:
            raise UserError("--from: is for one run; type rcpo resume SWEEP/cells/NAME --from STEP")
        if allowed:
            raise UserError("--allow-change: is for one run; type rcpo resume SWEEP/cells/NAME for each")
        return _resume_sweep(path, options.parallel or 1)
    if options.parallel is not None:
        raise UserError(f"--parallel: is for a sweep, and {path} is none; leave it out")
    if allowed:
        from rcpo.launch.allowed import look_at_changes

        look_at_changes(Path(path, "config.yaml"), allowed)
    if not is_first_rank() or not Path(path, "config.yaml").is_file():
        return _resume_run(path, allowed, options.step)
    try:
        with hold(run_lock(Path(path))):
            return _resume_run(path, allowed, options.step)
    except HeldError as error:
        raise UserError(f"{path}: is being trained by {error}; wait for it, or stop it first") from None


def _resume_run(path: str, allowed: list[str], step: str | None = None) -> int:
    from rcpo.runs.frozen import open_run

    with quick_imports():
        folder, _ = open_run(path)  # loads torch
    if folder.read_run().get("status") == "done" and not allowed and step is None:
        reason = folder.read_run().get("exit_reason")
        more, why = ("train.steps=N", "") if reason is None else ("train.stop_when=null", f", {reason}")
        print(
            f"{folder.path} is done{why}; its model is {folder.final}; to train longer, type "
            f"rcpo resume {path} --allow-change {more}"
        )
        return 0
    with quick_imports():
        from rcpo.launch.start import resume

    if step is None or not is_first_rank():
        return resume(path, allowed)
    from rcpo.runs.go_back import put_back, set_newer_aside

    moved = set_newer_aside(folder, step)
    for place in moved.values():
        print(f"set aside: {place}")
    try:
        return resume(path, allowed)
    except UserError:  # nothing was trained: the newest checkpoint is the one that it was
        put_back(moved)
        raise


def _resume_sweep(path: str, parallel: int) -> int:
    from rcpo.sweep.folder import SweepFolder
    from rcpo.sweep.grow import mend
    from rcpo.sweep.local import run_unfinished, sweep_held

    sweep = SweepFolder(path)
    with sweep_held(sweep):
        for name in mend(sweep):
            print(f"{name}: its folder was gone; it is frozen again", flush=True)
        if sweep.study.is_file():
            from rcpo.sweep.search import definition_in, run_search

            return run_search(definition_in(sweep), sweep, parallel)
        if sweep.slurm.is_file():
            from rcpo.sweep.slurm import submit as slurm

            return slurm.resubmit(sweep)
        return run_unfinished(sweep, parallel)
