"""The task `arithmetic`: held-out word problems, and whether the generated answer is the right sentence.

Needs no network and no file: the problems are those of `data=arithmetic`. Called by `rcpo.commands.evaluate`
and, for its prompts, by `rcpo.commands.generate`."""

from rcpo.common.conf import value_in_conf
from rcpo.evaluation.subject import Subject
from rcpo.records.arithmetic import Problem, problem_split


def problems_of(subject: Subject) -> list[Problem]:
    """The held-out problems of a run on word problems; of other runs and models those of the default
    config."""
    data = None if subject.config is None else subject.config.data
    if data is not None and data.source == "arithmetic":
        num, seed = data.eval_pairs, data.seed
    else:
        num, seed = (value_in_conf(("data/arithmetic",), key) for key in ("eval_pairs", "seed"))
    return problem_split(0, num, seed)[1]
