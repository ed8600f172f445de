"""What composes with every objective: weights of pairs and KL-DRO, by hand, against differences of the whole
batch's loss, and in training runs against the plain loop, however the batch is split. And the loss of
held-out pairs, which composes all of it."""

from collections.abc import Sequence
from dataclasses import replace
from math import exp, log
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from helpers.cases import Case, Layout, make_config
from helpers.objective_cases import COMPARE_RANKS, KINKED, PAIR_A, PAIR_B, nls, s
from helpers.small_engine import SmallEngine, train_small
from helpers.tiny_models import make_llama, make_pairs
from rcpo.common.errors import UserError
from rcpo.config.compose import compose
from rcpo.config.validate import validate
from rcpo.data.batch import PairBatch, collate
from rcpo.data.pairs import SideLogProbs
from rcpo.data.tokenize import TokenizedPair, TokenizedSide
from rcpo.method.calibrators import FixedCalibration
from rcpo.objectives import (
    REGISTRY,
    Composition,
    Objective,
    PairLogProbs,
    composition_of,
    load_objective,
    objective_of,
)
from rcpo.objectives.composition import composition_defaults
from rcpo.training.aggregate import Aggregate, DrDpo, KlDro, Mean, aggregate_of, tilt
from rcpo.training.beforehand import tilted, with_mean_tokens, with_partners
from rcpo.training.held_out_loss import held_out_loss
from rcpo.training.micro_batch import MicroBatch
from rcpo.training.pricing import price
from rcpo.training.state import Method, TrainState

NAMES = sorted(set(REGISTRY) - COMPARE_RANKS)
DEFAULTS = composition_defaults()

# Prices of a batch whose log-probs are given


PAIRS = PairLogProbs(
    z_w=torch.tensor([-4.0, -9.0, -9.0, -0.2], dtype=torch.float64),
    z_l=torch.tensor([-6.0, -8.0, -8.0, -0.5], dtype=torch.float64),
    ref_w=torch.tensor([-5.0, -7.0, -7.0, -3.2], dtype=torch.float64),
    ref_l=torch.tensor([-5.0, -9.0, -7.0, -2.5], dtype=torch.float64),
    len_w=torch.tensor([2.0, 3.0, 3.0, 2.0], dtype=torch.float64),
    len_l=torch.tensor([3.0, 4.0, 4.0, 5.0], dtype=torch.float64),
)
WEIGHTS = (1.0, 2.0, 0.5, 0.0)


class KnownLogProbs:
    """In the engine's place where an aggregate wants z: what `PAIRS` says, by micro-batch."""

    def __init__(self, batches: Sequence[MicroBatch], z: Sequence[Tensor]) -> None:
        self._z = {id(batch.batch): both for batch, both in zip(batches, z, strict=True)}

    def logprobs_without_grad(self, batch: PairBatch) -> Tensor:
        return self._z[id(batch)]


class Prices(NamedTuple):
    loss: Tensor
    d_w: Tensor
    d_l: Tensor


def tokenized_pairs(pairs: PairLogProbs, weights: Sequence[float]) -> list[TokenizedPair]:
    def side(length: Tensor, token: int) -> TokenizedSide:
        return TokenizedSide([1, *[token] * int(length)], 1)

    return [
        TokenizedPair(side(len_w, 3), side(len_l, 4), row, weight)
        for row, (len_w, len_l, weight) in enumerate(zip(pairs.len_w, pairs.len_l, weights, strict=True))
    ]


def micro_batches(pairs: PairLogProbs, weights: Sequence[float], sizes: Sequence[int]) -> list[MicroBatch]:
    tokenized = tokenized_pairs(pairs, weights)
    made, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        weight = torch.tensor(weights[part], dtype=torch.float64)
        made.append(MicroBatch(collate(tokenized[part], 0), pairs.ref_w[part], pairs.ref_l[part], weight))
        start += size
    return made


def prices(
    aggregate: Aggregate,
    name: str | Objective,
    pairs: PairLogProbs = PAIRS,
    weights: Sequence[float] = WEIGHTS,
    sizes: Sequence[int] = (4,),
) -> Prices:
    """Loss and incentives that an aggregate gives the pairs, in micro-batches of `sizes`."""
    objective = load_objective(name) if isinstance(name, str) else name
    batches = micro_batches(pairs, weights, sizes)
    z = [torch.cat(both) for both in zip(pairs.z_w.split(sizes), pairs.z_l.split(sizes), strict=True)]
    seen = []
    engine = KnownLogProbs(batches, z)
    method = Method(engine, objective, aggregate, sum(sizes))  # type: ignore[arg-type]
    state = TrainState(0, FixedCalibration(), objective.initial_state(6.0))
    batches = tilted(method, state, [*with_partners(method, with_mean_tokens(method, batches))])
    for batch, both in zip(batches, z, strict=True):
        priced = price(objective, state.objective_state, batch, *both.chunk(2))
        seen.append(Prices(priced.loss, *priced.incentives))
    return Prices(*(torch.cat(columns) for columns in zip(*seen, strict=True)))


def kl_dro_loss(name: str, pairs: PairLogProbs, dro_lambda: float) -> Tensor:
    """lambda log mean exp(w loss / lambda), from the formula."""
    objective = load_objective(name)
    losses = objective(pairs._replace(state=objective.initial_state(6.0)))
    powers = torch.exp(torch.tensor(WEIGHTS, dtype=torch.float64) * losses / dro_lambda)
    return dro_lambda * powers.mean().log()


def test_a_weight_multiplies_loss_and_incentives_by_hand() -> None:
    """dpo, pairs A and B: beta mt = 0.2 and -0.3; d = 0.1 s(-0.2) and 0.1 s(0.3). Weights 3 and 0."""
    pairs = PairLogProbs(*(torch.cat(both) for both in zip(PAIR_A[:6], PAIR_B[:6], strict=True)))
    batch = micro_batches(pairs, (3.0, 0.0), (2,))[0]
    priced = price(load_objective("dpo"), (), batch, pairs.z_w, pairs.z_l)
    loss, (d_w, d_l) = priced.loss, priced.incentives
    single = load_objective("dpo")(pairs)
    assert loss.tolist() == [pytest.approx(3 * single[0].item()), 0.0]
    assert d_w.tolist() == d_l.tolist() == [pytest.approx(0.3 * s(-0.2)), 0.0]


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_of_two_is_the_pair_twice_and_of_zero_the_pair_left_out(name: str) -> None:
    """Sums over the batch, which the mean divides by B."""

    def rows(*numbers: int) -> PairLogProbs:
        return PairLogProbs(*(field[list(numbers)] for field in PAIRS[:6]))

    weighted = prices(Mean(), name, rows(0, 1, 2), (2.0, 0.0, 1.0), (3,))
    repeated = prices(Mean(), name, rows(0, 0, 2), (1.0, 1.0, 1.0), (3,))
    for one, other in zip(weighted, repeated, strict=True):
        assert torch.allclose(one.sum(), other.sum(), rtol=1e-12)


def test_dr_dpo_by_hand() -> None:
    """Losses 1, 2 and lambda 1: p = 2 (e^-1, e^-2) / (e^-1 + e^-2), L = -log mean (e^-1, e^-2); far away the
    mean, near 0 the smaller one. And its derivatives are those of L: sum p_i / B = 1."""
    ((p, total),) = DrDpo(1.0).tilts([torch.tensor([1.0, 2.0])])
    powers = [exp(-1), exp(-2)]
    assert p.tolist() == pytest.approx([2 * power / sum(powers) for power in powers])
    assert total.item() == pytest.approx(-log(sum(powers) / 2))
    assert DrDpo(1.0).of_all(torch.tensor([1.0, 2.0])) == pytest.approx(total.item())
    assert DrDpo(1e4).of_all(torch.tensor([1.0, 2.0])) == pytest.approx(1.5, abs=1e-4)
    assert DrDpo(0.01).of_all(torch.tensor([1.0, 2.0])) == pytest.approx(1 + 0.01 * log(2))
    prices_of = prices(DrDpo(0.5), "dpo")
    h = 1e-5
    moved = torch.tensor([h, 0, 0, 0], dtype=torch.float64)
    up, down = (prices(DrDpo(0.5), "dpo", PAIRS._replace(z_w=PAIRS.z_w + step * moved)) for step in (1, -1))
    slope = (up.loss.mean() - down.loss.mean()) / (2 * h)
    assert prices_of.d_w[0].item() == pytest.approx(-4 * slope.item(), rel=1e-6)


@pytest.mark.parametrize("name", sorted(set(NAMES) - KINKED))
def test_kl_dro_incentives_match_central_differences_of_the_whole_batch(name: str) -> None:
    """B dL/dz of L = lambda log mean exp(w loss/lambda), by (L(z + h) - L(z - h))/2h, fp64, h = 1e-5, for
    every z of the batch; and every split of the batch gives the same prices."""
    h = 1e-5
    scale = prices(Mean(), name).loss.abs().max().item()
    dro_lambda = 0.5 * max(1.0, scale)
    whole = prices(KlDro(dro_lambda), name)
    for field, sign, column in (("z_w", -1, whole.d_w), ("z_l", 1, whole.d_l)):
        for idx in range(4):
            moved = torch.zeros(4, dtype=torch.float64)
            moved[idx] = h
            z = getattr(PAIRS, field)
            up = kl_dro_loss(name, PAIRS._replace(**{field: z + moved}), dro_lambda)
            down = kl_dro_loss(name, PAIRS._replace(**{field: z - moved}), dro_lambda)
            slope = sign * 4 * (up - down).item() / (2 * h)
            assert column[idx].item() == pytest.approx(slope, rel=2e-6, abs=1e-7 * max(1.0, scale))
    assert whole.loss.mean().item() == pytest.approx(kl_dro_loss(name, PAIRS, dro_lambda).item(), rel=1e-12)
    for sizes in ((1, 1, 1, 1), (3, 1)):
        for one, other in zip(whole, prices(KlDro(dro_lambda), name, sizes=sizes), strict=True):
            assert torch.allclose(one, other, rtol=1e-12)


def test_tilt_by_hand() -> None:
    """Losses 0 and log 3, lambda 1: mean exp = 2, L = log 2, p = (1/2, 3/2). lambda 1/2: mean 5, p = (1/5,
    9/5), L = log(5)/2. Towards infinity: the mean."""
    losses = torch.log(torch.tensor([1.0, 3.0], dtype=torch.float64))
    for dro_lambda, expected_p, expected in (
        (1.0, [0.5, 1.5], torch.log(torch.tensor(2.0)).item()),
        (0.5, [0.2, 1.8], torch.log(torch.tensor(5.0)).item() / 2),
        (1e9, [1.0, 1.0], losses.mean().item()),
    ):
        p, total = tilt(losses, dro_lambda)
        assert p.tolist() == pytest.approx(expected_p)
        assert total.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dro_lambda", [1.0, 0.01, 1e-4])
def test_tilt_is_finite_at_losses_of_ten_thousand_lambda(dro_lambda: float) -> None:
    """fp32. The worst pair has all the weight, B; the loss is its loss less lambda log B."""
    largest = 1e4 * dro_lambda
    p, total = tilt(torch.tensor([-largest, 0.0, largest]), dro_lambda)
    assert p.tolist() == pytest.approx([0.0, 0.0, 3.0])
    assert total.item() == pytest.approx(largest - dro_lambda * torch.log(torch.tensor(3.0)).item(), rel=1e-6)


# The loss of held-out pairs


def loss_of_all(objective: Objective, aggregate: Aggregate, state: tuple[float, ...]) -> float | None:
    """Of `PAIRS`, held out."""
    held_out = tokenized_pairs(PAIRS, WEIGHTS)
    z, ref = SideLogProbs(PAIRS.z_w, PAIRS.z_l), SideLogProbs(PAIRS.ref_w, PAIRS.ref_l)
    return held_out_loss(objective, aggregate, state, held_out, z, ref)


def test_the_held_out_loss_by_hand() -> None:
    """Four pairs, of weights 1, 2, 1/2 and 0. dpo: mt = 2, -3, -1, 1, beta 0.1, so each costs nls(mt / 10).
    simpo: z/|y| = (-2, -2), (-3, -2) twice and (-0.1, -0.1): nls(2 x difference - 1). KL-DRO of dpo: log mean
    exp(weight x loss)."""
    dpo = [nls(0.2), 2 * nls(-0.3), nls(-0.1) / 2, 0.0]
    simpo = [nls(-1), 2 * nls(-3), nls(-3) / 2, 0.0]
    found = {
        name: loss_of_all(load_objective(objective), aggregate, ())
        for name, objective, aggregate in (
            ("dpo", "dpo", Mean()),
            ("simpo", "simpo", Mean()),
            ("dro", "dpo", KlDro(1.0)),
        )
    }
    assert found == {
        "dpo": pytest.approx(sum(dpo) / 4, rel=1e-12),
        "simpo": pytest.approx(sum(simpo) / 4, rel=1e-12),
        "dro": pytest.approx(log(sum(map(exp, dpo)) / 4), rel=1e-12),
    }


READ = ({}, {"log_probs": "mean"}, {"sft_mean": "tokens"})


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_the_held_out_loss_is_that_of_a_step_on_these_pairs(name: str) -> None:
    """In two micro-batches, with every aggregate and reading that the objective has. Batch statistics are
    given: acpo's is of 6 tokens a pair, where these pairs have 6.5."""
    if name == "ti_dpo":
        assert loss_of_all(load_objective(name), Mean(), ()) is None
        return
    for reading in READ:
        try:
            objective = objective_of({**DEFAULTS, "name": name, **reading})
        except UserError:
            continue
        for aggregate in (Mean(), KlDro(2.0)) if name not in COMPARE_RANKS else (Mean(),):
            step = prices(aggregate, objective, sizes=(2, 2)).loss.mean().item()
            state = objective.initial_state(6.0)
            assert loss_of_all(objective, aggregate, state) == pytest.approx(step, rel=1e-12)


def test_there_is_no_held_out_loss_without_the_references_log_probs() -> None:
    z = SideLogProbs(PAIRS.z_w, PAIRS.z_l)
    held_out = tokenized_pairs(PAIRS, WEIGHTS)
    assert held_out_loss(load_objective("dpo"), Mean(), (), held_out, z, None) is None


# The section `objective`


def test_the_shipped_keys_are_the_composition() -> None:
    """Field by field, in the file's order; without a value, each is the file's."""
    assert vars(Composition()) == DEFAULTS
    assert list(vars(Composition())) == list(DEFAULTS)
    assert composition_of({"name": "dpo"}) == composition_of({"name": "dpo", **DEFAULTS}) == Composition()
    assert isinstance(aggregate_of(Composition()), Mean)
    assert isinstance(aggregate_of(Composition(aggregate="kl_dro")), KlDro)
    assert isinstance(aggregate_of(Composition(aggregate="dr_dpo")), DrDpo)


@pytest.mark.parametrize("name", NAMES)
def test_no_objective_has_a_parameter_of_these_names(name: str) -> None:
    params = load_objective(name).params()
    assert not set(params) & set(DEFAULTS)
    assert objective_of({**DEFAULTS, "name": name, **params}) == load_objective(name)


def test_a_users_own_option_may_set_them_and_the_command_line_wins(tmp_path: Path) -> None:
    (tmp_path / "objective").mkdir()
    (tmp_path / "objective/robust.yaml").write_text("name: dpo\naggregate: kl_dro\ndro_lambda: 0.2\n")
    words = ["--config-dir", str(tmp_path), "objective=robust"]
    for more, expected in (([], 0.2), (["objective.dro_lambda=0.3"], 0.3)):
        tree = compose([*words, *more])
        assert tree is not None
        composition = composition_of(validate(tree).objective)
        assert (composition.aggregate, composition.dro_lambda) == ("kl_dro", expected)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (
            {"aggregate": "max"},
            "objective.aggregate=max: must be mean, kl_dro or dr_dpo; type ",
        ),
        ({"sample_weight": True}, "objective.sample_weight=True: must be null, weight, dora, "),
        ({"aggregate": "kl_dro", "dro_lambda": 0}, "objective.dro_lambda=0: must be greater than 0; type "),
        (
            {"aggregate": "kl_dro", "dro_lambda": "x"},
            "objective.dro_lambda=x: must be a finite number; type ",
        ),
        ({"sample_weight": "dora", "dora_a": -1.0}, "objective.dora_a=-1.0: must be greater than 0; type "),
        ({"sample_weight": "dora", "dora_a_i": -1}, "objective.dora_a_i=-1: must be 0 or greater; type "),
        (
            {"dro_lambda": 0.1},
            "objective.dro_lambda=0.1: has no effect without kl_dro or dr_dpo; type "
            "objective.aggregate=kl_dro, or objective.dro_lambda=1.0",
        ),
        (
            {"sample_weight": "weight", "dora_a": 0.1},
            "objective.dora_a=0.1: has no effect without dora or dora_mean or dora_product or dora_each; "
            "type objective.sample_weight=dora, or ",
        ),
        (
            {"sample_weight": "dora_each"},
            "objective.sample_weight=dora_each: has an exponent of kl_dro for each response, and not "
            "objective.aggregate=mean; type objective.aggregate=kl_dro, or objective.sample_weight=dora_mean",
        ),
        (
            {"sample_weight": "dora_each", "aggregate": "kl_dro", "weight_of": "batch"},
            "objective.sample_weight=dora_each: has an exponent of kl_dro for each response, and not "
            "objective.weight_of=batch; type objective.weight_of=pair, or ",
        ),
    ],
)
def test_bad_keys_are_one_line(section: dict[str, object], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        composition_of({"name": "dpo", **section})
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


def test_a_misspelt_key_is_told_the_right_one() -> None:
    with pytest.raises(UserError, match=r"dpo has no such parameter; did you mean objective\.aggregate\?"):
        objective_of({"name": "dpo", "agregate": "kl_dro"})


@pytest.mark.parametrize("aggregate", ["mean", "kl_dro", "dr_dpo"])
@pytest.mark.parametrize("split", [(4,), (1, 1, 1, 1)])
def test_a_weight_of_the_batch_is_outside_the_aggregate(
    aggregate: str, split: tuple[int, ...], tmp_path: Path
) -> None:
    """Weights 1, 2, .5 and 0: 7/8 of the unweighted loss and of its gradient, however the batch is split."""
    pairs = make_pairs(4, seed=5)
    weighed = [replace(pair, weight=weight) for pair, weight in zip(pairs, WEIGHTS, strict=True)]
    found = []
    for own, words in (
        (pairs, ()),
        (weighed, ("objective.sample_weight=weight", "objective.weight_of=batch")),
    ):
        config = make_config(
            tmp_path, tmp_path / "run", Case("dpo", "off", "llama", "sgd"), Layout(1, 2), *words,
            f"objective.aggregate={aggregate}", "optim.lr=1", "train.grad_clip=0",
        )  # fmt: skip
        model = make_llama()
        before = torch.cat([weight.detach().clone().flatten() for weight in model.parameters()])
        frozen = SmallEngine(make_llama(seed=1), config, 1)
        (row,) = train_small(model, own, config, 1, split if own is weighed else (4,), frozen)
        after = torch.cat([weight.detach().flatten() for weight in model.parameters()])
        found.append((row["train/loss"], before - after))
    (loss, gradient), (weighed_loss, weighed_gradient) = found
    assert weighed_loss == pytest.approx(0.875 * loss, rel=1e-5)
    torch.testing.assert_close(weighed_gradient, 0.875 * gradient, atol=1e-5, rtol=1e-4)
