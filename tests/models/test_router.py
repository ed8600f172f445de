"""The load-balancing loss of experts: transformers' own number, its gradient, and that it depends neither on
padding nor on how a batch is split, and touches no score."""

from pathlib import Path

import pytest
import torch

from helpers.cases import Case, Layout, make_config
from helpers.same_run import assert_equal_rows
from helpers.small_engine import train_small
from helpers.tiny_models import make_llama, make_mixtral, make_pairs
from rcpo.common.errors import UserError
from rcpo.data.batch import collate
from rcpo.data.joint import collate_joint
from rcpo.models.policy import Policy
from rcpo.models.router import check_router, expert_costs, real_tokens

ROUTER = "model.router_loss=0.5"


def attention_mask(batch, pairs):
    lengths = torch.tensor(
        [side.num_tokens for side in [p.chosen for p in pairs] + [p.rejected for p in pairs]]
    )
    return torch.arange(batch.input_ids.shape[1]) < lengths[:, None]


def test_real_tokens_are_those_of_the_pairs() -> None:
    """Padded rows, and one row of all of them."""
    pairs = make_pairs(4, seed=1)
    batch = collate(pairs, 0)
    assert torch.equal(real_tokens(batch), attention_mask(batch, pairs))
    packed = collate_joint(pairs, 0, share_prefix=False, packing=True)
    assert int(real_tokens(packed).sum()) == int(attention_mask(batch, pairs).sum())


def test_the_loss_is_that_of_transformers() -> None:
    """Their aux_loss of the padded batch with its attention mask; even choices of all experts give k = 2."""
    model, pairs = make_mixtral(), make_pairs(5, seed=2)
    batch = collate(pairs, 0)
    with torch.no_grad():
        sums = Policy(model).eval()(batch, experts=True)
        theirs = model(
            input_ids=batch.input_ids,
            attention_mask=attention_mask(batch, pairs).long(),
            output_router_logits=True,
        ).aux_loss
    loss, _ = expert_costs(sums)
    assert loss == pytest.approx(float(theirs), rel=1e-6)
    even, costs = expert_costs(torch.tensor([5.0, 5, 5, 5, 2.5, 2.5, 2.5, 2.5, 10], dtype=torch.float64))
    assert even == pytest.approx(2)
    assert costs.tolist() == pytest.approx([0.2] * 4)


@pytest.mark.parametrize("calibration", ["off", "exact"])
def test_a_step_adds_its_gradient_and_scores_see_nothing_of_it(calibration: str, tmp_path: Path) -> None:
    """With and without: the update differs by 0.5 lr times autograd of transformers' aux_loss of the whole
    batch, the norms of both sides are equal; in one part and in four."""
    pairs, case = make_pairs(8, seed=3), Case("simpo", calibration, "llama", "sgd")
    after, rows = {}, {}
    for word in (ROUTER, "model.router_loss=0"):
        for split in ((8,), (2,) * 4):
            config = make_config(tmp_path, tmp_path / "run", case, Layout(1, 8), word, "train.grad_clip=0",
                                 "optim.lr=1.0")  # fmt: skip
            model = make_mixtral()
            (rows[word, split],) = train_small(model, pairs, config, 1, split)
            after[word, split] = dict(model.named_parameters())
    model, batch = make_mixtral(), collate(pairs, 0)
    aux = model(
        input_ids=batch.input_ids,
        attention_mask=attention_mask(batch, pairs).long(),
        output_router_logits=True,
    ).aux_loss
    gradients = torch.autograd.grad(aux, list(model.parameters()), allow_unused=True, materialize_grads=True)
    largest = max(float(each.abs().max()) for each in gradients)
    for split in ((8,), (2,) * 4):
        with_it, without = rows[ROUTER, split], rows["model.router_loss=0", split]
        assert with_it["train/router_loss"] == pytest.approx(float(aux), rel=1e-5)
        assert with_it["train/loss"] == pytest.approx(without["train/loss"] + 0.5 * float(aux), rel=1e-5)
        if calibration == "exact":
            for key in ("score/chosen_norm", "score/rejected_norm"):
                assert with_it[key] == pytest.approx(without[key], rel=1e-5)
        for (key, _), gradient in zip(model.named_parameters(), gradients, strict=True):
            moved = after["model.router_loss=0", split][key] - after[ROUTER, split][key]
            torch.testing.assert_close(moved, 0.5 * gradient, atol=2e-4 * largest, rtol=0, msg=key)


def test_a_split_changes_nothing(tmp_path: Path) -> None:
    """Three calibrated steps, with the weights of KL-DRO: every number and the weights."""
    case = Case("dpo", "on", "llama", "sgd")
    config = make_config(tmp_path, tmp_path / "run", case, Layout(1, 8), ROUTER, "objective.aggregate=kl_dro")
    made = []
    for split in ((8,), (2,) * 4):
        model = make_mixtral()
        rows = train_small(model, make_pairs(8, seed=3), config, 3, split)
        made.append((rows, dict(model.named_parameters())))
    (rows, weights), (other_rows, other_weights) = made
    assert_equal_rows(rows, other_rows)
    for key, weight in weights.items():
        torch.testing.assert_close(other_weights[key], weight, atol=1e-5, rtol=0, msg=key)


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"^model\.router_loss=0\.1: Llama.* has no router .*; type model\.router_loss=0$"
    ):
        check_router(make_llama(), 0.1)
    check_router(make_llama(), 0.0)
    check_router(make_mixtral(), 0.1)
