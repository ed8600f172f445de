"""What calibrators share: asking for nothing and telling nothing, and one alpha for a whole step."""

from rcpo.method.incentives import Incentives
from rcpo.method.scores import ScoreGeometry


class Quiet:
    """Asks for no measurement, no probe and no reference, and has nothing to show; kinds override what they
    need."""

    @property
    def steers_by_batches(self) -> bool:
        return False

    def measures_at(self, step: int) -> bool:
        return False

    def probes_at(self, step: int) -> bool:
        return False

    def metrics(self) -> dict[str, float]:
        return {}

    def counts(self) -> dict[str, float]:
        return {}


class PerStep(Quiet):
    """A micro-batch's alpha is the step's: nothing of it is looked at, and every rank knows it."""

    per_micro_batch = False

    def alpha(self) -> float:
        raise NotImplementedError("each kind has its own")

    def begin(self) -> None:
        """Nothing changes before the step's end."""

    def alpha_of(self, incentives: Incentives, geometry: ScoreGeometry | None) -> float:
        return self.alpha()

    def of_rank(self, num_ranks: int) -> dict[str, float]:
        return {}
