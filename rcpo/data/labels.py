"""Labels of training pairs once they are read: noise in them, and single answers in the place of pairs.

Owns the draw of data.flip, and what of data and objective does not go together where answers are single ones.
`rcpo.data.pairs.PackedPairs` exchanges and takes apart. Called by `rcpo.training.read_inputs`.
"""

import random

from rcpo.common.errors import UserError
from rcpo.config.conditions import parse_best, parse_condition
from rcpo.config.resolved import ResolvedConfig
from rcpo.config.schema import DataConfig
from rcpo.data.pairs import PackedPairs
from rcpo.objectives.trial import labels_read, takes_single_answers

EXAMPLE = "type objective=kto, bco, dil_bce or another that judges each answer by itself"
PROBED = "calibration.probe_pairs"
OF_BOTH = ("rejected", "margin", "accuracy", "both_down")
"""displacement/* that chosen answers alone do not have."""


def with_noise(train: PackedPairs, config: DataConfig) -> tuple[PackedPairs, int]:
    """The pairs with those flipped that `drawn_to_flip` draws, and how many these are; a list that is drawn
    has its order turned round."""
    drawn, slots = drawn_to_flip(train.num_lists, config), train.slots
    which = [place for idx in drawn for place in range(idx * slots, (idx + 1) * slots)]
    if slots > 1:  # the middle one of an odd list stays where it is
        which = [place for place in which if train.present[place].all()]
    return train.flipped(which), len(drawn)


def drawn_to_flip(num_pairs: int, config: DataConfig) -> list[int]:
    """Places of the pairs whose sides are exchanged: data.flip of them, rounded, drawn by data.seed; a larger
    share of the same seed has all those of a smaller one."""
    order = list(range(num_pairs))
    random.Random(f"flip {config.seed}").shuffle(order)
    return sorted(order[: round(config.flip * num_pairs)])


def labels_line(train: PackedPairs) -> list[str]:
    """How many answers of each label are trained on; nothing where all are in pairs."""
    if train.slots > 1 or not train.has_single_answers:
        return []
    chosen, rejected = train.present.sum(axis=0).tolist()
    return [f"single answers to train on: {chosen} chosen, {rejected} rejected"]


def check_lists(config: ResolvedConfig, train: PackedPairs, held_out: PackedPairs) -> None:
    """Raise UserError for what cannot be with lists of responses, where these are such of more than two."""
    which = "training" if train.slots > 1 else "held-out"
    if max(train.slots, held_out.slots) == 1:
        return
    objective, data = config.objective_function, config.data
    if not objective.listwise:
        raise UserError(
            f"objective={objective.name}: takes pairs, and the {which} data are lists of responses; type "
            "data.lists=best_worst or data.lists=all_pairs, or objective=pl_dpo or another of lists"
        )
    if data.unpair:
        raise UserError(
            "data.unpair=true: takes pairs apart, and the data are lists of responses; type data.unpair=false"
        )
    if data.filter.scores is not None:
        raise UserError(
            f"data.filter.scores={data.filter.scores}: has scores of pairs, and the data are lists of "
            "responses; type data.lists=best_worst, or data.filter.scores=null"
        )


def check_labels(config: ResolvedConfig, train: PackedPairs, held_out: PackedPairs) -> None:
    """Raise UserError where the objective compares the two responses of a pair and some are single, and where
    a label that must be measured is not there."""
    if max(train.slots, held_out.slots) > 1:
        return  # `check_lists` has looked
    if train.has_single_answers and not takes_single_answers(config.objective_function):
        cure = f"{EXAMPLE}{', or data.unpair=false' if config.data.unpair else ''}"
        if not train.present[:, 1].any():
            raise UserError(
                f"objective={config.objective['name']}: compares the two responses of a pair, and all "
                f"{len(train)} rows to train on are chosen answers alone (conversations, or rows without a "
                "label); type objective=sft, or give pairs"
            )
        raise UserError(
            f"objective={config.objective['name']}: compares the two responses of a pair, and the training "
            f"data are single answers with a label; {cure}"
        )
    sft_of = config.objective_function.reading.sft_of
    if train.pictures is not None and sft_of != "response":
        raise UserError(
            f"objective.sft_of={sft_of}: is of a text by itself, which a model would read without the pair's "
            "images; type objective.sft_of=response"
        )
    if train.has_single_answers and sft_of == "gold":
        raise UserError(
            "objective.sft_of=gold: is of a response beside a pair, and the training data are single "
            "answers; type objective.sft_of=response"
        )
    if train.has_single_answers:
        _check_both_labels(config, train)
    if train.has_conversations and sft_of == "text":
        raise UserError(
            "objective.sft_of=text: is of a prompt and its answer, and the training data are conversations "
            "with several answers; type objective.sft_of=response"
        )
    if not held_out.has_single_answers:
        return
    if not held_out.present[:, 1].any() and not labels_read(config.objective_function)[1]:
        _check_chosen_alone(config, len(held_out))
        return
    for num, key in ((len(held_out), "data.eval_pairs"), (config.calibration.probe_pairs, PROBED)):
        present = held_out.take(range(min(num, len(held_out)))).present if num else None
        if present is not None and not present.any(axis=0).all():
            lacking = "chosen" if present[:, 1].any() else "rejected"
            raise UserError(
                f"{key}={num}: none of these held-out answers is a {lacking} one; give more, or rows in a "
                "mixed order"
            )


def _check_chosen_alone(config: ResolvedConfig, num: int) -> None:
    """Raise UserError for what wants rejected answers, where there are none: calibration, which balances two
    sides, and what ends a run or keeps its best weights by their displacement."""
    for key, text in (("stop_when", config.train.stop_when), ("keep_best", config.train.keep_best)):
        names = () if text is None else _names_in(key, text)
        if wanted := next((name for name in names if name.removeprefix("displacement/") in OF_BOTH), None):
            raise UserError(
                f"train.{key}={text}: all {num} held-out answers are chosen ones, so that there is no "
                f"eval/{wanted}; type eval/displacement/chosen or eval/loss there"
            )
    if config.calibration.name != "off":
        raise UserError(
            f"calibration={config.calibration.name}: balances two sides, and all {num} held-out answers "
            f"are chosen ones, which are all that objective={config.objective['name']} reads; type "
            "calibration=off"
        )


def _names_in(key: str, text: str) -> list[str]:
    return parse_condition(text).names() if key == "stop_when" else [parse_best(text).key]


def _check_both_labels(config: ResolvedConfig, train: PackedPairs) -> None:
    """Raise UserError where all training answers have one label, and the objective reads the other one: half
    of its loss would be missing, with nothing to hold the rest, and calibration would have nothing to
    balance."""
    has_chosen, has_rejected = (bool(column.any()) for column in train.present.T)
    reads_chosen, reads_rejected = labels_read(config.objective_function)
    if (has_chosen or not reads_chosen) and (has_rejected or not reads_rejected):
        return
    there, lacking = ("chosen", "rejected") if has_chosen else ("rejected", "chosen")
    reads = "judges answers of both labels" if reads_rejected else "reads chosen answers alone"
    cure = ", or type objective=sft, which reads chosen answers alone" if has_chosen else ""
    raise UserError(
        f"objective={config.objective['name']}: {reads}, and all {len(train)} training answers are {there} "
        f"ones; give {lacking} ones too (or look at the labels){cure}"
    )
