"""p(chosen) of one-token answers over a training: its smallest value, and at which step.

After k steps. Of held-out prompts: means of exp(z_w) at each evaluation, from RUN/eval. Of a run that trains
one prompt: exp(logps/chosen) of row k + 1 of metrics.jsonl, which is of that prompt before the update of step
k + 1; the trained model says the end. Does not run a model (`rcpo.evaluation.one_token`)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rcpo.runs.folder import RunFolder

Course = dict[int, float]
"""p(chosen) after so many steps."""


def of_held_out(run: RunFolder) -> Course:
    """At every evaluation, as a mean over prompts."""
    steps = [row["step"] for row in run.rows(run.eval)]
    return {step: float(run.load_pair_results(step).z_w.double().exp().mean()) for step in steps}


def of_one_prompt(run: RunFolder, at_end: float | None) -> Course:
    """At every row of metrics.jsonl, where all batches are the same prompt, and `at_end`, where the model at
    the end of training is there."""
    rows = run.rows(run.metrics)
    z_w = {row["step"] - 1: row.get("logps/chosen", math.nan) for row in rows}
    course = {step: math.exp(z) for step, z in z_w.items() if not math.isnan(z)}
    if rows and at_end is not None:
        course[rows[-1]["step"]] = at_end
    return course


def summary(course: Mapping[int, float]) -> dict[str, Any]:
    """The course, and the first step of its smallest value."""
    step = min(course, key=lambda each: (course[each], each))
    return {
        "lowest": {"p": course[step], "step": step},
        "course": [{"step": each, "p": course[each]} for each in sorted(course)],
    }


def mean_of(prompts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of several prompts, each trained by itself: means of p(chosen) and p(rejected) before and after and of
    the smallest p(chosen), whose steps differ, and the share of prompts whose chosen token fell."""

    def mean(values: Sequence[float]) -> float:
        return math.fsum(values) / len(values)

    sides = {
        side: {when: mean([each[side][when] for each in prompts]) for when in ("before", "after")}
        for side in ("chosen", "rejected")
    }
    steps = sorted({each["lowest"]["step"] for each in prompts})
    step = steps[0] if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
    lowest = {"p": mean([each["lowest"]["p"] for each in prompts]), "step": step}
    return sides | {"lowest": lowest, "fell": mean([each["fell"] for each in prompts])}
