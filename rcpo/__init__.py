"""rcpo: preference optimisation with reward calibration, and the metrics that show likelihood displacement.

From Python:

    run = rcpo.train("objective=simpo", "calibration=on")     # the words of `rcpo train`; returns a Run
    run = rcpo.open_run("runs/NAME")                          # metrics, eval, pairs, summary, model()
    rcpo.open_sweep("sweeps-out/NAME").table
    rcpo.compare("runs").table
    calibrator = rcpo.Calibrator("on", "dpo", head=...)       # alpha in a training loop of your own
    rcpo.objectives.register, rcpo.objectives.load_objective, rcpo.incentives.incentives

Stable within a major version: the names in `__all__` with their documented arguments and attributes, the
words of the command line, the names of metrics, and the files of a run folder. Everything else may change.

Importing rcpo imports neither torch nor transformers; a name of `__all__` is imported when it is first used.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rcpo import incentives, objectives
    from rcpo.common.errors import NonFiniteError, SaveError, StoppedError, UserError
    from rcpo.library.calibrator import Calibrator
    from rcpo.library.compare import Comparison, compare
    from rcpo.library.run import Run, open_run
    from rcpo.library.sweep import Sweep, open_sweep
    from rcpo.library.train import train

__version__ = "0.1.0"

__all__ = [
    "Calibrator",
    "Comparison",
    "NonFiniteError",
    "Run",
    "SaveError",
    "StoppedError",
    "Sweep",
    "UserError",
    "__version__",
    "compare",
    "incentives",
    "objectives",
    "open_run",
    "open_sweep",
    "train",
]

_PLACES = {
    "Calibrator": "rcpo.library.calibrator",
    "Comparison": "rcpo.library.compare",
    "NonFiniteError": "rcpo.common.errors",
    "Run": "rcpo.library.run",
    "SaveError": "rcpo.common.errors",
    "StoppedError": "rcpo.common.errors",
    "Sweep": "rcpo.library.sweep",
    "UserError": "rcpo.common.errors",
    "compare": "rcpo.library.compare",
    "open_run": "rcpo.library.run",
    "open_sweep": "rcpo.library.sweep",
    "train": "rcpo.library.train",
}
"""Where each name is defined."""
_MODULES = ("incentives", "objectives")


if not TYPE_CHECKING:  # or type checkers would take every name for one of rcpo's

    def __getattr__(name: str) -> Any:
        """PEP 562: a public name, imported when it is first asked for."""
        if name in _MODULES:
            return importlib.import_module(f"rcpo.{name}")
        if name in _PLACES:
            value = getattr(importlib.import_module(_PLACES[name]), name)
            globals()[name] = value
            return value
        raise AttributeError(f"module 'rcpo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


def _drop(logger: str, words: str) -> None:
    logging.getLogger(logger).addFilter(lambda record: words not in str(record.msg))


# No news here: transformers imports DeepSpeed, which says on standard output that it found no GPU, and, where
# installed, bitsandbytes, which says on standard error what would make 4-bit weights faster on a CPU.
_drop("DeepSpeed", "Setting accelerator to CPU")
_drop("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward")
