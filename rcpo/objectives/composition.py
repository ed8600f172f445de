"""What every objective accepts beside its own parameters: sums or means of log-probs, how its formula is
read, weights of pairs, what takes the mean's place, and the module that registers an objective of a user's
own.

Owns these keys of the `objective` section, their rules, and the one way from that section to an `Objective`.
Their defaults stand in conf/every_objective.yaml. Does not own what they mean:
`rcpo.objectives.loss` averages log-probs, `rcpo.objectives.reading` has the switches of formulas,
`rcpo.records.weights` reads the weights, `rcpo.training.step`
multiplies by them, `rcpo.training.aggregate` aggregates."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rcpo.common.conf import IN_CONF, conf_dir, defaults_in, option_tree
from rcpo.common.errors import UserError
from rcpo.objectives.loss import Objective
from rcpo.objectives.own import import_own
from rcpo.objectives.parameters import (
    ParameterError,
    check_kind,
    require,
    require_not_negative,
    require_positive,
)
from rcpo.objectives.reading import AS_WRITTEN, DIVERGENCES, SFT_MEANS, SFT_OF, Reading
from rcpo.objectives.registry import TOP, load_at, one_line
from rcpo.objectives.trial import losses_of_trial

OF_RESPONSES = ("dora_mean", "dora_product", "dora_each")
OF_DORA = ("dora", *OF_RESPONSES)
SAMPLE_WEIGHTS = (None, "weight", *OF_DORA)
WEIGHT_OF = ("pair", "batch")
AGGREGATES = ("mean", "kl_dro", "dr_dpo")
LOG_PROBS = ("sum", "mean")
SHARED = "every_objective"
"""The file of conf/ with the defaults."""


def composition_defaults() -> Mapping[str, Any]:
    """The keys of the `objective` section that every objective has, and their defaults."""
    return option_tree(conf_dir() / f"{SHARED}.yaml")


@dataclass(frozen=True)
@defaults_in(SHARED)
class Composition:
    """How the losses of single pairs become the loss of a global batch.

    `sample_weight` is a key of its own, and a column alone weighs nothing: a file that happens to have a
    column named weight trains as it did before, and a sweep compares weighted with unweighted runs of the
    same data.
    """

    log_probs: str = IN_CONF
    """sum: z and ref as the objective's formula has them, summed over tokens. mean: both divided by the
    response's length before the loss sees them, which then finds |y| = 1: what divides by |y| divides once,
    and a loss about lengths (r_dpo) keeps them."""
    reference_free: bool = IN_CONF
    """true: the loss reads ref_w = ref_l = 0, and no reference is computed for it."""
    label_smoothing: float = IN_CONF
    """s in [0, 0.5): -(1-s) log sigmoid(x) - s log sigmoid(-x) in the place of each -log sigmoid(x) of the
    formula."""
    divergence: str = IN_CONF
    """f of the f-divergence that holds the policy to the reference: r_w, r_l of the formula's margin become
    f'(e^r) (`rcpo.objectives.reading`)."""
    divergence_alpha: float = IN_CONF
    """The alpha of divergence=alpha, not 1, where it is reverse_kl."""
    sft_mean: str | None = IN_CONF
    """What a likelihood term is: pairs: -z_w/|y_w|. tokens: -z_w over the global batch's mean of |y_w|, whose
    mean over pairs is that over tokens. sum: -z_w. null: as the formula has it."""
    sft_of: str = IN_CONF
    """response: a likelihood term is of the chosen response, as the loss reads it. plain: of the chosen
    response by itself, all its tokens alike, whatever ld_alpha makes of them; of neither side, as gold. text:
    of prompt and chosen response. gold: of a third response, from the column `gold` (TPO, arXiv 2405.16681).
    Each but the first takes a pass of one side more."""
    ld_alpha: float = IN_CONF
    """In [0, 1]: what the tokens of the longer response of a pair past the length of the shorter one count in
    z and ref (LD-DPO, arXiv 2409.06411); 1: as all others."""
    wpo: bool = IN_CONF
    """true: each pair's loss times WPO's weight (arXiv 2406.11827): of either response e to the mean over its
    tokens of log p - log sum_v p_v^2, multiplied, without a gradient."""
    sample_weight: str | None = IN_CONF
    """null: every pair counts alike. weight: by the column `weight`. dora: by 1/(a + a_i (1-p)/p) of the
    column `probability` (`rcpo.records.weights`). dora_mean, dora_product: by the mean or the product of
    the responses' weights, from `probability_chosen` and `probability_rejected`, or of a list's from
    `probabilities`, as `rcpo weigh` writes them. dora_each: of aggregate=kl_dro alone, which then has one
    exponent for each response, its weight times the loss of the pair or list, as DoRA's published code has it
    for RRHF."""
    weight_of: str = IN_CONF
    """pair: a pair's weight multiplies its own loss, inside the exponent of an aggregate, as DoRA's published
    code has it for DPO. batch: the mean weight of the global batch multiplies the aggregate of its
    losses, outside, as that code has it for LIRE."""
    dora_a: float = IN_CONF
    """DoRA's a > 0: the target distribution's share of the data; the weight is at most 1/a. Published code:
    1/2 for pairs."""
    dora_a_i: float = IN_CONF
    """DoRA's a_i >= 0: the share of the distribution that the pair comes from. Published code: 1/2 for
    pairs."""
    aggregate: str = IN_CONF
    """mean; kl_dro: lambda log mean exp(loss/lambda) over the global batch; dr_dpo: -lambda log mean
    exp(-loss/lambda), by which pairs of large loss count little (`rcpo.training.aggregate`)."""
    dro_lambda: float = IN_CONF
    """lambda of kl_dro and dr_dpo, > 0, in units of the loss: towards infinity the mean, towards 0 the worst
    pair, or the best one.
    Published code: 1."""
    module: str | None = IN_CONF
    """File or Python module of a user's own that registers objectives (`rcpo.objectives.own`); null: none."""

    def __post_init__(self) -> None:
        if self.log_probs not in LOG_PROBS:
            raise ParameterError("log_probs", self.log_probs, "sum or mean", "sum")
        if self.sample_weight not in SAMPLE_WEIGHTS:
            raise ParameterError(
                "sample_weight",
                self.sample_weight,
                "null, weight, dora, dora_mean, dora_product or dora_each",
                "weight",
            )
        if self.weight_of not in WEIGHT_OF:
            raise ParameterError("weight_of", self.weight_of, "pair or batch", "pair")
        if self.aggregate not in AGGREGATES:
            raise ParameterError("aggregate", self.aggregate, "mean, kl_dro or dr_dpo", "mean")
        if self.divergence not in DIVERGENCES:
            raise ParameterError("divergence", self.divergence, "reverse_kl, forward_kl, js or alpha", "js")
        if self.sft_mean not in SFT_MEANS:
            raise ParameterError("sft_mean", self.sft_mean, "null, pairs, tokens or sum", "tokens")
        if self.sft_of not in SFT_OF:
            raise ParameterError("sft_of", self.sft_of, "response, plain, text or gold", "text")
        require(self, "ld_alpha", 0 <= self.ld_alpha <= 1, "at least 0 and at most 1")
        smoothing = self.label_smoothing
        require(self, "label_smoothing", 0 <= smoothing < 0.5, "at least 0 and less than 0.5")
        require(self, "divergence_alpha", self.divergence_alpha != 1, "other than 1, where it is reverse_kl")
        require_positive(self, "dora_a", "dro_lambda")
        require_not_negative(self, "dora_a_i")
        if self.sample_weight == "dora_each":
            self._check_each()
        defaults = composition_defaults()
        for key, switch, options in (
            ("weight_of", "sample_weight", SAMPLE_WEIGHTS[1:]),
            ("dora_a", "sample_weight", OF_DORA),
            ("dora_a_i", "sample_weight", OF_DORA),
            ("dro_lambda", "aggregate", ("kl_dro", "dr_dpo")),
            ("divergence_alpha", "divergence", ("alpha",)),
        ):
            if getattr(self, key) != defaults[key] and getattr(self, switch) not in options:
                raise UserError(
                    f"{TOP}.{key}={getattr(self, key)}: has no effect without {' or '.join(options)}; type "
                    f"{TOP}.{switch}={options[0]}, or {TOP}.{key}={defaults[key]}"
                )

    def _check_each(self) -> None:
        """Raise UserError where there is no exponent for each response's weight."""
        for key, value, needed in (
            ("aggregate", self.aggregate, "kl_dro"),
            ("weight_of", self.weight_of, "pair"),
        ):
            if value != needed:
                raise UserError(
                    f"{TOP}.sample_weight=dora_each: has an exponent of kl_dro for each response, and not "
                    f"{TOP}.{key}={value}; type {TOP}.{key}={needed}, or {TOP}.sample_weight=dora_mean"
                )

    def describe(self) -> str:
        """What departs from summed log-probs and the mean loss, for people; empty where nothing does."""
        parts = []
        if self.log_probs == "mean":
            parts.append("log-probabilities averaged over each response's tokens")
        if self.reference_free:
            parts.append("without a reference: its log-probabilities are read as 0")
        if self.label_smoothing:
            parts.append(f"labels smoothed by {self.label_smoothing}")
        if self.divergence != "reverse_kl":
            alpha = f" {self.divergence_alpha}" if self.divergence == "alpha" else ""
            parts.append(f"log-ratios as the divergence {self.divergence}{alpha} has them")
        if self.sft_mean is not None:
            parts.append(f"likelihood terms {OF_SFT_MEAN[self.sft_mean]}")
        if self.sft_of == "plain":
            parts.append("likelihood terms of the chosen response by itself, of neither side")
        if self.sft_of == "text":
            parts.append("likelihood terms of prompt and chosen response")
        if self.sft_of == "gold":
            parts.append("likelihood terms of the gold response")
        if self.ld_alpha != 1:
            parts.append(f"tokens past the shorter response's length count {self.ld_alpha}")
        if self.wpo:
            parts.append("each pair's loss times how likely its responses are to the policy (WPO)")
        if self.sample_weight == "weight":
            parts.append("each pair's loss times its weight in the data")
        if self.sample_weight == "dora_each":
            parts.append("an exponent for each response, each pair's loss times the response's DoRA weight")
        elif self.sample_weight in OF_RESPONSES:
            how = str(self.sample_weight).removeprefix("dora_")
            parts.append(f"each pair's loss times the {how} of DoRA's weights of its responses")
        if self.sample_weight == "dora":
            parts.append(f"each pair's loss times DoRA's weight 1/({self.dora_a} + {self.dora_a_i} (1-p)/p)")
        if self.weight_of == "batch":
            parts.append("the batch's mean weight outside the aggregate in place of each pair's")
        if self.aggregate == "kl_dro":
            parts.append(f"{self.dro_lambda} log mean exp(loss/{self.dro_lambda}) in place of the mean")
        if self.aggregate == "dr_dpo":
            parts.append(f"-{self.dro_lambda} log mean exp(-loss/{self.dro_lambda}) in place of the mean")
        return "; ".join(parts)


OF_SFT_MEAN = {
    "pairs": "averaged over each response's tokens",
    "tokens": "averaged over the tokens of the batch's chosen responses",
    "sum": "summed over tokens",
}
"""Of a likelihood term, for people."""


def composition_of(section: Mapping[str, Any]) -> Composition:
    """The composition in an `objective` section. Raises UserError with one line."""
    defaults = composition_defaults()
    params = {key: value for key, value in section.items() if key in defaults}
    try:
        for key, value in params.items():
            if isinstance(defaults[key], float | bool):
                check_kind(key, value, defaults[key])
        return Composition(**params)
    except ParameterError as error:
        raise UserError(one_line(TOP, error, defaults)) from None


def objective_of(section: Mapping[str, Any], fresh: bool = False) -> Objective:
    """The objective of an `objective` section {name, its parameters, keys of the composition}; `fresh`:
    import its module again where the file has changed. Raises UserError with one line, as `load_objective`
    does."""
    if section.get("module") is not None:
        import_own(section["module"], fresh)
    shared = composition_defaults()
    params = {str(key): value for key, value in section.items() if key not in shared}
    loaded = load_at(TOP, str(params.pop("name", None)), params, also=tuple(shared))
    composition = composition_of(section)
    reading = Reading(
        composition.reference_free,
        composition.label_smoothing,
        composition.divergence,
        composition.divergence_alpha if composition.divergence == "alpha" else 0.0,
        composition.sft_mean,
        composition.sft_of,
    )
    _check_reading(loaded, reading)
    _check_match(loaded, composition)
    _check_ld_alpha(loaded, composition)
    _check_listwise(loaded, composition)
    return dataclasses.replace(
        loaded,
        averages=composition.log_probs == "mean",
        reading=reading,
        ld_alpha=composition.ld_alpha,
        spread_lambda=composition.dro_lambda if composition.sample_weight == "dora_each" else None,
        wpo=composition.wpo,
        needs_reference=loaded.needs_reference and not reading.reference_free,
    )


def _check_match(objective: Objective, composition: Composition) -> None:
    """Raise UserError for what needs a loss of each pair by itself, where the loss compares ranks."""
    if objective.match is None:
        return
    for key, neutral in (("aggregate", "mean"), ("sample_weight", None), ("wpo", False)):
        value = getattr(composition, key)
        if value != neutral:
            shown, right = (_as_typed(each) for each in (value, neutral))
            raise UserError(
                f"{TOP}.{key}={shown}: takes a loss of each pair by itself, and objective={objective.name} "
                f"compares ranks within the batch; type {TOP}.{key}={right}"
            )


def _as_typed(value: Any) -> str:
    """As the command line has it."""
    return str("null" if value is None else value).lower()


def _check_ld_alpha(objective: Objective, composition: Composition) -> None:
    """Raise UserError where tokens cannot count less for their place."""
    if composition.ld_alpha == 1:
        return
    reason = None
    if objective.weighs_tokens:
        reason = f"objective={objective.name} weighs the tokens by itself"
    elif objective.needs_mismatched:
        reason = f"objective={objective.name} reads mismatched pairs, which are not scored token by token"
    if reason is not None:
        raise UserError(f"{TOP}.ld_alpha={composition.ld_alpha}: {reason}; type {TOP}.ld_alpha=1")


def _check_listwise(objective: Objective, composition: Composition) -> None:
    """Raise UserError for what is of the two responses of a pair, where the loss is of a list."""
    if not objective.listwise:
        return
    for key, neutral in (("ld_alpha", 1.0), ("wpo", False)):
        value = getattr(composition, key)
        if value != neutral:
            shown, right = (_as_typed(each) for each in (value, neutral))
            raise UserError(
                f"{TOP}.{key}={shown}: is of the two responses of a pair, and objective={objective.name} "
                f"takes lists; type {TOP}.{key}={right}"
            )


SWITCHES = {
    "reference_free": (Reading(reference_free=True), "reads no reference"),
    "label_smoothing": (Reading(label_smoothing=0.25), "has no sigmoid of its own to smooth"),
    "divergence": (Reading(divergence="js"), "is no function of the margin r_w - r_l"),
    "sft_mean": (Reading(sft_mean="sum"), "has no likelihood term"),
    "sft_of": (Reading(sft_of="text"), "has no likelihood term"),
}
"""A key of a reading, a reading with it, and why a formula is not changed by that."""


def _check_reading(objective: Objective, reading: Reading) -> None:
    """Raise UserError where a switch cannot change this loss, tried out on three pairs."""
    for key, (tried, reason) in SWITCHES.items():
        value = getattr(reading, key)
        neutral = getattr(AS_WRITTEN, key)
        if value == neutral:
            continue
        shown, right = (_as_typed(each) for each in (value, neutral))
        if key == "reference_free" and objective.weighs_tokens:
            raise UserError(
                f"{TOP}.{key}=true: objective={objective.name} weighs tokens by log-ratios to the reference; "
                f"type {TOP}.{key}=false"
            )
        readings = (tried, Reading(sft_mean="pairs") if key == "sft_mean" else AS_WRITTEN)
        of_both = [losses_of_trial(dataclasses.replace(objective, reading=each)) for each in readings]
        if of_both[0].equal(of_both[1]):
            raise UserError(
                f"{TOP}.{key}={shown}: has no effect, objective={objective.name} {reason}; type "
                f"{TOP}.{key}={right}"
            )
    if reading.reference_free and reading.divergence != "reverse_kl":
        raise UserError(
            f"{TOP}.divergence={reading.divergence}: is a divergence from the reference, and "
            f"{TOP}.reference_free=true takes it away; type {TOP}.divergence=reverse_kl"
        )
