"""From per-pair tensors to the numbers that are logged: sums on the device, one reduction per step, then one
row.

Owns every metric's definition. Rows are flat dicts; keys are the same in metrics.jsonl, eval.jsonl and W&B.
"""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from rcpo.method.band import disentanglement_band
from rcpo.method.calibrators import Calibrator
from rcpo.method.incentives import Incentives
from rcpo.method.population import PopulationGeometry
from rcpo.method.scores import ScoreGeometry
from rcpo.method.statistics import Probe, StepStatistics
from rcpo.objectives import PairLogProbs
from rcpo.objectives.loss import Lists

QUANTITIES = (
    "train/loss",
    "logps/chosen",
    "logps/rejected",
    "logps/chosen_per_token",
    "logps/rejected_per_token",
    "displacement/chosen",
    "displacement/rejected",
    "displacement/accuracy",
    "displacement/chosen_down",
    "displacement/both_down",
    "incentive/chosen",
    "incentive/rejected",
)
"""What `pair_sums` sums, in its order; each becomes a mean over the pairs of the global batch. Of lists of
responses logps/* and displacement/* are of the best response (chosen) and the worst one (rejected), and
accuracy is the share of all better and worse ones in a list; incentive/* are of all that are pulled up
(chosen) and of all that are pushed down (rejected)."""


def _displacement(r_w: Tensor, r_l: Tensor, present: tuple[Tensor, Tensor] | None = None) -> list[Tensor]:
    """Per pair (B,): r_w, r_l, accuracy (r_w > r_l; a tie counts half), r_w < 0, both < 0; 0 where what it is
    about is missing."""
    accuracy = (r_w > r_l).double() + 0.5 * (r_w == r_l).double()
    if present is not None:
        accuracy = accuracy * present[0] * present[1]
    return [r_w, r_l, accuracy, r_w < 0, (r_w < 0) & (r_l < 0)]


def pair_sums(loss: Tensor, pair: PairLogProbs, incentives: Incentives) -> Tensor:
    """Sums over a micro-batch of `QUANTITIES`: (len(QUANTITIES),) fp64, detached, on the device."""
    columns = [loss, *(_of_pairs(pair) if pair.lists is None else _of_lists(pair)), *incentives]
    return torch.stack([column.detach().double().sum() for column in columns])


def _of_pairs(pair: PairLogProbs) -> list[Tensor]:
    r_w, r_l = pair.z_w - pair.ref_w, pair.z_l - pair.ref_l
    return [
        pair.z_w,
        pair.z_l,
        pair.z_w / pair.len_w,
        pair.z_l / pair.len_l,
        *_displacement(r_w, r_l, pair.present),
    ]


def _of_lists(pair: PairLogProbs) -> list[Tensor]:
    """The same of each list, for each of its pairs."""
    lists = pair.as_lists()

    def ends(of_chosen: Tensor, of_rejected: Tensor) -> tuple[Tensor, Tensor]:
        ranked = lists.ranked(of_chosen, of_rejected)
        return pair.of_lists(ranked[:, 0]), pair.of_lists(ranked.gather(1, lists.last())[:, 0])

    z, ref, length = ends(pair.z_w, pair.z_l), ends(pair.ref_w, pair.ref_l), ends(pair.len_w, pair.len_l)
    columns = _of_pairs(PairLogProbs(z[0], z[1], ref[0], ref[1], length[0], length[1]))
    of_all = accuracy_in_lists(lists.ranked(pair.r_w, pair.r_l), lists)
    return [*columns[:6], pair.of_lists(of_all), *columns[7:]]


def accuracy_in_lists(r: Tensor, lists: Lists) -> Tensor:
    """Of each list (L,): the share of its better and worse responses, two by two, of which the better one has
    the larger of `r` (L, N); a tie counts half."""
    worse = lists.worse()
    above, even = r[:, :, None] > r[:, None, :], r[:, :, None] == r[:, None, :]
    return ((above.double() + 0.5 * even.double()) * worse).sum((1, 2)) / worse.sum((1, 2))


OF_CHOSEN = frozenset(name for name in QUANTITIES if name.partition("/")[2].startswith("chosen"))
OF_REJECTED = frozenset(name for name in QUANTITIES if name.partition("/")[2].startswith("rejected"))
OF_PAIRS = frozenset(["displacement/accuracy", "displacement/both_down"])


def means_of(
    sums: Sequence[float],
    num_pairs: int,
    num_chosen: float,
    num_rejected: float,
    num_whole: float,
    slots: int = 1,
) -> dict[str, float]:
    """Of the global batch's sums of `QUANTITIES`: means over the responses that are there, of what takes both
    over whole pairs, of the loss over all; left out where there is nothing. With `slots` of each, of
    lists: every pair has what its list has, and incentives are by the loss of a list."""
    means = {}
    for name, total in zip(QUANTITIES, sums, strict=True):
        num, by_side = float(num_pairs), slots == 1 or name.startswith("incentive/")
        for names, of_these in ((OF_CHOSEN, num_chosen), (OF_REJECTED, num_rejected), (OF_PAIRS, num_whole)):
            num = of_these * slots if name in names and by_side else num
        if num:
            means[name] = total / num
    return means


def balance_row(num_pairs: int, num_chosen: float, num_rejected: float, num_whole: float) -> dict[str, float]:
    """`batch/*` of a step with single answers, or lists: how many responses of each side it had; empty
    without."""
    if num_whole == num_pairs:
        return {}
    return {"batch/chosen": num_chosen, "batch/rejected": num_rejected}


def displacement_row(
    z_w: Tensor,
    z_l: Tensor,
    start_w: Tensor,
    start_l: Tensor,
    num_probed: int = 0,
    noise: float | None = None,
    present: Tensor | None = None,
) -> dict[str, float]:
    """`displacement/*` and `logps/*` of held-out pairs against their start, means over n pairs of (n,)
    tensors. Where calibration steers by the first `num_probed` of them, `probed/*` are the means of these and
    `unprobed/*` those of the others, which nothing steers by. `noise` is what rounding makes of a pair's r,
    root mean square: means within displacement/noise_floor, two standard errors of it, may be rounding.

    `present` (2, n) bool: which chosen and which rejected responses are there; None: all. Of single answers
    means are over those that are there; accuracy is the share of all chosen and rejected ones, two by two, of
    which the chosen one rose more, and there is no both_down. Where all are chosen ones (conversations, say)
    there is nothing of rejected ones, and no accuracy and margin."""
    if present is not None and not bool(present.all()):
        return _row_of_answers(z_w - start_w, z_l - start_l, (z_w, z_l), present, num_probed, noise)
    r_w, r_l = z_w - start_w, z_l - start_l
    names = ("chosen", "rejected", "accuracy", "chosen_down", "both_down")
    row = {
        f"displacement/{name}": float(column.double().mean())
        for name, column in zip(names, _displacement(r_w, r_l), strict=True)
    }
    row["displacement/margin"] = row["displacement/chosen"] - row["displacement/rejected"]
    if noise is not None:
        row["displacement/noise_floor"] = 2 * noise / math.sqrt(len(r_w))
    row["logps/chosen"], row["logps/rejected"] = float(z_w.double().mean()), float(z_l.double().mean())
    if num_probed:
        row["probed/chosen"] = float(r_w[:num_probed].double().mean())
        row["probed/rejected"] = float(r_l[:num_probed].double().mean())
    if 0 < num_probed < len(r_w):
        row["unprobed/chosen"] = float(r_w[num_probed:].double().mean())
        row["unprobed/rejected"] = float(r_l[num_probed:].double().mean())
    return row


def list_row(
    z_w: Tensor,
    z_l: Tensor,
    start_w: Tensor,
    start_l: Tensor,
    lists: Lists,
    num_probed: int = 0,
    noise: float | None = None,
) -> dict[str, float]:
    """`displacement_row` of held-out lists, on (n,) pairs: chosen is a list's best response, rejected its
    worst one, and accuracy the mean over lists of `accuracy_in_lists`. displacement/rank_K is the mean of the
    K-th best responses, over the lists that have one."""
    z, start = lists.ranked(z_w, z_l), lists.ranked(start_w, start_l)
    last = lists.last()
    worst_z, worst_start = (each.gather(1, last)[:, 0] for each in (z, start))
    row = displacement_row(z[:, 0], worst_z, start[:, 0], worst_start, num_probed, noise)
    r = z - start
    row["displacement/accuracy"] = float(accuracy_in_lists(r, lists).mean())
    for place in range(r.shape[1]):
        row[f"displacement/rank_{place + 1}"] = float(r[lists.there[:, place], place].double().mean())
    return row


def _row_of_answers(
    r_w: Tensor, r_l: Tensor, z: tuple[Tensor, Tensor], present: Tensor, num_probed: int, noise: float | None
) -> dict[str, float]:
    (has_w, has_l), r_w, r_l = present, r_w.double(), r_l.double()
    chosen, rejected = r_w[has_w], r_l[has_l]
    there = [(name, r) for name, r in (("chosen", chosen), ("rejected", rejected)) if len(r)]
    row = {f"displacement/{name}": float(r.mean()) for name, r in there}
    if len(there) == 2:
        row["displacement/accuracy"] = _share_above(chosen, rejected)
    if len(chosen):
        row["displacement/chosen_down"] = float((chosen < 0).double().mean())
    if len(there) == 2:
        row["displacement/margin"] = float(chosen.mean() - rejected.mean())
    if noise is not None:
        row["displacement/noise_floor"] = 2 * noise / math.sqrt(min(len(r) for _, r in there))
    for key, of_side, has in zip(("logps/chosen", "logps/rejected"), z, present, strict=True):
        if has.any():
            row[key] = float(of_side[has].double().mean())
    parts = {"probed": slice(num_probed), "unprobed": slice(num_probed, None)} if num_probed else {}
    for name, part in parts.items():
        for side, r, has in (("chosen", r_w, has_w), ("rejected", r_l, has_l)):
            if has[part].any():
                row[f"{name}/{side}"] = float(r[part][has[part]].mean())
    return row


def _share_above(chosen: Tensor, rejected: Tensor) -> float:
    """Of all (chosen, rejected) the share with the first above; a tie counts half."""
    ordered = rejected.sort().values
    below = torch.searchsorted(ordered, chosen) + torch.searchsorted(ordered, chosen, right=True)
    return float(below.double().mean() / (2 * len(ordered)))


def statistics_of(
    means: Mapping[str, float], geometry: ScoreGeometry | None, probe: Probe | None, lr_share: float = 1.0
) -> StepStatistics:
    """What a calibrator may learn from a step, from the global batch's means of `QUANTITIES`."""
    return StepStatistics(
        mean_d_w=means.get("incentive/chosen", math.nan),
        mean_d_l=means.get("incentive/rejected", math.nan),
        geometry=geometry,
        mean_r_w=means.get("displacement/chosen", math.nan),
        probe=probe,
        lr_share=lr_share,
    )


def step_row(
    means: dict[str, float],
    statistics: StepStatistics,
    alpha: float,
    calibrator: Calibrator,
    population: Mapping[str, PopulationGeometry] = MappingProxyType({}),
) -> dict[str, float]:
    """One optimizer step's row, all of it as the step was: band, rates and pathway *after* calibration with
    `alpha`."""
    row = dict(means)
    if "displacement/chosen" in means and "displacement/rejected" in means:
        row["displacement/margin"] = row["displacement/chosen"] - row["displacement/rejected"]
    row["calibration/alpha"] = alpha
    row.update(calibrator.metrics())
    if statistics.log_ratio is not None:
        row["incentive/log_ratio"] = statistics.log_ratio
    row.update(band_metrics(statistics, alpha))
    row.update(population_metrics(statistics, alpha, population))
    return row


def band_metrics(statistics: StepStatistics, alpha: float) -> dict[str, float]:
    """`score/*`, `band/*` and `dynamics/*` of a step with score geometry; empty without.

    The rates are first-order changes per unit of learning rate under plain gradient descent. mean: of the
    batch mean of z, dynamics/chosen_rate = alpha d_w |s_w|^2 - (d_l/alpha) <s_w, s_l> and
    dynamics/rejected_rate = alpha d_w <s_w, s_l> - (d_l/alpha) |s_l|^2 with mean incentives d, exact where
    all incentives of a side are equal. weighted: of the incentive-weighted batch means of d_w z_w and d_l
    z_l, alpha |G_w|^2 - <G_w, G_l>/alpha and alpha <G_w, G_l> - |G_l|^2/alpha, exact always.
    dynamics/pathway: 0 chosen up & rejected down, 1 both up, 2 both down, 3 chosen down & rejected up. The
    band needs both incentive means positive; edges are +-inf where rho <= 0.
    """
    geometry = statistics.geometry
    if geometry is None:
        return {}
    d_w, d_l = (1.0, 1.0) if geometry.weighted else (statistics.mean_d_w, statistics.mean_d_l)
    pull, push = alpha * d_w, d_l / alpha
    chosen_rate = pull * geometry.chosen_squared - push * geometry.dot
    rejected_rate = pull * geometry.dot - push * geometry.rejected_squared
    row = {
        "score/chosen_norm": geometry.chosen_norm,
        "score/rejected_norm": geometry.rejected_norm,
        "score/cosine": geometry.cosine,
        "dynamics/chosen_rate": chosen_rate,
        "dynamics/rejected_rate": rejected_rate,
        "dynamics/pathway": pathway(chosen_rate, rejected_rate),
    }
    band = (
        None if statistics.log_ratio is None else disentanglement_band(statistics.log_ratio, alpha, geometry)
    )
    if band is not None:
        row |= {
            "band/position": band.position,
            "band/center": band.center,
            "band/lower": band.lower,
            "band/upper": band.upper,
            "band/slack": band.slack,
            "band/inside": float(band.slack >= 0),
        }
    return row


def population_metrics(
    statistics: StepStatistics, alpha: float, population: Mapping[str, PopulationGeometry]
) -> dict[str, float]:
    """`population/*`: cosine, position, center and slack as in `band/*`, of the population's mean vectors,
    from all pairs of measurements so far; adam_* in Adam's metric. The estimate of the cosine may lie beyond
    1; it is nan, and the others are missing, where a squared length is not positive: noise.

    KEY_lower and KEY_upper are the edges of an 80 % interval, to first order, from six measurements on: of
    cosine, of slack where the cosine is positive, and of what the vectors' lengths decide: center with
    estimator mean, position with weighted.
    """
    row: dict[str, float] = {}
    for name, geometry in population.items():
        prefix = "population/adam_" if name == "adam" else "population/"
        row["population/measurements"] = float(geometry.num_measurements)
        found = _population_row(statistics, alpha, geometry)
        row |= {f"{prefix}{key}": value for key, value in found.items()}
    return row


def _population_row(
    statistics: StepStatistics, alpha: float, geometry: PopulationGeometry
) -> dict[str, float]:
    row = {"cosine": geometry.cosine}
    if not geometry.is_positive:
        return row
    by_cosine, by_lengths = geometry.cosine_gradient(), geometry.log_norms_gradient()
    gradients = {"cosine": by_cosine}
    band = None
    if statistics.log_ratio is not None:
        band = disentanglement_band(statistics.log_ratio, alpha, geometry)
    if band is not None:
        row |= {"position": band.position, "center": band.center, "slack": band.slack}
        gradients["position" if geometry.weighted else "center"] = by_lengths
        if geometry.cosine > 0:
            # slack = -log cosine - |offset|, and the offset falls as log(|v_l| / |v_w|) rises.
            side = math.copysign(1, band.position - band.center)
            gradients["slack"] = side * by_lengths - by_cosine / geometry.cosine
    if geometry.covariance is not None:
        for key, gradient in gradients.items():
            reach = geometry.reach(gradient)
            row |= {f"{key}_lower": row[key] - reach, f"{key}_upper": row[key] + reach}
    return row


def pathway(chosen_rate: float, rejected_rate: float) -> float:
    """0 chosen up & rejected down, 1 both up, 2 both down, 3 chosen down & rejected up; nan where a rate is
    nan."""
    if math.isnan(chosen_rate) or math.isnan(rejected_rate):
        return math.nan
    chosen_up, rejected_up = chosen_rate >= 0, rejected_rate > 0
    return float(
        {(True, False): 0, (True, True): 1, (False, False): 2, (False, True): 3}[chosen_up, rejected_up]
    )
