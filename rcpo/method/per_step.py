"""What all calibrators share that have one alpha for every micro-batch and rank of an optimizer step."""

from rcpo.method.incentives import Incentives
from rcpo.method.scores import ScoreGeometry


class PerStep:
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
