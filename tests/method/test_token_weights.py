"""What a loss reads beside sums of log-probs: tokens past the shorter response (ld_alpha), how likely the
responses are (wpo), the prompt's likelihood (sft_of=text): by hand, against autograd over whole logits, and
that a split changes nothing."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.cases import Case, Layout, make_config
from helpers.objective_cases import COMPARE_RANKS
from helpers.same_run import assert_equal_rows
from helpers.small_engine import SmallEngine, train_small
from helpers.tiny_models import make_llama, make_pairs
from rcpo.common.errors import UserError
from rcpo.data.batch import collate, collate_sides, prompt_as_response, tail_weights
from rcpo.data.pairs import NO_SIDE, TokenizedSide
from rcpo.library.calibrator import Calibrator
from rcpo.models.policy import Policy, read
from rcpo.objectives import REGISTRY, load_objective, objective_of

LD, WPO, TEXT = "objective.ld_alpha=0.3", "objective.wpo=true", "objective.sft_of=text"
PLAIN = "objective.sft_of=plain"
MATRIX = pytest.mark.ci("rows of matrices")
CASES = {
    "dpo with both": ("dpo", [LD, WPO]),
    "ld in a mean": ("simpo", [LD]),
    "orpo as TRL has it": ("orpo", [TEXT, "objective.sft_mean=tokens"]),
    "all three": ("rpo", [LD, WPO, TEXT]),
    "ld beside a plain likelihood": ("rpo", [LD, PLAIN]),
}


def token_logps(model, side: TokenizedSide) -> tuple[Tensor, Tensor]:
    """Of the response's tokens: log p, and log sum_v p_v^2, from whole logits."""
    logits = model(input_ids=torch.tensor([side.input_ids])).logits[0]
    logps = logits.log_softmax(-1)[side.num_prompt - 1 : -1]
    targets = torch.tensor(side.input_ids[side.num_prompt :])
    return logps.gather(1, targets[:, None]).squeeze(1), (2 * logps).logsumexp(-1)


class Plain:
    """A pair's numbers, one by one."""

    def __init__(self, model, pair, alpha: float) -> None:
        sides = [token_logps(model, side) for side in pair.sides]
        self.len_w, self.len_l = (len(logps) for logps, _ in sides)
        shared = min(self.len_w, self.len_l)
        self.z_w, self.z_l = (logps[:shared].sum() + alpha * logps[shared:].sum() for logps, _ in sides)
        self.plain_w = sides[0][0].sum()
        self.sum_w = float(self.plain_w.detach())
        self.weight = torch.stack([(logps - of_all).mean() for logps, of_all in sides]).sum().exp().detach()
        prompt = prompt_as_response(pair.chosen)
        self.prompt = token_logps(model, prompt)[0].sum() if prompt is not NO_SIDE else torch.zeros(())
        self.num_text = len(pair.chosen.input_ids) - 1


def plain_loss(case: str, model, reference, pairs) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss, and its parts that pull the chosen and push the rejected response, from the formulas."""
    name, keys = CASES[case]
    alpha = 0.3 if LD in keys else 1.0
    losses, num_tokens = [], sum(len(pair.chosen.input_ids) - 1 for pair in pairs)
    for pair in pairs:
        one = Plain(model, pair, alpha)
        with torch.no_grad():
            ref = Plain(reference, pair, alpha)
        mean_w, mean_l = one.z_w / one.len_w, one.z_l / one.len_l
        if name == "simpo":
            loss = -F.logsigmoid(2 * (mean_w - mean_l) - 1)
        elif name == "orpo":
            odds = (mean_w - torch.log1p(-mean_w.exp())) - (mean_l - torch.log1p(-mean_l.exp()))
            likelihood = -(one.z_w + one.prompt) * len(pairs) / num_tokens
            loss = likelihood - 0.1 * F.logsigmoid(odds)
        else:
            loss = -F.logsigmoid(0.1 * (one.z_w - ref.z_w - one.z_l + ref.z_l))
            if PLAIN in keys:
                loss = loss - one.plain_w / one.len_w
            elif name == "rpo":
                loss = loss - (one.z_w + one.prompt) / one.num_text
        losses.append(loss * (one.weight if WPO in keys else 1))
    return torch.stack(losses).mean()


def test_weights_of_tokens_by_hand() -> None:
    """|y_w| = (2, 3), |y_l| = (4, 1): two of the first pair's rejected tokens are past it, two of the second
    one's chosen."""
    weights = tail_weights(torch.tensor([2, 3, 4, 1]), 0.25)
    assert weights.tolist() == [1, 1, 1, 0.25, 0.25, 1, 1, 0.25, 0.25, 1]


def test_what_a_pass_gives_beside_z() -> None:
    """Weighted sums, plain sums and likeliness, against whole logits; plain sums are those of an ordinary
    pass, bit for bit; of one side alone the same."""
    model, pairs = make_llama(), make_pairs(5, seed=2)
    policy, batch = Policy(model), collate(pairs, 0)
    asked = batch._replace(token_weights=tail_weights(batch.lengths, 0.3), gives_log_weights=True)
    z, sums, log_weights, _ = read(policy(asked), asked)
    assert torch.equal(sums, policy(batch))
    assert z.requires_grad
    assert log_weights is not None
    plain = [Plain(model, pair, 0.3) for pair in pairs]
    both = torch.stack([each.z_w for each in plain] + [each.z_l for each in plain])
    torch.testing.assert_close(z, both, atol=1e-5, rtol=1e-5)
    weight = torch.stack(log_weights.chunk(2)).sum(0).exp()
    torch.testing.assert_close(weight, torch.stack([each.weight for each in plain]), atol=0, rtol=1e-4)
    rejected = asked.side(chosen=False)
    torch.testing.assert_close(read(policy(rejected), rejected).z, z[5:], atol=1e-5, rtol=1e-5)
    ordinary = read(policy(batch), batch)
    assert ordinary.sums is ordinary.z
    assert ordinary.log_weights is None


def test_texts_beside_may_be_missing() -> None:
    """A prompt of one token has none that a model predicts."""
    sides = [TokenizedSide([5, 6, 7, 8], 3), TokenizedSide([5, 8], 1), TokenizedSide([4, 9, 8], 2)]
    batch = collate_sides([prompt_as_response(side) for side in sides], 0)
    assert batch.lengths.tolist() == [2, 0, 1]
    assert batch.targets.tolist() == [6, 7, 9]
    assert Policy(make_llama())(batch)[1] == 0
    assert collate_sides([NO_SIDE, NO_SIDE], 0).lengths.tolist() == [0, 0]


@pytest.mark.parametrize(
    "case", [case if case == "all three" else pytest.param(case, marks=MATRIX) for case in CASES]
)
def test_loss_and_gradient_are_the_formulas(case: str, tmp_path: Path) -> None:
    """One SGD step of 8 pairs in four micro-batches, uncalibrated, against autograd on the formula: loss to
    1e-5, weights to 1e-5 of the step. Displacement is of plain sums."""
    name, keys = CASES[case]
    pairs, reference = make_pairs(8, seed=4), make_llama(seed=1)
    config = make_config(tmp_path, tmp_path / "run", Case(name, "off", "llama", "sgd"), Layout(1, 2), *keys,
                         "optim.lr=1.0", "train.grad_clip=0")  # fmt: skip
    model, plain = make_llama(), make_llama()
    (row,) = train_small(model, pairs, config, 1, (2,) * 4, SmallEngine(reference, config, 1))
    loss = plain_loss(case, plain, reference, pairs)
    assert row["train/loss"] == pytest.approx(float(loss), rel=1e-5)
    gradients = torch.autograd.grad(loss, list(plain.parameters()))
    weights = dict(model.named_parameters())
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    for (key, before), gradient in zip(plain.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(before - weights[key], gradient, atol=2e-5 * largest, rtol=0, msg=key)
    fresh = make_llama()
    with torch.no_grad():
        moved = [Plain(fresh, pair, 1.0).sum_w - Plain(reference, pair, 1.0).sum_w for pair in pairs]
    assert row["displacement/chosen"] == pytest.approx(sum(moved) / 8, abs=1e-4)


@pytest.mark.parametrize(
    ("calibration", "scope"), [("exact", "full"), pytest.param("on", "head", marks=MATRIX)]
)
def test_scores_are_those_of_what_the_loss_reads(calibration: str, scope: str, tmp_path: Path) -> None:
    """dpo with ld_alpha and wpo: exact: norms of the two halves of the gradient. on: gradients of the mean of
    weighted z by the head alone; both by autograd on whole logits."""
    pairs, reference = make_pairs(8, seed=4), make_llama(seed=1)
    case = Case("dpo", calibration, "llama", "sgd")
    config = make_config(tmp_path, tmp_path / "run", case, Layout(1, 4), LD, WPO)
    (row,) = train_small(make_llama(), pairs, config, 1, (4, 4), SmallEngine(reference, config, 1))
    plain = make_llama()
    of = [Plain(plain, pair, 0.3) for pair in pairs]
    with torch.no_grad():
        ref = [Plain(reference, pair, 0.3) for pair in pairs]
    margins = [a.z_w - b.z_w - a.z_l + b.z_l for a, b in zip(of, ref, strict=True)]
    d = [
        0.1 * each.weight * torch.sigmoid(-0.1 * margin.detach())
        for each, margin in zip(of, margins, strict=True)
    ]
    assert row["incentive/chosen"] == pytest.approx(float(sum(d)) / 8, rel=1e-5)
    leaves = list(plain.parameters()) if scope == "full" else [plain.get_output_embeddings().weight]
    weights = d if calibration == "exact" else [torch.ones(())] * 8
    for key, side in (("chosen", "z_w"), ("rejected", "z_l")):
        total = sum(weight * getattr(each, side) for weight, each in zip(weights, of, strict=True)) / 8
        gradient = torch.autograd.grad(total, leaves, retain_graph=True)
        norm = torch.cat([part.flatten() for part in gradient]).norm()
        assert row[f"score/{key}_norm"] == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.parametrize("case", [pytest.param("dpo with both", marks=MATRIX), "all three"])
def test_a_split_changes_nothing(case: str, tmp_path: Path) -> None:
    """Three calibrated steps of 8 pairs in one part and in four; all three: with KL-DRO as well."""
    name, keys = CASES[case]
    keys = [*keys, "objective.aggregate=kl_dro"] if case == "all three" else keys
    config = make_config(tmp_path, tmp_path / "run", Case(name, "exact", "llama", "sgd"), Layout(1, 8), *keys)
    made, pairs = [], make_pairs(8, seed=3)
    for split in ((8,), (2,) * 4):
        model = make_llama()
        rows = train_small(model, pairs, config, 3, split, SmallEngine(make_llama(seed=1), config, 1))
        made.append((rows, dict(model.named_parameters())))
    (rows, weights), (other_rows, other_weights) = made
    assert_equal_rows(rows, other_rows)
    for key, weight in weights.items():
        torch.testing.assert_close(other_weights[key], weight, atol=1e-5, rtol=0, msg=key)


@pytest.mark.parametrize("name", sorted(set(REGISTRY) - {"mix"}))
def test_with_every_objective_or_refused(name: str) -> None:
    """ld_alpha has no place where tokens are weighed already, wpo none where ranks are compared, neither of
    lists, sft_of none without a likelihood term; each refusal says what to type."""
    is_listwise = load_objective(name).listwise
    for keys, refused in (
        ({"ld_alpha": 0.5}, name == "ti_dpo" or is_listwise),
        ({"wpo": True}, name in COMPARE_RANKS or is_listwise),
        ({"sft_of": "text"}, name not in {"sft", "cpo", "slic", "rpo", "orpo"}),
    ):
        (key,) = keys
        if not refused:
            assert objective_of({"name": name, **keys}).reads_tokens
            continue
        with pytest.raises(UserError, match=rf"^objective\.{key}=.*; type objective\.{key}="):
            objective_of({"name": name, **keys})


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (
            {"ld_alpha": 1.5},
            "objective.ld_alpha=1.5: must be at least 0 and at most 1; type objective.ld_alpha=1.0",
        ),
        ({"wpo": 1}, "objective.wpo=1: must be true or false; type objective.wpo=false"),
        (
            {"sft_of": "prompt"},
            "objective.sft_of=prompt: must be response, plain, text or gold; type objective.sft_of=text",
        ),
    ],
)
def test_bad_values_are_one_line(keys, line: str) -> None:
    with pytest.raises(UserError) as caught:
        objective_of({"name": "rpo", **keys})
    assert str(caught.value) == line


def test_what_is_refused_elsewhere() -> None:
    """Mismatched pairs are scored by sums; a loop of one's own gives sums too."""
    with pytest.raises(
        UserError, match=r"^objective\.ld_alpha=0\.5: .*mismatched.*; type objective\.ld_alpha=1"
    ):
        objective_of({"name": "kto", "kl": "mismatched", "ld_alpha": 0.5})
    with pytest.raises(UserError, match=r"^objective=dpo: its loss reads more .*; type .*ld_alpha=1, "):
        Calibrator("off", objective_of({"name": "dpo", "wpo": True}))
    assert not load_objective("dpo").reads_tokens
