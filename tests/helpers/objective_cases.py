"""The table of hand-worked objective values; `test_objectives.py` and `test_incentives.py` read it.

Two pairs serve all objectives. From their numbers, by hand:

    A: z = (-4, -6)  ref = (-5, -5)  |y| = (2, 3)      B: z = (-9, -8)  ref = (-7, -9)  |y| = (3, 4)
       r_w = 1   r_l = -1   mt = 2   m = 2                r_w = -2   r_l = 1   mt = -3   m = -1
       z_w/|y_w| = -2    z_l/|y_l| = -2                   z_w/|y_w| = -3     z_l/|y_l| = -2
       r_w/|y_w| = 1/2   r_l/|y_l| = -1/3                 r_w/|y_w| = -2/3   r_l/|y_l| = 1/4

Below, s(x) = 1/(1 + e^-x) and nls(x) = -log s(x) = log(1 + e^-x). Values are worked with `math` on plain
numbers, never with rcpo's code. Batch statistics stand at their start: kto's z0 = 0, bco's d = 0, acpo's tau
= delta (|y_w| + |y_l|).
"""

from math import exp, log, log1p
from typing import NamedTuple

import torch

from rcpo.objectives import PairLogProbs

LOG2 = log(2)


def s(x: float) -> float:
    return 1 / (1 + exp(-x))


def nls(x: float) -> float:
    return log1p(exp(-x))


COMPARE_RANKS = {"aot", "aot_unpaired"}
"""Objectives whose pairs are compared with each other; `test_transport.py` has what the others' tests have of
single pairs."""


KINKED = {"rrhf"}
"""Objectives with a kink at z_w/|y_w| = z_l/|y_l|, where pair A stands; `off_kinks` moves away from it."""


class Case(NamedTuple):
    a: float
    """Loss of pair A with the default parameters."""
    b: float
    """Loss of pair B."""
    mirror: bool = False
    """Whether L(r_w, r_l) = L(-r_l, -r_w) with the lengths exchanged: both sides are treated alike."""


def pair_of(
    z: tuple[float, float],
    ref: tuple[float, float],
    length: tuple[int, int],
    dtype: torch.dtype = torch.float64,
) -> PairLogProbs:
    """A batch of one pair; each argument is (chosen, rejected)."""
    return PairLogProbs(*(torch.tensor([float(x)], dtype=dtype) for x in (*z, *ref, *length)))


def off_kinks(name: str, pairs: PairLogProbs) -> PairLogProbs:
    """Pairs at which the objective has a derivative."""
    return pairs._replace(z_w=pairs.z_w - 0.01) if name in KINKED else pairs


PAIR_A = pair_of((-4, -6), (-5, -5), (2, 3))
PAIR_B = pair_of((-9, -8), (-7, -9), (3, 4))

CASES: dict[str, Case] = {
    # -z_w/|y_w|
    "sft": Case(2.0, 3.0),
    # beta mt = 0.2, -0.3
    "dpo": Case(nls(0.2), nls(-0.3), mirror=True),
    # a pair alone is its own rank: dpo
    "aot": Case(nls(0.2), nls(-0.3), mirror=True),
    "aot_unpaired": Case(nls(0.2), nls(-0.3), mirror=True),
    # of two responses: dpo and simpo
    "pl_dpo": Case(nls(0.2), nls(-0.3), mirror=True),
    "pl_simpo": Case(nls(-1.0), nls(-3.0), mirror=True),
    # scores 1 and 0: minus the chosen one's share, s(m)
    "lire": Case(-s(2.0), -s(-1.0), mirror=True),
    # max(0, z_l/|y_l| - z_w/|y_w|) - z_w/|y_w|: 0 + 2; 1 + 3
    "rrhf": Case(2.0, 4.0),
    # dpo of log-ratios that are weighted before the objective sees them
    "ti_dpo": Case(nls(0.2), nls(-0.3), mirror=True),
    # beta (1/2 + 1/3) = 5 * 5/6; 5 (-2/3 - 1/4) = -5 * 11/12
    "dpo_norm": Case(nls(25 / 6), nls(-55 / 12), mirror=True),
    # 0.9 nls(beta mt) + 0.1 nls(-beta mt)
    "cdpo": Case(0.9 * nls(0.2) + 0.1 * nls(-0.2), 0.9 * nls(-0.3) + 0.1 * nls(0.3), mirror=True),
    # (0.9 nls(beta mt) - 0.1 nls(-beta mt)) / 0.8
    "robust_dpo": Case(
        (0.9 * nls(0.2) - 0.1 * nls(-0.2)) / 0.8, (0.9 * nls(-0.3) - 0.1 * nls(0.3)) / 0.8, mirror=True
    ),
    # (5/6 - 5)^2 = (25/6)^2; (-11/12 - 5)^2 = (71/12)^2
    "ipo": Case(625 / 36, 5041 / 144, mirror=True),
    # beta (-2 + 2) - 1 = -1; 2 (-3 + 2) - 1 = -3
    "simpo": Case(nls(-1.0), nls(-3.0), mirror=True),
    # nls(0.1 m) - z_w/|y_w|
    "cpo": Case(nls(0.2) + 2, nls(-0.1) + 3),
    # max(0, 1 - 2) + 0.4; max(0, 1 + 1) + 0.9
    "slic": Case(0.4, 2.9),
    # 1 - 0.2; 1 + 0.3
    "hinge": Case(0.8, 1.3, mirror=True),
    # s(-beta r_w) + s(beta r_l) at z0 = 0: s(-0.1) twice; s(0.2) + s(0.1)
    "kto": Case(2 * s(-0.1), s(0.2) + s(0.1), mirror=True),
    # A: log-odds agree, so log 2; B: odds e^-3/(1-e^-3) = 1/(e^3-1), and 1/(e^2-1); their log-ratio
    "orpo": Case(2 + 0.1 * LOG2, 3 + 0.1 * nls(log((exp(2) - 1) / (exp(3) - 1)))),
    # nls(r_w) + nls(-r_l)
    "dil_bce": Case(2 * nls(1.0), nls(-2.0) + nls(-1.0), mirror=True),
    # -e^(r_w) + e^(2 r_l)/2
    "dil_lsif": Case(-exp(1) + exp(-2) / 2, -exp(-2) + exp(2) / 2),
    # -z_w + e^(r_l)
    "dil_ukl": Case(4 + exp(-1), 9 + exp(1)),
    # A: by the formula. B: e^1 is beyond 2 - 1e-3, so the tangent there: value -log 1e-3, slope 1.999/0.001
    "ddro": Case(-1 - log(2 - exp(-1)) + 2 * LOG2, 2 + log(1000) + 1999 * (1 - log(1.999)) + 2 * LOG2),
    # s(-beta r_w) + s(beta r_l)
    "apo_zero": Case(2 * s(-0.1), s(0.2) + s(0.1), mirror=True),
    # s(beta r_w) + s(-beta mt)
    "apo_down": Case(s(0.1) + s(-0.2), s(-0.2) + s(0.3)),
    # beta r = (0.01, -0.01); (-0.02, 0.01)
    "nca": Case(nls(0.01) + nls(-0.01) / 2 + nls(0.01) / 2, nls(-0.02) + nls(0.02) / 2 + nls(-0.01) / 2),
    # nls(beta r_w) + nls(-beta r_l) at d = 0
    "bco": Case(2 * nls(0.1), nls(-0.2) + nls(-0.1), mirror=True),
    # (1 - 500)^2 + (-1 + 500)^2; (-2 - 500)^2 + (1 + 500)^2
    "sppo": Case(2 * 499**2, 502**2 + 501**2, mirror=True),
    # q = s(beta mt): KL(q, 0.999)
    "exo": Case(
        s(0.2) * log(s(0.2) / 0.999) + s(-0.2) * log(s(-0.2) / 0.001),
        s(-0.3) * log(s(-0.3) / 0.999) + s(0.3) * log(s(0.3) / 0.001),
        mirror=True,
    ),
    # switch s(0.2/0.05 = 4); s(-0.3/0.05 = -6)
    "discopop": Case(s(-4) * nls(0.2) + s(4) * exp(-0.2), s(6) * nls(-0.3) + s(-6) * exp(0.3), mirror=True),
    # nls(mt) + half of sppo's squares
    "cal_dpo": Case(nls(2.0) + 499**2, nls(-3.0) + (502**2 + 501**2) / 2, mirror=True),
    # A: r_w > 0, so 0.3 * 2; B: 0.3 (-3 - 50 * 2) = -30.9
    "dpop": Case(nls(0.6), nls(-30.9)),
    # -z_w/|y_w| + nls(beta mt)
    "rpo": Case(2 + nls(0.2), 3 + nls(-0.3)),
    # beta mt + 0.05 (|y_w| - |y_l|): 0.2 - 0.05; -0.3 - 0.05
    "r_dpo": Case(nls(0.15), nls(-0.35)),
    # 0.01 (1 + 0.95); 0.01 (-2 - 0.95)
    "dpo_shift": Case(nls(0.0195), nls(-0.0295)),
    # 0.1 (r_w - log((e^(r_l) + 1)/2))
    "bdpo": Case(nls(0.1 * (1 - log((exp(-1) + 1) / 2))), nls(0.1 * (-2 - log((exp(1) + 1) / 2)))),
    # u(a) = 4 (1 - e^(-a/4)). A: equal, so -0.75; B: 2.5 * 4 (e^0.5 - e^0.75) - 0.75
    "alpha_po": Case(nls(-0.75), nls(10 * (exp(0.5) - exp(0.75)) - 0.75)),
    # A: tau = 0.05 < beta r_w = 0.1, so k = 0 and the logit is 0.1; B: r_l >= 0, so k = 1: -0.2 - 0.1
    "acpo": Case(nls(0.1), nls(-0.3)),
    # dpo + 0.2 sft
    "mix": Case(nls(0.2) + 0.2 * 2, nls(-0.3) + 0.2 * 3),
}
"""Registry name -> values. A new objective needs a line here; nothing else about the tests changes."""
