"""Objectives: values, ranges of safety, batch statistics, mixes, and the agreement of registry and YAML
files."""

import dataclasses
import math

import pytest
import torch
import yaml

from helpers.objective_cases import CASES, PAIR_A, PAIR_B, nls, pair_of, s
from rcpo.common.conf import conf_dir
from rcpo.common.errors import UserError
from rcpo.method.incentives import incentives, loss_and_incentives
from rcpo.objectives import REGISTRY, PairLogProbs, load_objective, objective, objective_of
from rcpo.objectives.parameters import config_key

NAMES = sorted(REGISTRY)


def case(name: str):
    assert name in CASES, (
        f"{name}: no hand-worked values; add it to CASES in tests/helpers/objective_cases.py"
    )
    return CASES[name]


def loss_of(name: str, pair: PairLogProbs, **params) -> float:
    return load_objective(name, **params)(pair).item()


# Values


@pytest.mark.parametrize("name", NAMES)
def test_values_match_hand_worked_numbers(name):
    """Pairs A and B of objective_cases.py; each line there shows its derivation."""
    assert loss_of(name, PAIR_A) == pytest.approx(case(name).a, rel=1e-9)
    assert loss_of(name, PAIR_B) == pytest.approx(case(name).b, rel=1e-9)


def test_cases_name_only_objectives_that_exist():
    assert set(CASES) == set(REGISTRY)


def test_parameters_enter_the_formulas():
    """Pair A again: r = (1, -1), mt = 2, m = 2, |y| = (2, 3)."""
    assert loss_of("dpo", PAIR_A, beta=0.5) == pytest.approx(nls(1.0))
    assert loss_of("ipo", PAIR_A, length_normalized=False) == pytest.approx(9.0)  # (2 - 5)^2
    assert loss_of("ipo", PAIR_A, length_normalized=False, tau=0.5) == pytest.approx(1.0)  # (2 - 1)^2
    assert loss_of("cpo", PAIR_A, **{"lambda": 0.5}) == pytest.approx(nls(0.2) + 1)
    assert loss_of("slic", PAIR_A, delta=5, **{"lambda": 0}) == pytest.approx(3.0)  # 5 - 2
    assert loss_of("dpo_shift", PAIR_A, beta=1, f=0.5) == pytest.approx(nls(1.5))
    assert loss_of("r_dpo", PAIR_A, a=0.2) == pytest.approx(nls(0.2 - 0.2))
    assert loss_of("dpop", PAIR_B, beta=0.1, **{"lambda": 2}) == pytest.approx(nls(0.1 * (-3 - 4)))
    assert loss_of("rpo", PAIR_A, a=3) == pytest.approx(2 + 3 * nls(0.2))
    assert loss_of("acpo", PAIR_A, delta=0.03) == pytest.approx(
        nls(0.15)
    )  # k = (0.15 - 0.1)/0.1: logit = tau


@pytest.mark.parametrize(
    ("name", "params", "other"),
    [
        ("cdpo", {"eps": 0}, "dpo"),
        ("robust_dpo", {"eps": 0}, "dpo"),
        ("r_dpo", {"a": 0}, "dpo"),
        ("dpop", {"beta": 0.1, "lambda": 0}, "dpo"),
        ("dpo_shift", {"beta": 0.1, "f": 1}, "dpo"),
        ("slic", {"delta": 1, "lambda": 0}, None),
        ("alpha_po", {"a": 1e-9, "beta": 2, "gamma": 1}, "simpo"),
        ("bdpo", {"lam": 1 - 1e-12}, "dpo"),
    ],
)
def test_limits_are_other_objectives(name, params, other):
    """At the edge of their parameters these become an objective written elsewhere (slic: a plain hinge on
    m)."""
    for pair in (PAIR_A, PAIR_B):
        expected = max(0.0, 1 - (pair.z_w - pair.z_l).item()) if other is None else loss_of(other, pair)
        assert loss_of(name, pair, **params) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_mirrored_pair(name):
    """(r_w, r_l) -> (-r_l, -r_w) with lengths exchanged keeps the loss and exchanges the incentives, iff
    CASES says so.

    This is what inverts alpha when the sides are swapped.
    """
    loss = load_objective(name)
    same = True
    for pair in (PAIR_A, PAIR_B):
        mirrored = PairLogProbs(-pair.z_l, -pair.z_w, -pair.ref_l, -pair.ref_w, pair.len_l, pair.len_w)
        d_w, d_l = incentives(loss, pair)
        mirrored_d_w, mirrored_d_l = incentives(loss, mirrored)
        same &= torch.allclose(loss(pair), loss(mirrored), rtol=1e-9)
        same &= torch.allclose(d_w, mirrored_d_l, rtol=1e-9) and torch.allclose(d_l, mirrored_d_w, rtol=1e-9)
    assert same == case(name).mirror


# References


@pytest.mark.parametrize("name", NAMES)
def test_needs_reference_is_the_truth(name):
    """Another reference changes the loss iff the objective says that it needs one; if not, no incentive
    either."""
    loss = load_objective(name)
    changed = PAIR_B._replace(ref_w=PAIR_B.ref_w + 0.7, ref_l=PAIR_B.ref_l - 0.4)
    before, after = loss_and_incentives(loss, PAIR_B), loss_and_incentives(loss, changed)
    assert torch.equal(before.loss, after.loss) == (not loss.needs_reference)
    if not loss.needs_reference:
        assert all(map(torch.equal, before.incentives, after.incentives))


# Batch statistics


BATCH = PairLogProbs(*(torch.cat(fields) for fields in zip(PAIR_A[:6], PAIR_B[:6], strict=True)))
"""Pairs A and B: r_w = (1, -2), r_l = (-1, 1), |y_w| + |y_l| = (5, 7)."""


@pytest.mark.parametrize("name", NAMES)
def test_statistics_interface(name):
    """Columns are (num_statistics, B) and detached; states keep their length; only three objectives have
    any."""
    loss = load_objective(name)
    columns = loss.statistic_columns(BATCH._replace(z_w=BATCH.z_w.clone().requires_grad_()))
    assert columns.shape == (loss.num_statistics, 2)
    assert not columns.requires_grad
    state = loss.initial_state(6.0)
    assert len(loss.advance(state, columns.mean(1).tolist())) == len(state)
    assert (loss.num_statistics > 0) == (name in {"kto", "bco", "acpo"})


def test_kto_reference_point():
    """Columns (r_w + r_l)/2 = (0, -0.5), mean -0.25, so z0 = 0; a mean of 0.4 gives z0 = 0.4.

    With z0 = 0.4, pair A: s(-0.1 (1 - 0.4)) + s(-0.1 (0.4 + 1)).
    """
    kto = load_objective("kto")
    assert kto.statistic_columns(BATCH).tolist() == [[0.0, -0.5]]
    assert kto.advance(kto.initial_state(6.0), [-0.25]) == (0.0,)
    assert kto.advance((0.0,), [0.4]) == (0.4,)
    assert loss_of("kto", PAIR_A._replace(state=(0.4,))) == pytest.approx(s(-0.06) + s(-0.14))


def test_kto_as_published_learns_from_mismatched_pairs_before_the_step():
    """kl=mismatched: the same column, wanted of mismatched pairs alone; a batch's own pairs move nothing. A
    mean that is not a number makes the loss none, where max(0, nan) is 0."""
    kto = load_objective("kto", kl="mismatched")
    assert kto.needs_mismatched
    assert not load_objective("kto").needs_mismatched
    assert (kto.num_statistics, kto.initial_state(6.0)) == (0, (0.0,))
    assert kto.statistic_columns(BATCH).shape == (0, 2)
    assert kto.statistic_columns(BATCH, of_mismatched=True).tolist() == [[0.0, -0.5]]
    assert kto.advance((0.4,), []) == (0.4,)
    assert kto.advance((0.4,), [0.7], of_mismatched=True) == (0.7,)
    assert kto.advance((0.4,), [-0.7], of_mismatched=True) == (0.0,)
    (lost,) = kto.advance((0.4,), [math.nan], of_mismatched=True)
    assert math.isnan(kto(PAIR_A._replace(state=(lost,))))
    assert load_objective("kto").statistic_columns(BATCH, of_mismatched=True).shape == (0, 2)


def test_kto_mean_of_log_probs_averages_mismatched_pairs_too():
    """objective.log_probs=mean: r/|y| = (1/2, -2/3) and (-1/3, 1/4), so columns 1/12 and -5/24."""
    kto = objective_of({"name": "kto", "kl": "mismatched", "log_probs": "mean"})
    columns = kto.statistic_columns(BATCH, of_mismatched=True)
    assert columns.tolist() == [pytest.approx([1 / 12, -5 / 24])]


def test_bco_running_mean():
    """Means 0.6, -0.2, 0.2 of r: running means 0.6, 0.2, 0.2. With 0.2, pair A: nls(0.1 - 0.02) + nls(0.1 +
    0.02)."""
    bco = load_objective("bco")
    state = bco.initial_state(6.0)
    assert state == (0.0, 0.0)
    averages = []
    for mean in (0.6, -0.2, 0.2):
        state = bco.advance(state, [mean])
        averages.append(state[0])
    assert averages == pytest.approx([0.6, 0.2, 0.2])
    assert loss_of("bco", PAIR_A._replace(state=state)) == pytest.approx(nls(0.08) + nls(0.12))


def test_acpo_target():
    """r = (-0.5, -2), mean length 5: tau = 0.05, k = (0.05 + 0.05)/0.2 = 1/2, logit = tau.

    k is held constant in the gradient: d_w = beta s(-tau), d_l = d_w/2. At mean length 40, tau = 0.4 and k =
    1.
    """
    acpo = load_objective("acpo")
    assert acpo.initial_state(6.0) == (6.0,)
    assert acpo.statistic_columns(BATCH).tolist() == [[5.0, 7.0]]
    assert acpo.advance((6.0,), [9.5]) == (9.5,)
    pair = pair_of((-5.5, -7), (-5, -5), (2, 3))
    value, (d_w, d_l) = loss_and_incentives(acpo, pair)
    assert value.item() == pytest.approx(nls(0.05))
    assert (d_w.item(), d_l.item()) == pytest.approx((0.1 * s(-0.05), 0.05 * s(-0.05)))
    value, (d_w, d_l) = loss_and_incentives(acpo, pair._replace(state=(40.0,)))
    assert value.item() == pytest.approx(nls(0.15))
    assert d_w.item() == pytest.approx(d_l.item())


def test_acpo_target_of_each_pair_and_of_the_step_itself():
    """Lengths 5 and 7, r = (-0.5, -2): tau = 0.05 and 0.07, which the logits are. With tau=batch the step's
    own mean of lengths is known before it, and no column is left for after it."""
    pair = PairLogProbs(*(torch.tensor(x, dtype=torch.float64) for x in ([-0.5] * 2, [-2.0] * 2, [0.0] * 2)),
                        torch.zeros(2, dtype=torch.float64), BATCH.len_w, BATCH.len_l)  # fmt: skip
    each = load_objective("acpo", tau="pair")
    assert each(pair).tolist() == pytest.approx([nls(0.05), nls(0.07)])
    assert (each.num_statistics, each.needs_lengths, each.initial_state(6.0)) == (0, False, ())
    own = load_objective("acpo", tau="batch")
    assert (own.num_statistics, own.needs_lengths) == (0, True)
    assert own.statistic_columns(BATCH).shape == (0, 2)
    assert own.statistic_columns(BATCH, of_lengths=True).tolist() == [[5.0, 7.0]]
    assert own.advance((9.0,), []) == (9.0,)
    assert own.advance((9.0,), [6.0], of_lengths=True) == (6.0,)
    assert own(pair._replace(state=(6.0,))).tolist() == pytest.approx([nls(0.06)] * 2)


def test_acpo_scale_has_a_limit_and_a_branch_for_what_has_risen():
    """tau = 0.4, r = (-0.5, -2): the formula has k = 0.45/0.2 = 2.25, so the logit is 0.15, 0.35 and 0.4 with
    max_scale 1, 2 and 3. tau = 0.05, r = (1, 2): full has k = 1 and logit -0.1; the formula 0.05/0.2 and tau.
    r = (0, 2): below tau the formula pushes the rejected response no more. r = 0: both push."""
    fallen = pair_of((-5.5, -7), (-5, -5), (2, 3))._replace(state=(40.0,))
    for max_scale, logit in ((1.0, 0.15), (2.0, 0.35), (3.0, 0.4)):
        loss = load_objective("acpo", max_scale=max_scale)(fallen)
        assert loss.item() == pytest.approx(nls(logit))
    for r_w, r_l, full, formula in ((1, 2, -0.1, 0.05), (0, 2, -0.2, 0.0), (0, 0, 0.0, 0.0)):
        pair = pair_of((r_w, r_l), (0, 0), (2, 3))._replace(state=(5.0,))
        found = [
            loss_and_incentives(load_objective("acpo", risen=risen), pair) for risen in ("full", "formula")
        ]
        assert [value.item() for value, _ in found] == pytest.approx([nls(full), nls(formula)])
        d_w, d_l = found[1][1]
        assert (d_l / d_w).item() == pytest.approx({(1, 2): 0.25, (0, 2): 0.0, (0, 0): 1.0}[r_w, r_l])


def test_acpo_without_state_takes_the_batch_mean():
    """Lengths 5 and 7: tau = 0.06 for both, so that batches of one differ from this batch where tau
    matters."""
    pair = PairLogProbs(*(torch.tensor(x, dtype=torch.float64) for x in ([-0.5] * 2, [-2.0] * 2, [0.0] * 2)),
                        torch.zeros(2, dtype=torch.float64), BATCH.len_w, BATCH.len_l)  # fmt: skip
    assert load_objective("acpo")(pair).tolist() == pytest.approx([nls(0.06)] * 2)


# Mixes


def test_mix_is_the_weighted_sum_with_inline_parameters():
    """Pair A: 2 nls(0.2 * 2) - 0.5 nls(-1): dpo at beta 0.2 twice, minus half of simpo."""
    terms = [{"name": "dpo", "weight": 2, "beta": 0.2}, {"name": "simpo", "weight": -0.5}]
    mix = load_objective("mix", terms=terms)
    assert mix(PAIR_A).item() == pytest.approx(2 * nls(0.4) - 0.5 * nls(-1.0))
    assert mix.needs_reference
    assert mix.params() == {"terms": terms}


def test_mix_without_reference_terms_needs_none():
    mix = load_objective("mix", terms=[{"name": "simpo", "weight": 1}, {"name": "cpo", "lambda": 0.5}])
    assert not mix.needs_reference
    changed = PAIR_A._replace(ref_w=PAIR_A.ref_w + 1)
    assert torch.equal(mix(PAIR_A), mix(changed))
    assert mix(PAIR_A).item() == pytest.approx(nls(-1.0) + nls(0.2) + 1)


def test_mix_joins_batch_statistics():
    """kto has one number, bco two, acpo one; each term reads its own part, and () means every term's
    start."""
    names = ("kto", "dpo", "bco", "acpo")
    mix = load_objective("mix", terms=[{"name": name, "weight": 1} for name in names])
    assert mix.num_statistics == 3
    assert mix.initial_state(6.0) == (0.0, 0.0, 0.0, 6.0)
    assert mix.statistic_columns(BATCH).tolist() == [[0.0, -0.5], [0.0, -0.5], [5.0, 7.0]]
    state = mix.advance((0.3, 0.4, 1.0, 6.0), [0.7, 0.8, 9.0])
    assert state == pytest.approx((0.7, 0.6, 2.0, 9.0))
    own = {"kto": (0.7,), "dpo": (), "bco": (0.6, 2.0), "acpo": (9.0,)}
    expected = sum(load_objective(name)(BATCH._replace(state=own[name])) for name in names)
    assert torch.allclose(mix(BATCH._replace(state=state)), expected)
    assert torch.allclose(mix(BATCH), sum(load_objective(name)(BATCH) for name in names))


def test_mix_parts_what_mismatched_pairs_tell():
    """Of kto twice and bco: own pairs move the second and third term's numbers, mismatched ones the first
    term's."""
    terms = [{"name": "kto", "kl": "mismatched"}, {"name": "kto"}, {"name": "bco"}]
    mix = load_objective("mix", terms=terms)
    assert mix.needs_mismatched
    assert mix.num_statistics == 2
    state = mix.advance((0.1, 0.2, 1.0, 6.0), [0.7], of_mismatched=True)
    assert state == (0.7, 0.2, 1.0, 6.0)
    assert mix.advance(state, [0.5, 8.0]) == (0.7, 0.5, 2.0, 7.0)
    expected = [load_objective("kto")(PAIR_A._replace(state=(z0,))) for z0 in (0.7, 0.2)]
    bco = load_objective("bco")(PAIR_A._replace(state=(1.0, 6.0)))
    assert torch.allclose(mix(PAIR_A._replace(state=state)), expected[0] + expected[1] + bco)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([], r"objective\.terms=\[\]: must hold at least one term; type "),
        ("dpo", r"objective\.terms=dpo: must be a list; type "),
        (["dpo"], r"objective\.terms\[0\]=dpo: must be a mapping with a name; type "),
        ([{"weight": 1}], r"objective\.terms\[0\]=\{'weight': 1\}: must be a mapping with a name; type "),
        (
            [{"name": "dpo"}, {"name": "dp"}],
            r"objective\.terms\[1\]\.name=dp: no such objective; choose one of ",
        ),
        ([{"name": "mix"}], r"objective\.terms\[0\]\.name=mix: a term cannot be a mix; write "),
        (
            [{"name": "dpo", "weight": math.inf}],
            r"objective\.terms\[0\]\.weight=inf: must be a finite number; write ",
        ),
        (
            [{"name": "dpo", "weight": "a"}],
            r"objective\.terms\[0\]\.weight=a: must be a finite number; write ",
        ),
        (
            [{"name": "dpo", "weight": True}],
            r"objective\.terms\[0\]\.weight=True: must be a finite number; write ",
        ),
        (
            [{"name": "dpo", "beta": -1}],
            r"objective\.terms\[0\]\.beta=-1: must be greater than 0; write beta: 0\.1 ",
        ),
        (
            [{"name": "dpo", "bta": 1}],
            r"objective\.terms\[0\]\.bta=1: dpo has no such parameter; did you mean ",
        ),
    ],
)
def test_bad_terms_name_their_place(terms, message):
    with pytest.raises(UserError, match="^" + message) as error:
        load_objective("mix", terms=terms)
    assert "\n" not in str(error.value)


# Registry, parameters and YAML


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("dop", {}, r"objective=dop: no such objective; choose one of .*\bdpo\b"),
        ("dpo", {"btea": 1}, r"objective\.btea=1: dpo has no such parameter; did you mean objective\.beta\?"),
        ("sft", {"beta": 1}, r"objective\.beta=1: sft has no such parameter; it has none"),
        ("dpo", {"beta": 0}, r"objective\.beta=0: must be greater than 0; type objective\.beta=0\.1"),
        ("dpo", {"beta": "x"}, r"objective\.beta=x: must be a finite number; type objective\.beta=0\.1"),
        ("dpo", {"beta": math.nan}, r"objective\.beta=nan: must be a finite number; type "),
        ("dpo", {"beta": True}, r"objective\.beta=True: must be a finite number; type "),
        (
            "ipo",
            {"length_normalized": 1},
            r"objective\.length_normalized=1: must be true or false; type .*=true",
        ),
        (
            "cdpo",
            {"eps": 0.5},
            r"objective\.eps=0\.5: must be at least 0 and less than 0\.5; type objective\.eps=0\.1",
        ),
        ("exo", {"eps": 1}, r"objective\.eps=1: must be between 0 and 1; type objective\.eps=0\.001"),
        ("kto", {"kl": "max"}, r"objective\.kl=max: must be mean or mismatched; type objective\.kl=mean"),
        ("bdpo", {"lam": 0}, r"objective\.lam=0: must be between 0 and 1; type "),
        ("alpha_po", {"a": 0}, r"objective\.a=0: must be other than 0, where the loss is simpo's; type "),
        ("orpo", {"lambda": -1}, r"objective\.lambda=-1: must be 0 or greater; type objective\.lambda=0\.1"),
        (
            "dpo_shift",
            {"f": 1.5},
            r"objective\.f=1\.5: must be greater than 0 and at most 1; type objective\.f=0\.95",
        ),
    ],
)
def test_bad_parameters_are_one_line(name, params, message):
    with pytest.raises(UserError, match="^" + message) as error:
        load_objective(name, **params)
    assert "\n" not in str(error.value)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="'dpo' is registered twice"):
        objective("dpo", REGISTRY["dpo"].config_type, needs_reference=True)(REGISTRY["dpo"].loss)


@pytest.mark.parametrize("name", NAMES)
def test_the_yaml_has_the_name_every_parameter_and_a_source(name):
    """conf/objective/NAME.yaml: no parameter is lacking or unknown, and its default stands nowhere else."""
    fields = dataclasses.fields(REGISTRY[name].config_type)
    assert {(field.default, field.default_factory) for field in fields} <= {(dataclasses.MISSING,) * 2}
    text = (conf_dir() / "objective" / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    tree = yaml.safe_load(text)
    assert tree.pop("name") == name
    assert set(tree) == {config_key(field.name) for field in fields}
    assert tree == load_objective(name).params() == load_objective(name, **tree).params()


def test_every_yaml_is_an_objective():
    assert {path.stem for path in (conf_dir() / "objective").glob("*.yaml")} == set(REGISTRY)


@pytest.mark.parametrize("name", NAMES)
def test_configs_are_frozen_and_losses_say_where_they_come_from(name):
    entry = REGISTRY[name]
    assert dataclasses.is_dataclass(entry.config_type)
    assert entry.config_type.__dataclass_params__.frozen
    assert entry.loss.__name__ == name
    assert "per pair (B,)" in entry.loss.__doc__
