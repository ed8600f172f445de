"""Head scores against autograd on the head path, with the hidden states as constants."""

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import rcpo.models.logprobs
from helpers.tiny_models import HIDDEN, VOCABULARY, make_batch, make_pairs
from rcpo.data.batch import PairBatch, collate
from rcpo.method.scores import HeadScores, ScoreGeometry, Sides
from rcpo.models.logprobs import TokenLogProbHead
from rcpo.models.policy import Policy

CPU = torch.device("cpu")


def plain_sides(hidden: Tensor, leaves: list[Tensor], batch: PairBatch) -> tuple[Tensor, Tensor]:
    """S_w and S_l as flat vectors: gradients of sum z_w and of sum z_l with respect to (weight, bias)."""
    logits = nn.functional.linear(hidden.detach(), *leaves).flatten(0, 1)
    logps = logits.log_softmax(-1)[batch.token_positions, batch.targets]
    chosen, rejected = logps[: batch.num_chosen_tokens].sum(), logps[batch.num_chosen_tokens :].sum()
    sides = [torch.autograd.grad(side, leaves, retain_graph=True) for side in (chosen, rejected)]
    first, second = (torch.cat([part.flatten() for part in side]).double() for side in sides)
    return first, second


@pytest.mark.parametrize("has_bias", [False, True])
def test_sums_agree_with_autograd_on_the_head_path(has_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two micro-batches add up; the upstream gradient (here random) does not enter; norms and dot to 1e-5."""
    monkeypatch.setattr(rcpo.models.logprobs, "CHUNK_ELEMENTS", 16 * VOCABULARY)
    projection = nn.Linear(HIDDEN, VOCABULARY, bias=has_bias)
    head = TokenLogProbHead(projection)
    head.scores = HeadScores(VOCABULARY, HIDDEN, has_bias, CPU)
    total_w, total_l = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for seed in (1, 2):
        batch = make_batch(5, seed=seed)
        hidden = torch.randn(*batch.input_ids.shape, HIDDEN, requires_grad=True)
        logps = head(hidden, batch)
        logps.backward(torch.randn(len(logps)))
        s_w, s_l = plain_sides(hidden, list(projection.parameters()), batch)
        total_w, total_l = total_w + s_w, total_l + s_l
    expected = torch.stack([total_w @ total_w, total_l @ total_l, total_w @ total_l])
    torch.testing.assert_close(head.scores.sides(1.0, 1.0).partial_products(), expected, rtol=1e-5, atol=1e-5)
    head.scores.reset()
    assert head.scores.sides(1.0, 1.0).partial_products().tolist() == [0.0, 0.0, 0.0]


def test_tied_or_not_only_the_head_path_counts(tiny_model: PreTrainedModel) -> None:
    """Invariant 11: with tied embeddings too, the scores leave the embedding's own gradient out."""
    batch = make_batch(4, seed=5)
    policy = Policy(tiny_model)
    policy.head.scores = HeadScores(VOCABULARY, HIDDEN, False, CPU)
    policy(batch).sum().backward()
    hidden = tiny_model.get_decoder()(input_ids=batch.input_ids).last_hidden_state
    s_w, s_l = plain_sides(hidden, [policy.head.weight], batch)
    expected = torch.stack([s_w @ s_w, s_l @ s_l, s_w @ s_l])
    torch.testing.assert_close(
        policy.head.scores.sides(1.0, 1.0).partial_products(), expected, rtol=1e-4, atol=1e-4
    )


def test_measuring_changes_no_gradient(tiny_model: PreTrainedModel) -> None:
    """Bit for bit the same gradients with and without scores."""
    batch = make_batch(4, seed=5)
    policy = Policy(tiny_model)
    gradients = []
    for scores in (None, HeadScores(VOCABULARY, HIDDEN, False, CPU)):
        policy.head.scores = scores
        policy.zero_grad()
        policy(batch).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in policy.parameters()])
    assert all(torch.equal(plain, measured) for plain, measured in zip(*gradients, strict=True))


def test_splitting_into_micro_batches_changes_nothing(tiny_model: PreTrainedModel) -> None:
    """One batch of 6 pairs, or 6 of one: the same sums, so the same geometry."""
    pairs = make_pairs(6, seed=8)
    policy = Policy(tiny_model)
    squares = []
    for size in (6, 1):
        policy.head.scores = HeadScores(VOCABULARY, HIDDEN, False, CPU)
        for start in range(0, 6, size):
            policy(collate(pairs[start : start + size], 0)).sum().backward()
        squares.append(policy.head.scores.sides(1.0, 1.0).partial_products())
    torch.testing.assert_close(squares[1], squares[0], rtol=1e-4, atol=1e-4)


def test_blocks_of_rows_cover_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """37 rows in blocks of 5 give the norms and dot of one block."""
    scores = HeadScores(VOCABULARY, HIDDEN, False, CPU)
    for chosen in (True, False):
        scores.add(chosen, torch.randn(11, VOCABULARY), torch.randn(11, HIDDEN))
    whole = scores.sides(1.0, 1.0).partial_products()
    monkeypatch.setattr("rcpo.method.scores.NUMBERS_AT_ONCE", {"cpu": 5})
    torch.testing.assert_close(scores.sides(1.0, 1.0).partial_products(), whole, rtol=1e-12, atol=0)


def test_geometry_by_hand() -> None:
    """|v_w|^2 = 9, |v_l|^2 = 4, dot 3: norms 3 and 2, rho = 3/6."""
    geometry = ScoreGeometry(9.0, 4.0, 3.0)
    assert (geometry.chosen_norm, geometry.rejected_norm, geometry.cosine) == (3.0, 2.0, 0.5)


def test_sides_scale_their_products() -> None:
    """v_w = 1/2 (6, 0), v_l = -2 (0.5, 1): |v_w|^2 = 9, |v_l|^2 = 5, dot = -3; parts of a vector in any
    cut."""
    sides = Sides(
        [torch.tensor([6.0]), torch.tensor([0.0])], [torch.tensor([0.5]), torch.tensor([1.0])], 0.5, -2.0
    )
    assert sides.partial_products().tolist() == [9.0, 5.0, -3.0]


@pytest.mark.parametrize(
    ("squares", "cosine"),
    [
        ((1.0, 1.0, 1.0 + 1e-15), 1.0),
        ((1.0, 1.0, -1.0 - 1e-15), -1.0),
        ((0.0, 1.0, 0.0), math.nan),
        ((math.inf, 1.0, 2.0), math.nan),
        ((1.0, 1.0, math.nan), math.nan),
    ],
)
def test_cosine_stays_in_range_and_never_hides_a_nan(
    squares: tuple[float, float, float], cosine: float
) -> None:
    """Rounding past +-1 is cut; a zero or non-finite score has no cosine."""
    assert ScoreGeometry(*squares).cosine == pytest.approx(cosine, nan_ok=True, abs=0)
