"""What a run says at its end: the summary, the table of held-out pairs, one plain sentence. Called by
`rcpo.training.loop` and `rcpo.launch.worker`."""

import math
import statistics
from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rcpo.common.console import KEPT_NATS, NOISE_MARK, above_noise, nats, percent
from rcpo.config.names import data_label, model_label
from rcpo.config.resolved import ResolvedConfig
from rcpo.method.advice import after_a_fall
from rcpo.runs.folder import RunFolder

HELD_OUT = ("chosen", "rejected", "margin", "accuracy", "chosen_down", "both_down")
"""Displacement keys whose value at the first and the last evaluation the summary holds, as start_* and
end_*."""


def summarize(metrics_rows: list[dict[str, Any]], eval_rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of a run in one flat dict; None where nothing was measured, or not as a finite number.

    start_*, end_*: held-out displacement of the first and the last evaluation, in nats or as shares (accuracy
    counts a tie as half, so it starts at 0.5), and the held-out loss. worst_chosen: the lowest held-out mean
    chosen displacement of all evaluations, reached at worst_step. in_band_share: of the steps with a measured
    band. alpha: the last step's. pairs_per_second: median over the steps. noise_floor: what rounding alone
    may make of a mean displacement, in bfloat16.
    """
    summary: dict[str, Any] = {
        "steps": int(metrics_rows[-1]["step"]) if metrics_rows else 0,
        "start_step": int(eval_rows[0]["step"]) if eval_rows else None,
        "end_step": int(eval_rows[-1]["step"]) if eval_rows else None,
    }
    for when, idx in (("start", 0), ("end", -1)):
        row = eval_rows[idx] if eval_rows else {}
        summary |= {f"{when}_{name}": _finite(row.get(f"displacement/{name}")) for name in HELD_OUT}
        summary[f"{when}_loss"] = _finite(row.get("loss"))
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
        "noise_floor": _finite(eval_rows[-1].get("displacement/noise_floor")) if eval_rows else None,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def sentence(summary: dict[str, Any], calibration: str = "off", objective: str = "dpo") -> str:
    """What happened to the held-out chosen responses, in words; `calibration` and `objective` are the options
    that the run was made with."""
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
    floor = summary.get("noise_floor")
    if floor is not None and abs(change) < floor:
        return (
            f"The chosen responses changed by no more than rounding does: {measured}, and bfloat16's noise "
            f"floor is {floor:.2g} nats."
        )
    if change <= -KEPT_NATS:
        cure = after_a_fall(calibration, objective)
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
    floor = summary.get("noise_floor")

    def above(value: float) -> str:
        return f"{above_noise(value, floor)} nats"

    formats: dict[str, Callable[[float], str]] = {
        "chosen": above,
        "rejected": above,
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


def noise_text(summary: dict[str, Any]) -> str:
    """What the mark in the table says, behind a space; nothing in float32."""
    floor = summary.get("noise_floor")
    if floor is None:
        return ""
    return f" {NOISE_MARK}: within the noise floor of bfloat16, {floor:.2g} nats."


def _nats(value: float) -> str:
    return f"{nats(value)} nats"


def print_start(
    console: Console, config: ResolvedConfig, num_train: int, num_held_out: int, kind: str = "pairs"
) -> None:
    """One line before anything takes time: what is trained on what."""
    console.print(
        Text.assemble(
            (title(config), "bold"),
            f"  {model_label(config)} on {data_label(config)}: {num_train} training {kind}, "
            f"{num_held_out} held out, {config.train.pairs_per_step} a step",
        ),
        soft_wrap=True,
    )


def print_report(console: Console, run: RunFolder, config: ResolvedConfig, summary: dict[str, Any]) -> None:
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
    if noise_text(summary):
        console.print(Text(noise_text(summary).strip(), style="dim"), soft_wrap=plain)
    console.print(
        Text(
            sentence(summary, config.calibration.name, config.objective["name"]),
            style=_mood(summary["end_chosen"]),
        ),
        soft_wrap=plain,
    )
    console.print()
    if "stopped_early" in summary:
        console.print(Text(_capital(summary["stopped_early"]) + "."), soft_wrap=True)
    for label, value in places(run).items():
        console.print(Text.assemble((f"{label:<11}", "dim"), value), soft_wrap=True)


def places(run: RunFolder) -> dict[str, str]:
    """Where a finished run's things are, by label."""
    found = {"run folder": str(run.path), "model": str(run.final), "plot": str(run.plot)}
    if run.best.is_dir():
        found["best model"] = str(run.best)
    if (events := run.path / "tensorboard").is_dir():
        found["events"] = f"tensorboard --logdir {events}"
    offline = sorted(run.path.glob("wandb/offline-run-*"))
    url = run.read_run().get("wandb_url")
    if url is not None:
        found["W&B"] = url
    elif offline:
        found["W&B"] = f"offline; wandb sync {offline[-1]}"
    return found


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def title(config: ResolvedConfig) -> str:
    """objective and calibration as on the command line."""
    return f"objective={config.objective['name']} calibration={config.calibration.name}"


def _mood(change: float | None) -> str:
    return "bold red" if change is None or change <= -KEPT_NATS else "bold green"
