"""The switches that formulas share: label smoothing, divergences, no reference, means of likelihood terms;
what they are by hand, how they combine, what they cannot change, and that a split changes nothing."""

import dataclasses
from math import exp, expm1, log
from pathlib import Path

import pytest
import torch

from helpers.cases import Case, Layout, make_config
from helpers.objective_cases import COMPARE_RANKS, PAIR_A, PAIR_B, nls
from helpers.same_run import assert_equal_rows
from helpers.small_engine import train_small
from helpers.tiny_models import make_llama, make_pairs
from rcpo.common.errors import UserError
from rcpo.library.calibrator import Calibrator
from rcpo.method.incentives import incentives
from rcpo.objectives import REGISTRY, PairLogProbs, load_objective, objective_of
from rcpo.objectives.reading import Reading

NAMES = sorted(REGISTRY)
BOTH = PairLogProbs(*(torch.cat(fields) for fields in zip(PAIR_A[:6], PAIR_B[:6], strict=True)))
"""r_w = (1, -2), r_l = (-1, 1), |y_w| = (2, 3), |y_l| = (3, 4), z_w = (-4, -9), m = (2, -1)."""
SMOOTHED = {
    "dpo": (0.2, -0.3), "ti_dpo": (0.2, -0.3), "dpo_norm": (25 / 6, -55 / 12), "simpo": (-1.0, -3.0),
    "aot": (0.2, -0.3), "aot_unpaired": (0.2, -0.3),
    "r_dpo": (0.15, -0.35), "dpop": (0.6, -30.9), "dpo_shift": (0.0195, -0.0295), "acpo": (0.1, -0.3),
    "bdpo": (0.1 * (1 - log((exp(-1) + 1) / 2)), 0.1 * (-2 - log((exp(1) + 1) / 2))),
    "alpha_po": (-0.75, 10 * (exp(0.5) - exp(0.75)) - 0.75),
}  # fmt: skip
"""Losses that are -log sigmoid of this logit, for pairs A and B; worked in objective_cases.py."""
AND_MORE = {"cpo", "rpo", "orpo", "cal_dpo", "bco", "dil_bce", "mix"}
"""Losses of a sigmoid and something else, or of two sigmoids."""
OF_MARGIN = {
    "dpo", "ti_dpo", "dpo_norm", "cdpo", "robust_dpo", "ipo", "hinge", "exo", "discopop", "r_dpo", "dpop",
    "rpo", "mix", "pl_dpo",
}  # fmt: skip
LIKELIHOOD = {"sft", "cpo", "slic", "rpo", "orpo", "mix"}


def read(name: str, **keys):
    return objective_of({"name": name, **keys})


# Label smoothing


@pytest.mark.parametrize("name", SMOOTHED)
def test_smoothing_by_hand(name: str) -> None:
    """0.9 nls(x) + 0.1 nls(-x)."""
    expected = [0.9 * nls(logit) + 0.1 * nls(-logit) for logit in SMOOTHED[name]]
    objective = read(name, label_smoothing=0.1)
    assert [objective(pair).item() for pair in (PAIR_A, PAIR_B)] == pytest.approx(expected)


def test_smoothing_of_a_sigmoid_and_something_else() -> None:
    """Pair A: cpo: sigmoid of 0.2 and 2 nats a token; bco: of 0.1 twice; dpo so smoothed is cdpo."""
    of_margin = 0.75 * nls(0.2) + 0.25 * nls(-0.2)
    assert read("cpo", label_smoothing=0.25)(PAIR_A).item() == pytest.approx(of_margin + 2)
    assert read("rpo", label_smoothing=0.25)(PAIR_A).item() == pytest.approx(of_margin + 2)
    of_side = 0.75 * nls(0.1) + 0.25 * nls(-0.1)
    assert read("bco", label_smoothing=0.25)(PAIR_A).item() == pytest.approx(2 * of_side)
    assert torch.equal(read("dpo", label_smoothing=0.1)(BOTH), load_objective("cdpo")(BOTH))


# Divergences


@pytest.mark.parametrize(
    ("keys", "u"),
    [
        ({"divergence": "forward_kl"}, lambda r: 1 - exp(-r)),
        ({"divergence": "js"}, lambda r: log(2) - nls(r)),
        ({"divergence": "alpha"}, lambda r: expm1(-0.5 * r) / -0.5),
        ({"divergence": "alpha", "divergence_alpha": 3.0}, lambda r: expm1(2 * r) / 2),
    ],
)
def test_divergences_by_hand(keys, u) -> None:
    """dpo: nls(0.1 (u(r_w) - u(r_l))). ipo: over the lengths. Near r = 0 u is r, so a small pair has dpo's
    loss."""
    expected = [nls(0.1 * (u(1) - u(-1))), nls(0.1 * (u(-2) - u(1)))]
    assert read("dpo", **keys)(BOTH).tolist() == pytest.approx(expected)
    expected = [(u(1) / 2 - u(-1) / 3 - 5) ** 2, (u(-2) / 3 - u(1) / 4 - 5) ** 2]
    assert read("ipo", **keys)(BOTH).tolist() == pytest.approx(expected)
    near = PAIR_A._replace(z_w=PAIR_A.ref_w + 1e-6, z_l=PAIR_A.ref_l - 1e-6)
    slope = 0.5 if keys["divergence"] == "js" else 1.0
    assert incentives(read("dpo", **keys), near).d_w.item() == pytest.approx(slope * 0.05, rel=1e-4)


@pytest.mark.parametrize("r", [-1e4, -100.0, 100.0, 1e4])
@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
def test_divergences_stay_finite(divergence: str, r: float) -> None:
    """fp32, where e^89 is infinite; the incentive is finite too, and of no wrong sign."""
    pair = PairLogProbs(*(torch.tensor([value]) for value in (r, 0.0, 0.0, 0.0, 1.0, 1.0)))
    objective = read("dpo", divergence=divergence)
    assert objective(pair).isfinite().all()
    d_w, d_l = incentives(objective, pair)
    assert d_w.isfinite().all()
    assert d_w.item() >= 0
    assert d_l.item() >= 0


# No reference


def test_without_a_reference() -> None:
    """Pair A: m = 2, z/|y| = -2 on both sides. dpo: nls(0.1 m), ipo: (0 - 5)^2; the objective says that it
    needs none, and another reference changes nothing."""
    for name, value in (("dpo", nls(0.2)), ("ipo", 25.0), ("hinge", 0.8)):
        objective = read(name, reference_free=True)
        assert not objective.needs_reference
        assert objective(PAIR_A).item() == pytest.approx(value)
        moved = PAIR_A._replace(ref_w=PAIR_A.ref_w + 3)
        assert torch.equal(objective(moved), objective(PAIR_A))


# Likelihood terms


def test_means_of_likelihood_terms_by_hand() -> None:
    """z_w = (-4, -9), |y_w| = (2, 3): a pair 2 and 3, summed 4 and 9, over the batch's mean 2.5 1.6 and 3.6,
    whose mean 2.6 is 13 nats of 5 tokens. slic has 0.1 of it, summed as its formula is; hinge parts 0 and
    2."""
    for mean, values in (("pairs", [2, 3]), ("sum", [4, 9]), ("tokens", [1.6, 3.6])):
        assert read("sft", sft_mean=mean)(BOTH).tolist() == pytest.approx(values)
        slic = [0 + 0.1 * values[0], 2 + 0.1 * values[1]]
        assert read("slic", sft_mean=mean)(BOTH).tolist() == pytest.approx(slic)
        averaged = read("sft", sft_mean=mean, log_probs="mean")
        assert averaged(BOTH).tolist() == pytest.approx(values)
    assert torch.equal(read("slic", sft_mean="sum")(BOTH), load_objective("slic")(BOTH))
    of_run = BOTH._replace(mean_tokens=5.0)
    assert read("sft", sft_mean="tokens")(of_run).tolist() == pytest.approx([0.8, 1.8])


def test_a_mix_hands_the_switches_to_its_terms() -> None:
    """Pair A with m = 2, z_w = -4: 0.9 nls(0.2) + 0.1 nls(-0.2), and 0.2 * 4."""
    mix = read("mix", terms=[{"name": "dpo"}, {"name": "sft", "weight": 0.2}], label_smoothing=0.1,
               sft_mean="sum", reference_free=True)  # fmt: skip
    assert mix(PAIR_A).item() == pytest.approx(0.9 * nls(0.2) + 0.1 * nls(-0.2) + 0.8)
    assert not mix.needs_reference


# With every objective


@pytest.mark.parametrize("name", NAMES)
def test_a_switch_changes_a_loss_or_is_refused(name: str) -> None:
    """What a formula has not cannot be switched: one line that says so, and what to type."""
    allowed = {
        "label_smoothing": (0.1, name in SMOOTHED or name in AND_MORE),
        "divergence": ("js", name in OF_MARGIN),
        "sft_mean": ("tokens", name in LIKELIHOOD),
        "reference_free": (True, load_objective(name).needs_reference and name != "ti_dpo"),
    }
    for key, (value, works) in allowed.items():
        if works:
            loss = read(name, **{key: value})(BOTH)
            assert loss.isfinite().all()
            assert not torch.equal(loss, load_objective(name)(BOTH))
            continue
        with pytest.raises(UserError, match=rf"^objective\.{key}=.*; type objective\.{key}=\w") as caught:
            read(name, **{key: value})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted((set(SMOOTHED) | AND_MORE | OF_MARGIN | LIKELIHOOD) - COMPARE_RANKS))
def test_incentives_match_central_differences(name: str) -> None:
    """(L(z + h) - L(z - h))/2h in fp64 at h = 1e-5, with every switch that the loss has."""
    keys = {
        "label_smoothing": 0.2 if name in SMOOTHED or name in AND_MORE else 0.0,
        "divergence": "alpha" if name in OF_MARGIN else "reverse_kl",
        "sft_mean": "tokens" if name in LIKELIHOOD else None,
    }
    objective, h = read(name, **keys), 1e-5
    d_w, d_l = incentives(objective, BOTH)
    for field, sign, found in (("z_w", -1, d_w), ("z_l", 1, d_l)):
        up, down = (objective(BOTH._replace(**{field: getattr(BOTH, field) + step})) for step in (h, -h))
        assert torch.allclose(
            found, sign * (up - down) / (2 * h), rtol=1e-5, atol=1e-6 * float(d_w.abs().max())
        )


@pytest.mark.parametrize("key", [each.name for each in dataclasses.fields(Reading)])
def test_a_key_alone_leaves_the_others_as_they_are(key: str) -> None:
    """A reading without arguments is every formula as it is written."""
    assert dataclasses.asdict(read("dpo").reading)[key] == dataclasses.asdict(Reading())[key]


@pytest.mark.parametrize("objective", ["sft", "cpo", "mix"])
def test_a_split_changes_nothing(objective: str, tmp_path: Path) -> None:
    """sft_mean=tokens, three steps of 8 pairs whose lengths differ, in one part and in four: every number,
    and weights to 1e-5; and sft's loss is nats of the batch over its tokens."""
    terms = ["objective.terms=[{name: dpo}, {name: sft, weight: 0.5}]"] if objective == "mix" else []
    case = Case(objective, "off", "llama", "sgd")
    config = make_config(tmp_path, tmp_path / "run", case, Layout(1, 8), "objective.sft_mean=tokens", *terms)
    made, pairs = [], make_pairs(8, seed=3)
    for split in ((8,), (2,) * 4):
        model = make_llama()
        rows = train_small(model, pairs, config, 3, split)
        made.append((rows, dict(model.named_parameters())))
    (rows, weights), (other_rows, other_weights) = made
    assert_equal_rows(rows, other_rows)
    for key, weight in weights.items():
        torch.testing.assert_close(other_weights[key], weight, atol=1e-5, rtol=0, msg=key)
    if objective == "sft":
        num_tokens = sum(len(pair.chosen.input_ids) - pair.chosen.num_prompt for pair in pairs)
        assert rows[0]["train/loss"] == pytest.approx(-8 * rows[0]["logps/chosen"] / num_tokens, rel=1e-5)


# Keys


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (
            {"label_smoothing": 0.5},
            "objective.label_smoothing=0.5: must be at least 0 and less than 0.5; type "
            "objective.label_smoothing=0.0",
        ),
        (
            {"divergence": "kl"},
            "objective.divergence=kl: must be reverse_kl, forward_kl, js or alpha; type "
            "objective.divergence=js",
        ),
        (
            {"divergence": "alpha", "divergence_alpha": 1.0},
            "objective.divergence_alpha=1.0: must be other than 1, where it is reverse_kl; type "
            "objective.divergence_alpha=0.5",
        ),
        (
            {"divergence_alpha": 0.3},
            "objective.divergence_alpha=0.3: has no effect without alpha; type objective.divergence=alpha, "
            "or objective.divergence_alpha=0.5",
        ),
        (
            {"sft_mean": "batch"},
            "objective.sft_mean=batch: must be null, pairs, tokens or sum; type objective.sft_mean=tokens",
        ),
        (
            {"reference_free": 1},
            "objective.reference_free=1: must be true or false; type objective.reference_free=false",
        ),
        (
            {"reference_free": True, "divergence": "js"},
            "objective.divergence=js: is a divergence from the reference, and objective.reference_free=true "
            "takes it away; type objective.divergence=reverse_kl",
        ),
    ],
)
def test_bad_values_are_one_line(keys, line: str) -> None:
    with pytest.raises(UserError) as caught:
        read("dpo", **keys)
    assert str(caught.value) == line


def test_a_loop_of_your_own_knows_no_global_batch() -> None:
    with pytest.raises(
        UserError, match=r"^objective\.sft_mean=tokens: is a mean over the global batch, .*; type"
    ):
        Calibrator("off", read("sft", sft_mean="tokens"))


def test_sides_of_kto_and_the_shift_of_bco() -> None:
    """Pair A at z0 = 0: s(-0.1) a side. bco without its shift has no state."""
    side = 1 / (1 + exp(0.1))
    kto = load_objective("kto", chosen_weight=2.0, rejected_weight=0.5)
    assert kto(PAIR_A).item() == pytest.approx(2.5 * side)
    bco = load_objective("bco", shift="none")
    assert bco.initial_state(6.0) == ()
    assert bco(PAIR_A).item() == pytest.approx(2 * nls(0.1))
    with pytest.raises(
        UserError, match=r"objective\.shift=off: must be running_mean or none; type .*=running_mean"
    ):
        load_objective("bco", shift="off")
    with pytest.raises(UserError, match=r"objective\.chosen_weight=-1: must be 0 or greater; type "):
        load_objective("kto", chosen_weight=-1)
