"""Preference objectives: one short function each, from a pair's log-probabilities to its loss.

Owns the formulas, their parameters (a frozen config beside each function) and the registry. Does not own
gradients: `rcpo.method.incentives` takes them from these functions by autograd, so a new objective is
calibrated at once. To add one, write a function in the family file where it belongs, with `@objective(...)`,
and a `conf/objective/NAME.yaml` of the same name; `tests/helpers/objective_cases.py` wants two hand-worked
values.

    loss.py            PairLogProbs, Objective
    registry.py        @objective (register, to users), load_objective
    own.py             objective.module: objectives from users' own files; trial.py tries them out
    parameters.py      kinds and ranges of parameters
    reading.py         switches that formulas share: label smoothing, divergences, means of likelihood terms
    numerics.py        exp and sigmoid that stay finite
    pairwise.py        functions of the margin r_w - r_l
    reference_free.py  functions of z alone
    pointwise.py       each side judged by itself against the reference
    ratio.py           density-ratio estimation
    transport.py       comparisons of ranks within a batch
    listwise.py        lists of several responses, of which a pair is the shortest
    anchored.py        made to hold the chosen response up
    mix.py             weighted sums of all of these
    composition.py     what every objective accepts: means of log-probs, weights of pairs, what takes the
                       mean's place

Shape legend: B pairs. z_w, z_l are log-probabilities *summed* over response tokens; r = z - ref, mt = r_w -
r_l, m = z_w - z_l, a bar divides by the side's length |y|.
"""

# Importing a family registers its objectives.
from rcpo.objectives import anchored, listwise, mix, pairwise, pointwise, ratio, reference_free, transport
from rcpo.objectives.composition import Composition, composition_of, objective_of
from rcpo.objectives.loss import BatchStatistic, Objective, PairLogProbs
from rcpo.objectives.parameters import config_key
from rcpo.objectives.registry import REGISTRY, load_objective, objective, objective_names

register = objective
"""The decorator under the name that users know: `rcpo.objectives.register`."""

__all__ = [
    "REGISTRY",
    "BatchStatistic",
    "Composition",
    "Objective",
    "PairLogProbs",
    "anchored",
    "composition_of",
    "config_key",
    "listwise",
    "load_objective",
    "mix",
    "objective",
    "objective_names",
    "objective_of",
    "pairwise",
    "pointwise",
    "ratio",
    "reference_free",
    "register",
    "transport",
]
