"""What a step works with (`Method`), what a run carries from step to step (`TrainState`), and what its loop
works with (`Training`).

Made by `rcpo.training.loop`, which passes them on to whoever acts for it; the method sees `TrainState` alone.
"""

from dataclasses import dataclass
from typing import Any

from rcpo.config.resolved import ResolvedConfig
from rcpo.data.inputs import Inputs
from rcpo.data.sampler import PairSampler
from rcpo.engine.engine import Engine
from rcpo.method.calibrators import Calibrator
from rcpo.monitor.sinks import Sink
from rcpo.objectives import Objective
from rcpo.reference.moving import MovingReference
from rcpo.reference.table import Reference, Start
from rcpo.runs.folder import RunFolder
from rcpo.training.aggregate import Aggregate
from rcpo.training.checkpoint import save_checkpoint
from rcpo.training.measurements import Measurements


@dataclass(frozen=True)
class Method:
    """What every step of a run works with."""

    engine: Engine
    objective: Objective
    aggregate: Aggregate
    pairs_per_step: int
    """B of the global batch, over all ranks; with lists of responses all their slots."""
    slots: int = 1
    """Pairs that a list of responses is in a step; 1 where pairs are trained on."""
    router_loss: float = 0.0
    """What the load-balancing loss of experts counts beside the objective's."""
    weighs_batch: bool = False
    """Whether the mean weight of a global batch multiplies its aggregated loss, in place of each pair's."""


@dataclass
class TrainState:
    """What the method carries from step to step. With the engine it is all that a restart needs: data order
    and reference are functions of the config."""

    step: int
    """Optimizer steps done."""
    calibrator: Calibrator
    objective_state: tuple[float, ...]
    """The objective's batch statistics of the step before."""
    num_nonfinite_steps: int = 0
    """Steps skipped because their numbers were not finite."""

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "calibrator": self.calibrator.state_dict(),
            "objective_state": list(self.objective_state),
            "num_nonfinite_steps": self.num_nonfinite_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.calibrator.load_state_dict(state["calibrator"])
        self.objective_state = tuple(state["objective_state"])
        self.num_nonfinite_steps = state["num_nonfinite_steps"]


@dataclass(frozen=True)
class Training:
    """What the training loop works with."""

    config: ResolvedConfig
    run: RunFolder
    inputs: Inputs
    method: Method
    sampler: PairSampler
    num_steps: int
    state: TrainState
    measurements: Measurements
    reference: Reference
    start: Start
    """Held-out z at step 0: what displacement is measured against."""
    sinks: list[Sink]
    moving: MovingReference | None = None
    """What the loss reads in the place of `reference`, where it follows the policy."""

    @property
    def read_reference(self) -> Reference:
        """What the loss reads."""
        return self.reference if self.moving is None else self.moving

    @property
    def engine(self) -> Engine:
        return self.method.engine

    def save(self) -> None:
        """Write a checkpoint. Raises SaveError on every rank when it cannot be written. Collective."""
        save_checkpoint(
            self.run,
            self.engine,
            self.state.state_dict(),
            self.measurements.state(),
            self.inputs.tokenizer,
            self.config.train.keep_last,
            {} if self.moving is None else self.moving.state(),
        )
