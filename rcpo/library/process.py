"""The user's own process around a training run: refused where it cannot train, and afterwards as it was.

A run takes signal handlers, loggers, warnings, random numbers and Hydra's state of the process that it trains
in, as the `rcpo` command's process is its own. A notebook's is not.
"""

import contextlib
import gc
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator

from rcpo.common.errors import UserError

_trains = threading.Lock()
"""Held while this process trains a run."""


@contextlib.contextmanager
def process_kept() -> Iterator[None]:
    """While open, rcpo may train in this process. Raises UserError where it cannot."""
    _refuse_ranks()
    if not _trains.acquire(blocking=False):
        raise UserError(
            "rcpo.train: another run trains in this process; wait for it, or start a process for this one"
        )
    try:
        with _signals_kept(), _logging_kept(), _torch_kept(), _hydra_kept(), _interpreter_kept():
            yield
    finally:
        _trains.release()


def _refuse_ranks() -> None:
    import torch.distributed as dist

    from rcpo.ranks.environment import joined_world_size

    if dist.is_available() and dist.is_initialized():
        raise UserError(
            "rcpo.train: this process is in a process group already; destroy that, start another process, or "
            "use rcpo.Calibrator in your own loop"
        )
    if (joined_world_size() or 1) > 1:
        raise UserError(
            f"rcpo.train: starts its own ranks, and torchrun or srun started {joined_world_size()}; start "
            "`rcpo train` with it, or this script alone"
        )


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """In a thread Python lets nobody set handlers, and rcpo sets none."""
    from rcpo.ranks.stopping import SIGNALS

    is_main = threading.current_thread() is threading.main_thread()
    saved = {number: signal.getsignal(number) for number in (signal.SIGINT, *SIGNALS)} if is_main else {}
    try:
        yield
    finally:
        for number, handler in saved.items():
            if handler is not None:  # one that was not set from Python cannot be set from there
                signal.signal(number, handler)


@contextlib.contextmanager
def _logging_kept() -> Iterator[None]:
    """Handlers and levels, and where warnings go."""
    loggers = [logging.getLogger(), logging.getLogger("rcpo")]
    saved = [(logger, list(logger.handlers), logger.level) for logger in loggers]
    captured = warnings.showwarning.__module__ == "logging"
    with warnings.catch_warnings():
        try:
            yield
        finally:
            for logger, handlers, level in saved:
                for handler in logger.handlers:
                    if handler not in handlers:
                        handler.close()
                logger.handlers = handlers
                logger.setLevel(level)
            if not captured:
                logging.captureWarnings(False)


@contextlib.contextmanager
def _torch_kept() -> Iterator[None]:
    """Random numbers and flags; memory that is free again goes back to the system."""
    import torch

    from rcpo.ranks.allocator import return_freed_memory

    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    allow_tf32 = torch.backends.cuda.matmul.allow_tf32
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = allow_tf32
            gc.collect()  # engines hold themselves in circles
            return_freed_memory()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()


@contextlib.contextmanager
def _hydra_kept() -> Iterator[None]:
    """Hydra has one configuration a process, and refuses a second: the user's own is put aside."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    of_process, of_job = GlobalHydra.instance(), HydraConfig.instance()
    saved = of_process.hydra, of_job.cfg
    of_process.hydra, of_job.cfg = None, None
    try:
        yield
    finally:
        # Not of_process: Hydra puts a copy into its place.
        GlobalHydra.instance().hydra, HydraConfig.instance().cfg = saved


@contextlib.contextmanager
def _interpreter_kept() -> Iterator[None]:
    """torch.distributed lets every traceback begin with its rank; DeepSpeed is told its device in the
    environment."""
    hook, accelerator = sys.excepthook, os.environ.get("DS_ACCELERATOR")
    try:
        yield
    finally:
        sys.excepthook = hook
        if accelerator is None:
            os.environ.pop("DS_ACCELERATOR", None)
        else:
            os.environ["DS_ACCELERATOR"] = accelerator
