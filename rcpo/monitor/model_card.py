"""RUN/final/README.md: the model card, with the objective's formula, alpha and displacement."""

import json
import re
from pathlib import Path
from typing import Any

import rcpo
from rcpo.common.console import percent
from rcpo.config.names import data_label, model_label
from rcpo.config.resolved import ResolvedConfig
from rcpo.monitor.summary import TABLE_HEADER, _nats, noise_text, sentence, table_rows
from rcpo.objectives import Objective


def model_card(
    config: ResolvedConfig, summary: dict[str, Any], place: str, for_4: bool = False, sees: bool = False
) -> str:
    """README.md of a model folder that is loaded from `place`: YAML front matter, objective, calibration,
    displacement, how to load; `for_4`: by transformers 4; `sees`: images too."""
    reader, reader_class, model_class = (
        ("processor", "AutoProcessor", "AutoModelForImageTextToText")
        if sees
        else ("tokenizer", "AutoTokenizer", "AutoModelForCausalLM")
    )
    objective = config.objective_function
    composed = config.composition.describe()
    settings = ", ".join(f"{key} = {value}" for key, value in objective.params().items()) or "no parameters"
    rows = "\n".join(f"| {' | '.join(row)} |" for row in [TABLE_HEADER, ("---",) * 5, *table_rows(summary)])
    return f"""{_front_matter(config)}
# {config.name}

{model_label(config)} after {summary["steps"]} optimizer steps of preference optimisation on
{data_label(config)} with [rcpo](https://arxiv.org/abs/2604.18239) {rcpo.__version__},
{config.train.pairs_per_step} pairs a step.{_adapter_text(config)}{_best_text(summary)}

## Objective

**{objective.name}**, {settings}:

    {formula(objective)}

{LOGPROBS_NOTE[averages(objective)]}{f" Composed: {composed}." if composed else ""}

## Calibration

{_calibration_text(config, summary)}

## What happened to the log-probabilities

{rows}

{sentence(summary, config.calibration.name, config.objective["name"])}
{_worst_text(summary)}

Changes are means over held-out pairs of log pi(y|x), summed over response tokens, against the model before
training. Accuracy is the share of pairs whose chosen response gained more than the rejected one; a tie counts
half.{noise_text(summary)}

## How to load

    from transformers import {model_class}, {reader_class}

    {reader} = {reader_class}.from_pretrained("{place}")
    model = {model_class}.from_pretrained("{place}")

{_needs_text(config, place, for_4)}
"""


def _adapter_text(config: ResolvedConfig) -> str:
    lora = config.model.lora
    if lora.rank is None:
        return ""
    saved = "merged into these weights" if lora.save == "merged" else "in this folder, to be put on its base"
    return f" Trained as a low-rank adapter of rank {lora.rank}, {saved}."


def _best_text(summary: dict[str, Any]) -> str:
    """Of RUN/best, whose last evaluation is the best one."""
    if "best_step" not in summary or summary["best_step"] != summary["end_step"]:
        return ""
    key, value, step = (summary[f"best_{name}"] for name in ("key", "value", "step"))
    return f"\n\nThese are the weights with the best {key}: {value:.4g} at step {step}."


def _needs_text(config: ResolvedConfig, place: str, for_4: bool) -> str:
    lora = config.model.lora
    if lora.rank is not None and lora.save == "adapter":
        words = f"model.path=BASE model.lora.adapter={place} model.lora.on_adapter=merge"
        return (
            "This needs transformers, peft, and the base model at the place that adapter_config.json names.\n"
            f"rcpo goes on from here with {words} model.lora.rank={lora.rank}."
        )
    if for_4:
        return "Config and tokenizer are for transformers 4."
    return (
        "This needs transformers 5. For transformers 4, `rcpo export RUN OUT --transformers4` writes one\n"
        "folder: 4 does not find the settings of rotary positions in this one and goes on with defaults."
    )


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


def _calibration_text(config: ResolvedConfig, summary: dict[str, Any]) -> str:
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


def _front_matter(config: ResolvedConfig) -> str:
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
    if on_hub := [path for path in config.data.train_paths() if is_hub_id(path)]:
        lines.append(f"datasets: [{', '.join(dict.fromkeys(on_hub))}]")
    return "\n".join([*lines, f"tags: {json.dumps(tags)}", "---"])


def is_hub_id(path: str) -> bool:
    """OWNER/NAME that is not something on this disk."""
    return (
        re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path) is not None and not Path(path).exists()
    )
