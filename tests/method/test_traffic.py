"""Bytes that a step gives to collectives: by hand, and as counted in two ranks."""

import pytest

from rcpo.bench.traffic import Traffic, traffic

COUNTED = {0: (82, 245), 1: (164, 327), 2: (164, 409), 3: (245, 736)}
"""MB of an ordinary step and of one of `exact`, by stage: two ranks, one micro-batch, 20.45 M numbers."""


@pytest.mark.parametrize("stage", COUNTED)
def test_what_was_counted(stage: int) -> None:
    found = [traffic(20_450_000, 20_450_000, 4, stage, 1, exact).total / 1e6 for exact in (False, True)]
    assert found == pytest.approx(COUNTED[stage], rel=5e-3)


def test_by_hand() -> None:
    """bf16, 10 of 100 numbers train, 4 micro-batches. Stage 0: 10 fp32 gradients once. Stage 3, exact: 8
    backward and 12 forward passes gather 100 numbers of 2 bytes; 8 exchanges of 10 fp32, and of scores."""
    assert traffic(10, 100, 2, 0, 4, False) == Traffic(40, 0, 0)
    assert traffic(10, 100, 2, 1, 4, True) == Traffic(40, 20, 320)
    assert traffic(10, 100, 2, 2, 4, False) == Traffic(160, 20, 0)
    assert traffic(10, 100, 2, 3, 4, True) == Traffic(320, 4000, 320)
    assert traffic(10, 100, 2, 3, 4, True, ranks=1).total == 0
