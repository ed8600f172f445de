"""A step on the meta device, which has shapes and no numbers: up to its one reduction nothing is read back,
and everything that comes from the CPU is queued without a wait.

`.item()` raises there by itself. `tests/trainings/test_waits.py` counts on a CPU what DeepSpeed reads.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import rcpo.training.step
from helpers.inputs import config_of
from helpers.selection import matrix
from helpers.small_engine import SmallEngine
from helpers.tiny_models import make_llama, make_neox, make_pairs
from helpers.waits import counted
from rcpo.config.resolved import ResolvedConfig
from rcpo.data.joint import lay_out
from rcpo.method.calibrators import build_calibrator
from rcpo.method.metrics import QUANTITIES
from rcpo.models.adapters import add_adapters
from rcpo.models.attention import leave_masks_unread
from rcpo.objectives import REGISTRY
from rcpo.ranks.transfer import to_device
from rcpo.training.aggregate import aggregate_of
from rcpo.training.measurement import Measurement
from rcpo.training.measurements import Measurements
from rcpo.training.micro_batch import MicroBatch
from rcpo.training.state import Method, TrainState
from rcpo.training.step import train_step

META = torch.device("meta")


class MetaEngine(SmallEngine):
    """A policy without numbers, as if a run had gone on for some steps."""

    device = META

    def __init__(self, config: ResolvedConfig, make: Any, stage: int) -> None:
        with META:
            model = make()
            model.config._attn_implementation = "sdpa"
            leave_masks_unread(model)
            if config.model.lora.rank is not None:
                add_adapters(model, config.model, "")
        super().__init__(model, config, 2)
        self.stage = stage

    def second_moments(self, parameters: list[torch.nn.Parameter]) -> Any:
        return (torch.empty_like(parameter) for parameter in parameters)


class AtReductionError(Exception):
    """Carries what was to be summed."""


def parts_of_a_step(
    monkeypatch: pytest.MonkeyPatch,
    config: ResolvedConfig,
    make: Any = make_llama,
    stage: int = 0,
    measured_before: bool = False,
) -> tuple[Measurement, dict[str, Any]]:
    """What reaches the one reduction of a step with two micro-batches of two pairs, and how it was measured.
    Any read before it raises; blocking copies are an AssertionError. Left out is the read of an objective
    that wants numbers of mismatched pairs before a step begins."""

    def stop(device: torch.device, **parts: Any) -> None:
        raise AtReductionError(parts)

    monkeypatch.setattr(rcpo.training.step, "sum_parts_over_ranks", stop)
    monkeypatch.setattr(rcpo.training.step, "with_mismatched", lambda method, state, mismatched: state)
    engine, objective = MetaEngine(config, make, stage), config.objective_function
    measurements = Measurements(config, engine)  # type: ignore[arg-type]
    state = TrainState(0, build_calibrator(config.calibration), objective.initial_state(8.0))
    method = Method(engine, objective, aggregate_of(config.composition), 4)  # type: ignore[arg-type]
    measurement = measurements.at(0, state.calibrator)
    micro_batches = []
    for pairs in (make_pairs(2), make_pairs(2, seed=1)):
        batch = lay_out(config.train, pairs, 0, measurement.takes_joint_layouts)
        if objective.weighs_tokens:
            batch = batch._replace(ref_token_logps=torch.zeros(len(batch.targets)))
        ref = torch.empty(2, device=META)
        micro_batches.append(MicroBatch(batch.to(META), ref, ref, ref))
    if measured_before and measurements._reader is not None:
        with torch.no_grad():
            sides = measurement._scores.sides(1.0, 1.0)  # type: ignore[attr-defined]
            measurements._reader.products(sides, None)
            measurements._reader.read([1.0] * 3)
            measurements._reader.keep()
    with counted() as waits, pytest.raises(AtReductionError) as reached:
        train_step(method, state, micro_batches, measurement)
    assert not waits.copies.total(), waits.copies
    return measurement, reached.value.args[0]


def assert_on_device(parts: dict[str, Any]) -> None:
    assert all(part.device == META for part in parts.values() if isinstance(part, Tensor))
    assert len(parts["quantities"]) == len(QUANTITIES)


@pytest.mark.parametrize("name", matrix(sorted(REGISTRY), ("bdpo",).__contains__, "rows of matrices"))
def test_no_objective_reads_anything(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured at the head, with means of log-probs where that is another loss than with sums."""
    config = config_of(objective={"name": name}, calibration={"name": "on", "scope": "head"})
    _, parts = parts_of_a_step(monkeypatch, config)
    assert_on_device(parts)
    assert len(parts["products"]) == 3


MEASURED: dict[str, dict[str, dict[str, Any]]] = {
    "none": {"calibration": {"name": "off"}},
    "head-mean": {"calibration": {"name": "on", "scope": "head"}},
    "head-weighted": {"calibration": {"name": "on", "scope": "head", "estimator": "weighted"}},
    "head-averages": {"calibration": {"name": "on"}, "objective": {"log_probs": "mean"}},
    "apart": {"calibration": {"name": "exact"}},
    "beside-weighted": {
        "calibration": {"name": "off", "scope": "full", "estimator": "weighted"},
        "metrics": {"geometry_every": 1},
    },
    "beside-mean": {"calibration": {"name": "on", "scope": "full"}},
    "beside-averages": {
        "calibration": {"name": "on", "scope": "full"}, "objective": {"log_probs": "mean"},
    },
    "adapters": {
        "calibration": {"name": "on", "scope": "lora_last"},
        "model": {"lora": {"rank": 2, "targets": ["q_proj"]}},
    },
    "population-head": {"calibration": {"name": "on"}, "metrics": {"population": True}},
    "population-full": {"calibration": {"name": "exact"}, "metrics": {"population": True}},
    "kl-dro": {"calibration": {"name": "on"}, "objective": {"aggregate": "kl_dro"}},
    "weighs-tokens": {"calibration": {"name": "exact"}, "objective": {"name": "ti_dpo"}},
    "fixed": {"calibration": {"name": "fixed", "alpha": 1.1}},
    "feedback": {"calibration": {"name": "feedback"}},
    "balance": {"calibration": {"name": "balance"}},
}  # fmt: skip


UNMEASURED = {"none", "fixed", "feedback", "balance"}
KINDS = [(kind, stage) for kind in MEASURED for stage in (0, 3)]
SOME_KINDS = [("population-head", 0), ("apart", 3), ("beside-mean", 0)]


@pytest.mark.parametrize(("kind", "stage"), matrix(KINDS, SOME_KINDS.__contains__, "rows of matrices"))
def test_no_measurement_reads_anything(kind: str, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind, as at ZeRO 0 and as at 3 (the sides apart go forward again there)."""
    population = kind.startswith("population")
    _, parts = parts_of_a_step(
        monkeypatch, config_of(**MEASURED[kind]), stage=stage, measured_before=population
    )
    assert_on_device(parts)
    assert len(parts["products"]) == (
        9 if population else 0 if kind in ("none", "fixed", "feedback", "balance") else 3
    )


JOINED = [
    (share, pack, make)
    for share in (False, True)
    for pack in (False, True)
    for make in (make_llama, make_neox)
]


@pytest.mark.parametrize(
    ("share_prefix", "packing", "make"),
    matrix(JOINED, (True, True, make_llama).__eq__, "rows of matrices"),
)
def test_no_layout_reads_anything(
    share_prefix: bool, packing: bool, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded rows, a shared prefix, one packed row, and both."""
    train = {"share_prefix": share_prefix, "packing": packing}
    config = config_of(calibration={"name": "on", "scope": "head"}, train=train)
    _, parts = parts_of_a_step(monkeypatch, config, make)
    assert_on_device(parts)


class OnCpu:
    """A tensor in ordinary memory that says what is done to it."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.done: list[Any] = []

    def pin_memory(self) -> "OnCpu":
        self.done.append("pinned")
        return self

    def to(self, device: torch.device, non_blocking: bool) -> list[Any]:
        return [*self.done, device.type, non_blocking]


@pytest.mark.parametrize(("device", "done"), [("cuda", ["pinned", "cuda", True]), ("cpu", ["cpu", True])])
def test_what_goes_to_a_gpu_is_pinned_first(device: str, done: list[Any]) -> None:
    """A copy from memory that is not pinned waits, whatever non_blocking says."""
    assert to_device(OnCpu(), torch.device(device)) == done  # type: ignore[arg-type,comparison-overlap]


def test_the_published_protocol_waits_in_every_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """It wants numbers before it goes backward: the one exception, and the proof that a read would be
    seen."""
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):
        parts_of_a_step(monkeypatch, config_of(calibration={"name": "published", "scope": "head"}))
