"""What a run says about itself at its end: the summary, one sentence, the table on the console, the model
card.

Works on rows and summaries alone; does not know how they were made. Called by `rcpo.trainer` (summary, card)
and `rcpo.worker` (console).
"""

import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import rcpo
from rcpo.config.resolve import data_label, model_label
from rcpo.config.schema import Config
from rcpo.console import KEPT_NATS, nats, percent
from rcpo.objectives import Objective, composition_of, objective_of
from rcpo.run_folder import RunFolder

HELD_OUT = ("chosen", "rejected", "margin", "accuracy", "chosen_down", "both_down")
"""Displacement keys whose value at the first and the last evaluation the summary holds, as start_* and
end_*."""


def summarize(metrics_rows: list[dict[str, Any]], eval_rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of a run in one flat dict; None where nothing was measured, or not as a finite number.

    start_*, end_*: held-out displacement of the first and the last evaluation, in nats or as shares (accuracy
    counts a tie as half, so it starts at 0.5). worst_chosen: the lowest held-out mean chosen displacement of
    all evaluations, reached at worst_step. in_band_share: of the steps with a measured band. alpha: the last
    step's. pairs_per_second: median over the steps.
    """
    summary: dict[str, Any] = {
        "steps": int(metrics_rows[-1]["step"]) if metrics_rows else 0,
        "start_step": int(eval_rows[0]["step"]) if eval_rows else None,
        "end_step": int(eval_rows[-1]["step"]) if eval_rows else None,
    }
    for when, idx in (("start", 0), ("end", -1)):
        row = eval_rows[idx] if eval_rows else {}
        summary |= {f"{when}_{name}": _finite(row.get(f"displacement/{name}")) for name in HELD_OUT}
    finite = [row for row in eval_rows if _finite(row.get("displacement/chosen")) is not None]
    worst = min(finite, key=lambda row: float(row["displacement/chosen"]), default=None)
    inside = [row["band/inside"] for row in metrics_rows if "band/inside" in row]
    speeds = [row["speed/pairs_per_second"] for row in metrics_rows if "speed/pairs_per_second" in row]
    return summary | {
        "worst_chosen": None if worst is None else worst["displacement/chosen"],
        "worst_step": None if worst is None else int(worst["step"]),
        "in_band_share": statistics.fmean(inside) if inside else None,
        "alpha": _finite(metrics_rows[-1].get("calibration/alpha")) if metrics_rows else None,
        "pairs_per_second": statistics.median(speeds) if speeds else None,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def sentence(summary: dict[str, Any], calibration: str = "off") -> str:
    """What happened to the held-out chosen responses, in words; `calibration` is the option the run was made
    with."""
    change, down = summary["end_chosen"], summary["end_chosen_down"]
    if change is None or down is None:
        return (
            "There is no finite measurement of the held-out chosen responses at the end: "
            "look into eval.jsonl."
        )
    if summary["start_step"] == summary["end_step"]:
        return (
            "The held-out chosen responses were measured once only: nothing can be said about their change."
        )
    measured = f"{nats(change)} nats on average, {percent(down)} of them fell"
    if change <= -KEPT_NATS:
        cure = (
            "calibration=on is made against it"
            if calibration == "off"
            else f"calibration={calibration} did not prevent it here"
        )
        return (
            f"The chosen responses became less likely: {measured}. This is likelihood displacement; {cure}."
        )
    if change < KEPT_NATS:
        return f"The chosen responses kept their likelihood: {measured}."
    return f"The chosen responses became more likely: {measured}."


TABLE_HEADER = ("held-out pairs", "chosen", "rejected", "accuracy", "chosen fell")


def table_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """Under `TABLE_HEADER`: the first and the last evaluation, as text; a dash where nothing finite was
    measured."""
    formats: dict[str, Callable[[float], str]] = {
        "chosen": _nats,
        "rejected": _nats,
        "accuracy": "{:.2f}".format,
        "chosen_down": percent,
    }
    rows = []
    for when in ("start", "end"):
        if summary[f"{when}_step"] is None:
            continue
        values = [(summary[f"{when}_{name}"], write) for name, write in formats.items()]
        cells = ["-" if value is None else write(value) for value, write in values]
        rows.append((f"step {summary[f'{when}_step']}", *cells))
    return rows


def _nats(value: float) -> str:
    return f"{nats(value)} nats"


def print_start(console: Console, config: Config, num_train: int, num_held_out: int) -> None:
    """One line before anything takes time: what is trained on what."""
    console.print(
        Text.assemble(
            (title(config), "bold"),
            f"  {model_label(config)} on {data_label(config)}: {num_train} training pairs, "
            f"{num_held_out} held out, {config.train.pairs_per_step} a step",
        ),
        soft_wrap=True,
    )


def print_report(console: Console, run: RunFolder, config: Config, summary: dict[str, Any]) -> None:
    """Print the table, the sentence, and where things are. Paths stay on one line each, to be copied; ASCII
    where the console is no terminal."""
    plain = not console.is_interactive
    table = Table(
        title=f"Change of log-probability, {title(config)}",
        title_justify="left",
        title_style="bold",
        header_style="" if plain else "dim",
        box=box.MARKDOWN if plain else box.SIMPLE_HEAD,
    )
    for column, name in enumerate(TABLE_HEADER):
        table.add_column(name, justify="left" if column == 0 else "right")
    for row in table_rows(summary):
        table.add_row(*row)
    console.print()
    console.print(table)
    console.print(
        Text(sentence(summary, config.calibration.name), style=_mood(summary["end_chosen"])), soft_wrap=plain
    )
    console.print()
    for label, value in places(run).items():
        console.print(Text.assemble((f"{label:<11}", "dim"), value), soft_wrap=True)


def places(run: RunFolder) -> dict[str, str]:
    """Where a finished run's things are, by label."""
    found = {"run folder": str(run.path), "model": str(run.final), "plot": str(run.plot)}
    offline = sorted(run.path.glob("wandb/offline-run-*"))
    url = run.read_run().get("wandb_url")
    if url is not None:
        found["W&B"] = url
    elif offline:
        found["W&B"] = f"offline; wandb sync {offline[-1]}"
    return found


def title(config: Config) -> str:
    """objective and calibration as on the command line."""
    return f"objective={config.objective['name']} calibration={config.calibration.name}"


def _mood(change: float | None) -> str:
    return "bold red" if change is None or change <= -KEPT_NATS else "bold green"


def model_card(config: Config, summary: dict[str, Any]) -> str:
    """README.md of final/: YAML front matter, objective, calibration, displacement, how to load."""
    objective = objective_of(config.objective)
    composed = composition_of(config.objective).describe()
    settings = ", ".join(f"{key} = {value}" for key, value in objective.params().items()) or "no parameters"
    rows = "\n".join(f"| {' | '.join(row)} |" for row in [TABLE_HEADER, ("---",) * 5, *table_rows(summary)])
    return f"""{_front_matter(config)}
# {config.name}

{model_label(config)} after {summary["steps"]} optimizer steps of preference optimisation on
{data_label(config)} with [rcpo](https://arxiv.org/abs/2604.18239) {rcpo.__version__},
{config.train.pairs_per_step} pairs a step.{_adapter_text(config)}

## Objective

**{objective.name}**, {settings}:

    {formula(objective)}

{LOGPROBS_NOTE[averages(objective)]}{f" Composed: {composed}." if composed else ""}

## Calibration

{_calibration_text(config, summary)}

## What happened to the log-probabilities

{rows}

{sentence(summary, config.calibration.name)}
{_worst_text(summary)}

Changes are means over held-out pairs of log pi(y|x), summed over response tokens, against the model before
training. Accuracy is the share of pairs whose chosen response gained more than the rejected one; a tie counts
half.

## How to load

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("PATH")
    model = AutoModelForCausalLM.from_pretrained("PATH")
"""


def _adapter_text(config: Config) -> str:
    lora = config.model.lora
    if lora.rank is None:
        return ""
    saved = "merged into these weights" if lora.save == "merged" else "in this folder, to be put on its base"
    return f" Trained as a low-rank adapter of rank {lora.rank}, {saved}."


LOGPROBS_NOTE = {
    True: "z and r = z - ref are summed over response tokens; this objective divides by the response length "
    "|y| where the formula says so.",
    False: "z and r = z - ref are summed over response tokens: this objective does not average them.",
}


def formula(objective: Objective) -> str:
    """First sentence of the objective's docstring: its loss per pair."""
    text = " ".join((objective.loss.__doc__ or objective.name).split("\n\n")[0].split())
    return text.split(". ")[0].replace(", per pair (B,)", "").rstrip(".")


def averages(objective: Objective) -> bool:
    """Whether the formula divides log-probs by |y|."""
    return "/|y" in formula(objective).replace(" ", "")


def _calibration_text(config: Config, summary: dict[str, Any]) -> str:
    calibration = config.calibration
    if calibration.name == "off":
        text = "off: the gradient of the loss as it is."
    else:
        text = calibration.name
        if calibration.name in ("on", "exact"):
            text += (
                f": scope {calibration.scope}, estimator {calibration.estimator}, "
                f"ema_beta {calibration.ema_beta}"
            )
        text += (
            f". The last step's alpha was {_alpha(summary['alpha'])}: the pull on the chosen side was "
            "multiplied by it, the push on the rejected side divided."
        )
    if summary["in_band_share"] is not None:
        share = percent(summary["in_band_share"])
        text += f" {share} of the measured steps lay inside the disentanglement band."
    return text


def _alpha(alpha: float | None) -> str:
    return "not finite" if alpha is None else f"{alpha:.4f}"


def _worst_text(summary: dict[str, Any]) -> str:
    if summary["worst_chosen"] is None:
        return ""
    return f"The lowest chosen value was {_nats(summary['worst_chosen'])}, at step {summary['worst_step']}."


def _front_matter(config: Config) -> str:
    """YAML that model hubs read; base_model only where the path is a hub id, never a folder of this
    machine."""
    tags = [
        "rcpo",
        "preference-optimization",
        str(config.objective["name"]),
        f"calibration-{config.calibration.name}",
    ]
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if is_hub_id(config.model.path):
        lines.append(f"base_model: {config.model.path}")
    if config.data.path is not None and is_hub_id(config.data.path):
        lines.append(f"datasets: [{config.data.path}]")
    return "\n".join([*lines, f"tags: {json.dumps(tags)}", "---"])


def is_hub_id(path: str) -> bool:
    """OWNER/NAME that is not something on this disk."""
    return (
        re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path) is not None and not Path(path).exists()
    )
