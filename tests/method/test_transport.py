"""aot and aot_unpaired: ranks by hand, the batch's loss and its derivatives; a split changes nothing."""

from pathlib import Path

import pytest
import torch

from helpers.cases import Case, Layout, make_config
from helpers.objective_cases import COMPARE_RANKS, nls
from helpers.same_run import assert_equal_rows
from helpers.small_engine import SmallEngine, train_small
from helpers.tiny_models import make_llama, make_pairs
from rcpo.common.errors import UserError
from rcpo.library.calibrator import Calibrator
from rcpo.method.incentives import incentives
from rcpo.objectives import REGISTRY, PairLogProbs, load_objective, objective_of
from rcpo.objectives.transport import at_rank_of

PAIRS = PairLogProbs(
    *torch.tensor(
        [[-4.0, -9, -7], [-6, -8, -2], [-5, -7, -6], [-5, -9, -3], [2, 3, 3], [3, 4, 2]], dtype=torch.float64
    )
)
"""m = (2, -1, -5), the reference's margins (0, 2, -3); r_w = (1, -2, -1), r_l = (-1, 1, 1)."""
NAMES = sorted(COMPARE_RANKS)


def batch_loss(name: str, pairs: PairLogProbs) -> float:
    """The formula over sorted numbers."""
    if name == "aot":
        upper, lower = pairs.z_w - pairs.z_l, pairs.ref_w - pairs.ref_l
    else:
        upper, lower = pairs.r_w, pairs.r_l
    ranks = zip(sorted(upper.tolist()), sorted(lower.tolist()), strict=True)
    return sum(nls(0.1 * (high - low)) for high, low in ranks) / len(upper)


def test_the_table_names_what_compares_ranks() -> None:
    assert {name for name in REGISTRY if load_objective(name).match is not None} == COMPARE_RANKS


def test_numbers_at_a_rank_by_hand() -> None:
    """Equal values keep their order."""
    values, others = torch.tensor([3.0, 1.0, 1.0, 2.0]), torch.tensor([40.0, 10.0, 30.0, 20.0])
    assert at_rank_of(values, others).tolist() == [40, 10, 20, 30]


def test_losses_by_hand() -> None:
    """aot: m of ranks -5, -1, 2 meet -3, 0, 2, so m - q = (0, -1, -2). Unpaired: r_w -2, -1, 1 meet r_l
    -1, 1, 1: of ranks -1, -2, 0."""
    assert load_objective("aot")(PAIRS).tolist() == pytest.approx([nls(0), nls(-0.1), nls(-0.2)])
    losses = load_objective("aot_unpaired")(PAIRS)
    assert losses.mean().item() == pytest.approx((nls(-0.1) + nls(-0.2) + nls(0)) / 3)


@pytest.mark.parametrize("name", NAMES)
def test_incentives_are_the_batch_losss_own(name: str) -> None:
    """B dL/dz by (L(z + h) - L(z - h))/2h, one z of the batch at a time, fp64. r_l has a tie, whose members
    are kept apart."""
    pairs, h = PAIRS._replace(ref_l=PAIRS.ref_l + torch.tensor([0, 0, 0.01], dtype=torch.float64)), 1e-5
    found = load_objective(name)
    assert found(pairs).mean().item() == pytest.approx(batch_loss(name, pairs))
    for field, sign, column in zip(("z_w", "z_l"), (-1, 1), incentives(found, pairs), strict=True):
        for idx in range(3):
            moved = torch.zeros(3, dtype=torch.float64)
            moved[idx] = h
            up, down = (
                batch_loss(name, pairs._replace(**{field: getattr(pairs, field) + step * moved}))
                for step in (1, -1)
            )
            assert column[idx].item() == pytest.approx(sign * 3 * (up - down) / (2 * h), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_split_changes_nothing(name: str, tmp_path: Path) -> None:
    """Three steps of 8 pairs, in one part and in four, calibrated: every number, and weights to
    1e-5."""
    config = make_config(tmp_path, tmp_path / "run", Case(name, "on", "llama", "sgd"), Layout(1, 8))
    made, pairs = [], make_pairs(8, seed=3)
    for split in ((8,), (2,) * 4):
        model = make_llama()
        rows = train_small(model, pairs, config, 3, split, SmallEngine(make_llama(seed=1), config, 1))
        made.append((rows, dict(model.named_parameters())))
    (rows, weights), (other_rows, other_weights) = made
    assert_equal_rows(rows, other_rows)
    assert rows[0]["calibration/alpha"] == 1
    for key, weight in weights.items():
        torch.testing.assert_close(other_weights[key], weight, atol=1e-5, rtol=0, msg=key)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (
            {"aggregate": "kl_dro"},
            "objective.aggregate=kl_dro: takes a loss of each pair by itself, and objective=aot compares "
            "ranks within the batch; type objective.aggregate=mean",
        ),
        (
            {"sample_weight": "weight"},
            "objective.sample_weight=weight: takes a loss of each pair by itself, and objective=aot compares "
            "ranks within the batch; type objective.sample_weight=null",
        ),
    ],
)
def test_what_takes_single_pairs_is_refused(keys, line: str) -> None:
    with pytest.raises(UserError) as caught:
        objective_of({"name": "aot", **keys})
    assert str(caught.value) == line


def test_mixes_and_loops_of_your_own_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"^objective\.terms\[0\]\.name=aot: compares ranks within .*; write "
    ):
        load_objective("mix", terms=[{"name": "aot"}])
    with pytest.raises(UserError, match=r"^objective=aot: compares ranks within the global batch, .*; take "):
        Calibrator("off", "aot")
