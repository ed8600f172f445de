"""Which measurement an optimizer step gets.

Owns the choice, and makes each kind when the first one is due. Made by `rcpo.training.loop`. The kinds are in
`rcpo.training.measurement` and `rcpo.training.each_micro_batch`.
"""

from torch import Tensor

from rcpo.config.resolved import ResolvedConfig
from rcpo.engine.engine import Engine
from rcpo.method.calibrators import Calibrator
from rcpo.method.scores import ParameterScores
from rcpo.models.adapters import last_block_parameters
from rcpo.training.each_micro_batch import EachByAdapters, EachByHead, EachMicroBatch
from rcpo.training.measurement import (
    ApartMeasurement,
    BesideMeasurement,
    HeadMeasurement,
    Measurement,
    ParameterReader,
)
from rcpo.training.reader import Reader


def kind_at(config: ResolvedConfig, calibrator: Calibrator, step: int) -> type[Measurement]:
    """How optimizer step `step` (counted from 0) is measured."""
    every = config.metrics.geometry_every
    wanted = calibrator.measures_at(step)
    if calibrator.per_micro_batch:
        return EachMicroBatch
    if not (wanted or (every > 0 and step % every == 0)):
        return Measurement
    if config.calibration.scope == "head":
        return HeadMeasurement
    return ApartMeasurement if wanted and config.calibration.estimator == "weighted" else BesideMeasurement


class Measurements:
    """The measurements of a run; buffers are made when the first one is due, and never where none is."""

    def __init__(self, config: ResolvedConfig, engine: Engine, slots: int = 1) -> None:
        """`slots`: pairs that a list of responses is in a step, so that scores are means over lists."""
        self._config, self._engine, self._slots = config, engine, slots
        self._unmeasured = Measurement()
        self._head: HeadMeasurement | None = None
        self._apart: ApartMeasurement | None = None
        self._beside: BesideMeasurement | None = None
        self._each: EachMicroBatch | None = None
        self._reader: Reader | None = None
        self._loaded: dict[str, Tensor] = {}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of measurements, this rank's share; empty without metrics.population."""
        return self._loaded if self._reader is None else self._reader.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take `state` back, before the first measurement of a step."""
        self._loaded = state
        if self._reader is not None:  # the rehearsal has made it
            self._reader.load_state(state, self._engine.device)

    def _make_reader(self) -> Reader:
        self._reader = Reader(self._weighted, self._config.metrics.population)
        self._reader.load_state(self._loaded, self._engine.device)
        return self._reader

    def at(self, step: int, calibrator: Calibrator) -> Measurement:
        """The measurement of optimizer step `step` (counted from 0)."""
        kind = kind_at(self._config, calibrator, step)
        if kind is EachMicroBatch:
            every = self._config.metrics.geometry_every
            return self._of_each().at(every > 0 and step % every == 0)
        if kind is Measurement:
            return self._unmeasured
        if kind is HeadMeasurement:
            return self._of_head()
        apart, beside = self._of_parameters()
        return apart if kind is ApartMeasurement else beside

    @property
    def _weighted(self) -> bool:
        return self._config.calibration.estimator == "weighted"

    @property
    def _averages(self) -> bool:
        return self._config.objective_function.averages

    def _of_head(self) -> HeadMeasurement:
        if self._head is None:
            num_pairs, reader = self._config.train.pairs_per_step, self._make_reader()
            self._head = HeadMeasurement(self._engine, reader, num_pairs, self._averages)
        return self._head

    def _of_each(self) -> EachMicroBatch:
        if self._each is None:
            num_pairs, reader = self._config.train.pairs_per_step, self._make_reader()
            if self._config.calibration.scope == "head":
                self._each = EachByHead(self._engine, reader, num_pairs, self._averages)
            else:
                parameters = last_block_parameters(self._engine.policy.model)
                self._each = EachByAdapters(parameters, reader, num_pairs, self._averages)
        return self._each

    def _of_parameters(self) -> tuple[ApartMeasurement, BesideMeasurement]:
        if self._apart is None or self._beside is None:
            if self._config.calibration.scope == "lora_last":
                parameters = last_block_parameters(self._engine.policy.model)
            else:
                parameters = self._engine.trainable_parameters()
            measured = {id(parameter) for parameter in parameters}
            others = [each for each in self._engine.trainable_parameters() if id(each) not in measured]
            scores = ParameterScores(parameters, self._engine.device, others)
            reader = ParameterReader(parameters, scores, self._make_reader())
            self._apart = ApartMeasurement(scores, reader)
            self._beside = BesideMeasurement(scores, reader, self._weighted, self._averages, self._slots)
        return self._apart, self._beside
