"""What a rank gives to collectives in one optimizer step, from sizes alone: bytes by what they are for.

    gradients   fp32, whatever the weights are (`communication_data_type`): once a step at stages 0 and 1,
                after every backward pass at 2 and 3
    weights     in their own dtype: gathered once after the update at 1 and 2, before every pass at 3
    scores      of a step that `exact` measures: fp32, once a backward pass of a side

A step with its sides apart has two backward passes a micro-batch, at stage 3 three forward passes. Scalars,
and the head's own sums (scope head), are left out.
"""

from typing import NamedTuple

FP32 = 4


class Traffic(NamedTuple):
    """Bytes of one rank and step."""

    gradients: int
    weights: int
    scores: int

    @property
    def total(self) -> int:
        return sum(self)


def traffic(
    trained: int,
    numbers: int,
    bytes_of_weight: int,
    stage: int,
    micro_batches: int,
    exact: bool,
    ranks: int = 2,
) -> Traffic:
    """Of a model of `numbers` weights, `trained` of which train, with so many `micro_batches` a rank;
    `exact`: a step whose sides go apart, with scope full. Nothing with one rank."""
    if ranks == 1:
        return Traffic(0, 0, 0)
    backward = micro_batches * (2 if exact else 1)
    forward = micro_batches * (3 if exact else 1)
    reduced = backward if stage >= 2 else 1
    gathered = 0
    if stage in (1, 2):
        gathered = trained
    elif stage == 3:
        gathered = numbers * (forward + backward)
    return Traffic(FP32 * trained * reduced, bytes_of_weight * gathered, FP32 * trained * backward * exact)
